"""What a run with a budget of latency says of its time: measured once more, under the budget's own settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.meters import with_fakes
from support.user_files import NET_SOURCE

from nncf_compactprune.export import latency
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.report import rich_table, to_markdown
from nncf_compactprune.run import pipeline


def run_with(tmp_path: Path, runtime: str, asked: float) -> tuple[pipeline.RunOutcome, list[str]]:
    (tmp_path / "net.py").write_text(NET_SOURCE)
    budget = {"latency": asked, "runtime": runtime, "threads": 1, "batch": 4}
    params = {"schedule": "one_shot", "round_to": 1}
    config = {
        "model": f"python:{tmp_path / 'net.py'}:build",
        "dataset": "digits",
        "epochs": 0,
        "compression": {"algorithm": "fbnet_pruning", "budget": budget, "params": params},
        "export": {"formats": ["openvino"], "precisions": ["fp32"]},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plugins = Plugins()
    plugins.load_entry_points()
    said: list[str] = []
    torch.manual_seed(0)
    return pipeline.run(tmp_path / "config.json", say=said.append, plugins=with_fakes(plugins)), said


@pytest.mark.parametrize("runtime", ["fake", pytest.param("lucky", marks=pytest.mark.slow)])
def test_the_table_has_the_time_under_the_budgets_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    outcome, said = run_with(tmp_path, runtime, 0.6)
    label = "budget: a fake device, FP32, batch 4, 1 thread"
    dense, pruned = (network.latency_ms for network in (outcome.comparison.dense, outcome.comparison.pruned))
    assert list(dense) == list(pruned) == [label, "OpenVINO FP32"]
    assert f"| Latency, {label} |" in to_markdown(outcome.comparison)
    assert rich_table(outcome.comparison).row_count == 6
    ratio = pruned[label] / dense[label]
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert summary["latency_budget"]["fbnet_pruning"]["ratio"] == pytest.approx(ratio)
    warnings = [line for line in said if "the finished network takes" in line]
    if runtime == "fake":
        assert ratio <= 0.63  # widths of four channels at once
        assert warnings == []
    else:
        assert ratio > 0.63
        (warning,) = warnings
        assert f"takes {ratio:.1%} of the dense one's time" in warning
        assert "asked 60.0%; a fake device, FP32, batch 4, 1 thread" in warning


def test_other_processes_do_not_decide_what_is_reported() -> None:
    quiet, busy = [5_000_000] * 50, [5_000_000, 90_000_000, 80_000_000, 70_000_000, 60_000_000] * 10
    assert latency._summary(busy) == latency._summary(quiet)
    assert latency._summary([3_000_000, 1_000_000, 2_000_000]).median_ms == 2
