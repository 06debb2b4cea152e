"""A quantized run: its checkpoint holds the quantizers, and its files are verified against it on the run's images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from support.user_files import NET_SOURCE
from typer.testing import CliRunner

from nncf_compactprune.cli import app
from nncf_compactprune.errors import ConfigError, ExportError
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.report.summary import SUMMARY_FILE
from nncf_compactprune.run.pipeline import load_run, run
from nncf_compactprune.run.verifying import verify


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network pruned and quantized, with one epoch for each part."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "net.py").write_text(NET_SOURCE)
    pruning = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"schedule": "one_shot"}}
    quantization = {"algorithm": "quantization", "overflow_fix": "enable", "params": {"start_epoch": None}}
    config = {
        "model": f"python:{folder / 'net.py'}:build", "dataset": "digits", "pretrain_epochs": 1, "epochs": 1,
        "compression": [pruning, quantization],
        "export": {"precisions": ["fp32"], "layout": "ovms"}, "output_dir": str(folder / "out"),
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    run(path)
    return folder / "out"


def test_its_files_are_verified_against_its_checkpoint_on_real_images(directory: Path) -> None:
    checks = {check.path.relative_to(directory).as_posix(): check for check in verify(directory, samples=100)}
    assert all(check.passed for check in checks.values()), [check.problems for check in checks.values()]
    measured = json.loads((directory / SUMMARY_FILE).read_bytes())["pruned"]["accuracy"]
    for name in ("pruned/model_int8.onnx", "pruned/model_int8.xml", "ovms/model/1/model.xml"):
        assert (checks[name].compared_with, checks[name].samples) == ("torch", 100)
        accuracy, widths = checks[name].torch_accuracy, checks[name].widths
        assert accuracy == pytest.approx(measured, abs=0.15)  # of some of the images
        assert widths is not None
        assert widths[0] == widths[1]


def test_another_layout_and_batch_come_out_of_its_checkpoint(directory: Path, tmp_path: Path) -> None:
    images = torch.randn(4, 1, 16, 16)
    loaded = load_run(directory).model
    assert carries_hooks(loaded)
    said = CliRunner().invoke(
        app, ["export", str(directory), "--output", str(tmp_path / "one"), "--batch", "1", "--format", "pt2"]
    )
    assert said.exit_code == 0, said.output
    assert [one.name for one in (tmp_path / "one").iterdir()] == ["model_int8.pt2"]
    export = ["export", str(directory), "--output", str(tmp_path / "served"), "--layout", "ovms", "--name", "digits"]
    assert CliRunner().invoke(app, export).exit_code == 0
    before, after = (
        openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0]
        for path in (directory / "pruned" / "model_int8.xml", tmp_path / "served" / "digits" / "1" / "model.xml")
    )
    np.testing.assert_array_equal(before, after)
    with torch.no_grad():
        assert np.abs(loaded(images).numpy() - before).max() < 0.1 * np.abs(before).max()


def test_no_run_goes_on_from_it(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"output_dir": str(tmp_path / "out"), "warm_start": str(directory)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"warm_start: .* holds a quantized network.*Start from a run without quant"):
        run(tmp_path / "config.json")


def test_a_layout_that_cannot_hold_the_network_is_refused_before_training(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"output_dir": str(tmp_path / "out"), "export": {"layout": "optimum"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="layout: optimum reads models of transformers and timm"):
        run(tmp_path / "config.json")
    assert not (tmp_path / "out").exists()
