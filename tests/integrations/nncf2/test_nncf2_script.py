"""NNCF 2.x's way to write a training script: ``examples/nncf2_classification.py`` here, resumed and accuracy-aware.

The same script with NNCF 2.19's imports is run by ``tests/integrations/test_nncf219_script.py``.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from support.nncf2_imports import imports
from support.places import CONFIGS, ROOT

SCRIPT = ROOT / "examples" / "nncf2_classification.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_the_document_names_the_imports_of_the_script() -> None:
    _, ours = imports()
    assert ours in SCRIPT.read_text(encoding="utf-8")


def test_training_resuming_and_export(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    config = CONFIGS / "nncf2_digits_filter_pruning.json"
    first = run("--config", config, "--log-dir", tmp_path, "--pretrain-epochs", 0, "--epochs", 3)
    assert re.search(r"^epoch 3: .* rate 0\.50\d*, fully_compressed$", first, re.MULTILINE)
    assert "filter_pruning" in first
    exported = int(re.search(r"exported: (\d+) bytes", first)[1])  # type: ignore[index]
    again = run("--config", config, "--log-dir", tmp_path, "--epochs", 4, "--resume", tmp_path / "last.pth")
    assert "epoch 3" not in again
    assert re.search(r"^epoch 4: .* rate 0\.50\d*, fully_compressed$", again, re.MULTILINE)
    assert int(re.search(r"exported: (\d+) bytes", again)[1]) == pytest.approx(exported, rel=0.01)  # type: ignore[index]
    assert exported < 0.9 * 4 * 119_386  # bytes of the dense network's weights


@pytest.mark.slow
def test_accuracy_aware_training(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    config = json.loads((CONFIGS / "nncf2_digits_accuracy_aware.json").read_text(encoding="utf-8"))
    config["accuracy_aware_training"]["params"] |= {"maximal_absolute_accuracy_degradation": 60.0}
    config["accuracy_aware_training"]["params"] |= {"maximal_total_epochs": 4, "initial_training_phase_epochs": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = run("--config", tmp_path / "config.json", "--log-dir", tmp_path, "--pretrain-epochs", 0)
    assert re.search(r"Compression rate: 0\.[3-9]", output)
    assert list(tmp_path.glob("accuracy_aware_training/*/acc_aware_checkpoint_best_0.300.pth"))
