"""A quantized run is its files: they are verified on the run's images, and against the accuracy that it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.user_files import NET_SOURCE

from nncf_compactprune.errors import ExportError, ResolveError
from nncf_compactprune.report.summary import SUMMARY_FILE
from nncf_compactprune.run.pipeline import load_run, run
from nncf_compactprune.run.verifying import verify


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network pruned and quantized, with one epoch for each part."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "net.py").write_text(NET_SOURCE)
    pruning = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"schedule": "one_shot"}}
    config = {
        "model": f"python:{folder / 'net.py'}:build", "dataset": "digits", "pretrain_epochs": 1, "epochs": 1,
        "compression": [pruning, {"algorithm": "quantization", "params": {"start_epoch": None}}],
        "export": {"precisions": ["fp32"], "layout": "ovms"}, "output_dir": str(folder / "out"),
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    run(path)
    return folder / "out"


def test_its_files_are_verified_on_real_images(directory: Path) -> None:
    checks = {check.path.relative_to(directory).as_posix(): check for check in verify(directory, samples=100)}
    assert all(check.passed for check in checks.values()), [check.problems for check in checks.values()]
    assert checks["dense/model.onnx"].compared_with == "torch"
    for name in ("pruned/model_int8.onnx", "pruned/model_int8.xml", "ovms/model/1/model.xml"):
        assert (checks[name].compared_with, checks[name].samples) == ("itself in f32", 100)
        assert checks[name].accuracy is not None


def test_an_export_of_it_says_where_its_layout_is_set(directory: Path) -> None:
    with pytest.raises(ResolveError, match=r'no checkpoint holds it\. Set the keys of "export" in the config'):
        load_run(directory)


def test_a_layout_that_cannot_hold_the_network_is_refused_before_training(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"output_dir": str(tmp_path / "out"), "export": {"layout": "optimum"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="layout: optimum reads models of transformers and timm"):
        run(tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


def test_a_file_below_the_accuracy_of_the_run_is_told(directory: Path) -> None:
    summary = json.loads((directory / SUMMARY_FILE).read_bytes())
    measured, summary["pruned"]["accuracy"] = summary["pruned"]["accuracy"], 1.0
    (directory / SUMMARY_FILE).write_text(json.dumps(summary))
    assert measured < 0.9  # one epoch
    (check,) = verify(directory / "pruned" / "model_int8.xml", samples=100)
    assert "in torch the run measured 100.00%" in " ".join(check.problems)
