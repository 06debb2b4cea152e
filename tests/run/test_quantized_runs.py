"""A quantized run is its files: they are verified on the run's images, and against the accuracy that it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.user_files import NET_SOURCE

from nncf_compactprune.report.summary import SUMMARY_FILE
from nncf_compactprune.run.pipeline import run
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
        "export": {"precisions": ["fp32"]}, "output_dir": str(folder / "out"),
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    run(path)
    return folder / "out"


def test_its_files_are_verified_on_real_images(directory: Path) -> None:
    checks = {check.path.relative_to(directory).as_posix(): check for check in verify(directory, samples=100)}
    assert all(check.passed for check in checks.values()), [check.problems for check in checks.values()]
    assert checks["dense/model.onnx"].compared_with == "torch"
    for name in ("pruned/model_int8.onnx", "pruned/model_int8.xml"):
        assert (checks[name].compared_with, checks[name].samples) == ("itself in f32", 100)
        assert checks[name].accuracy is not None


def test_a_file_below_the_accuracy_of_the_run_is_told(directory: Path) -> None:
    summary = json.loads((directory / SUMMARY_FILE).read_bytes())
    measured, summary["pruned"]["accuracy"] = summary["pruned"]["accuracy"], 1.0
    (directory / SUMMARY_FILE).write_text(json.dumps(summary))
    assert measured < 0.9  # one epoch
    (check,) = verify(directory / "pruned" / "model_int8.xml", samples=100)
    assert "in torch the run measured 100.00%" in " ".join(check.problems)
