"""Accuracy-aware training in ``run``: the search, what is told and written of it, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.user_files import NET_SOURCE

from nncf_compactprune.errors import ConfigError
from nncf_compactprune.run import watching
from nncf_compactprune.run.pipeline import load_run, run
from nncf_compactprune.run.state import Run
from nncf_compactprune.run.training import train_epoch

ADAPTIVE = {
    "mode": "adaptive_compression_level",
    "params": {
        "maximal_absolute_accuracy_degradation": 3.0,
        "initial_training_phase_epochs": 2,
        "patience_epochs": 1,
        "initial_compression_rate_step": 0.2,
        "minimal_compression_rate_step": 0.1,
        "maximal_total_epochs": 6,
    },
}
EARLY = {"mode": "early_exit", "params": {"maximal_relative_accuracy_degradation": 90, "maximal_total_epochs": 4}}


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder.parent / "net.py").write_text(NET_SOURCE)
    params = {"pruning_steps": 1, "round_to": 1}
    config = {
        "model": f"python:{folder.parent / 'net.py'}:build",
        "dataset": "digits",
        "pretrain_epochs": 2,
        "batch_size": 256,
        "optimizer": {"lr": 0.1},
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.7}, "params": params},
        "accuracy_aware_training": ADAPTIVE,
        "export": {"formats": ["openvino"], "precisions": ["fp32"]},
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_the_smallest_network_that_holds_is_found_told_and_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = run(write_config(tmp_path / "a", epochs=3), say=lines.append)
    report = json.loads((outcome.directory / "summary.json").read_text())
    found = report["accuracy_aware_training"]
    assert found["mode"] == "adaptive_compression_level"
    assert found["allowed"] == pytest.approx(found["uncompressed"] - 3)
    rates = [one["rate"] for one in found["tried"]]
    assert rates == sorted(set(rates))
    assert len(rates) >= 3
    assert sum(one["epochs"] for one in found["tried"]) == found["epochs"][-1]["epoch"] <= 6
    holding = [one["rate"] for one in found["tried"] if one["holds"]]
    if found["holds"]:
        assert found["rate"] == pytest.approx(max(holding))
        # What was trained under its masks is cut as it is: the pruned network is the one that was measured.
        best = max(e["accuracy"] for e in found["epochs"] if e["compression_rate"] == pytest.approx(found["rate"]))
        assert 100 * outcome.comparison.pruned.accuracy == pytest.approx(best, abs=0.3)
    assert 1 - outcome.plan.after.macs / outcome.plan.before.macs >= found["rate"] - 1e-6
    text = (outcome.directory / "report.md").read_text()
    assert "## Accuracy-aware training" in text
    assert text.count("| yes |") == len(holding)
    assert any("epochs is not read" in line for line in lines)
    assert any(line.startswith("Accuracy-aware training: the accuracy may fall from") for line in lines)
    assert any("test accuracy" in line and "removed" in line for line in lines)
    assert any(line.startswith("Result: rate") for line in lines)
    names = {path.name for path in (outcome.directory / "accuracy_aware_training").iterdir()}
    assert "acc_aware_checkpoint_last.pth" in names
    assert not (outcome.directory / "snapshots").exists()
    assert load_run(outcome.directory).model is not None


@pytest.mark.parametrize(
    "section",
    [pytest.param(ADAPTIVE, id="adaptive", marks=pytest.mark.slow), pytest.param(EARLY, id="early_exit")],
)
def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: Any) -> None:
    changes: dict[str, Any] = {"accuracy_aware_training": section}
    if section is EARLY:  # the schedule arrives in the last epoch only, so that there are some to lose
        entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.7}, "params": {"pruning_steps": 3, "round_to": 1}}
        changes["compression"] = entry
    whole = run(write_config(tmp_path / "whole", **changes), say=lambda _: None)
    epochs = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal epochs
        epochs += 1
        if epochs == 4:
            raise KeyboardInterrupt
        return train_epoch(*args, **kwargs)

    path = write_config(tmp_path / "killed", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(watching, "train_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            run(path, say=lambda _: None)
    lines: list[str] = []
    torch.manual_seed(99)
    again = run(path, say=lines.append)
    assert any(line.startswith("Going on after epoch 3") for line in lines)
    weights, expected = (load_file(outcome.directory / "model.safetensors") for outcome in (again, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    reports = [
        json.loads((o.directory / "summary.json").read_text())["accuracy_aware_training"] for o in (again, whole)
    ]
    assert reports[0] == reports[1]


def test_early_exit_ends_when_the_accuracy_is_held(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = run(write_config(tmp_path / "a", accuracy_aware_training=EARLY), say=lines.append)
    found = json.loads((outcome.directory / "summary.json").read_text())["accuracy_aware_training"]
    assert found["holds"]
    assert found["epochs"][-1]["epoch"] == 2  # the schedule arrives in the second
    assert any(line.startswith("Accurate enough after epoch 2") for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compression": {"algorithm": "linear_overparameterization"}},
            "accuracy_aware_training.mode: expected one algorithm with a compression rate, got linear_overparam",
        ),
        (
            {
                "compression": {
                    "algorithm": "catro",
                    "budget": {"macs": 0.5},
                    "params": {"schedule": "one_shot", "classes": [1, 2]},
                }
            },
            "'classes' cuts the classifier at once",
        ),
        (
            {"dataset": None, "weights": "w.safetensors", "pretrain_epochs": 0, "epochs": 0},
            "accuracy_aware_training: leave it out: there is no dataset, so nothing can be trained or measured",
        ),
    ],
)
def test_what_cannot_be_watched_is_told_before_training(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(write_config(tmp_path / "a", **changes), say=lambda _: None)
    assert message in str(caught.value)


def test_what_begins_at_the_end_is_judged_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Run.measured
    monkeypatch.setattr(
        Run, "measured", lambda self, model, which: replace(measured(self, model, which), accuracy=0.0)
        if which == "Compressed" else measured(self, model, which),
    )  # fmt: skip
    pruning = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.7}, "params": {"pruning_steps": 1, "round_to": 1}}
    quantization = {"algorithm": "quantization", "params": {"start_epoch": None, "subset_size": 20}}
    lines: list[str] = []
    changes = {"accuracy_aware_training": EARLY, "compression": [pruning, quantization]}
    outcome = run(write_config(tmp_path / "a", **changes), say=lines.append)
    found = json.loads((outcome.directory / "summary.json").read_text())["accuracy_aware_training"]
    assert any("begins at strip(): quantization" in line for line in lines)
    assert any(line.startswith("Warning: the accuracy held before the last entries came: 0.00 % now") for line in lines)
    assert (found["holds"], found["final"]) == (False, 0.0)
    assert "no compressed network held it, with 0.00 % as exported" in (outcome.directory / "report.md").read_text()
