"""What a run says and does before it trains: modes stay, old results go, late schedules are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.user_files import NET_SOURCE

from nncf_compactprune.errors import BudgetError, ConfigError
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.plugins.hookspecs import Schedule, hookimpl
from nncf_compactprune.run import pipeline, prepare
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.models import resolve_model
from nncf_compactprune.run.settings import read_settings


def write_config(folder: Path, **changes: Any) -> Path:
    (folder / "net.py").write_text(NET_SOURCE)
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"pruning_steps": 3}}
    config = {"model": f"python:{folder / 'net.py'}:build", "dataset": "digits", "compression": compression}
    path = folder / "config.json"
    path.write_text(json.dumps({**config, "output_dir": str(folder / "out"), **changes}))
    return path


def test_class_check_leaves_training_flags_and_random_state_alone(tmp_path: Path) -> None:
    write_config(tmp_path)
    resolved = resolve_model(f"python:{tmp_path / 'net.py'}:build", sample_size=(1, 1, 16, 16))
    resolved.model.train()
    next(resolved.model.children()).eval()
    before, state = [m.training for m in resolved.model.modules()], torch.get_rng_state()
    prepare.check_classes(resolved, resolved.example_inputs, resolve_dataset("digits"))
    assert [m.training for m in resolved.model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("epochs", "params", "needed"),
    [
        (3, {"pruning_steps": 3}, 4),
        (4, {"pruning_steps": 3}, None),
        (4, {"pruning_steps": 3, "num_init_steps": 2}, 6),
        (1, {"schedule": "one_shot", "num_init_steps": 1}, 2),
        (0, {"schedule": "one_shot"}, None),
    ],
)
def test_schedule_that_outlasts_the_epochs_is_told(
    tmp_path: Path, epochs: int, params: dict[str, Any], needed: int | None
) -> None:
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": params}
    settings = read_settings(write_config(tmp_path, epochs=epochs, compression=compression))
    warnings = list(prepare.late_schedules(settings, default_plugins()))
    if needed is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert f"in epoch {needed}, but training ends after epoch {epochs}" in warning
        assert f"Set epochs to {needed} or more" in warning


class Lingers:
    """A plugin with a schedule that takes twice the steps it is given, and one that never arrives."""

    @hookimpl
    def compactprune_schedules(self) -> dict[str, Schedule]:
        def lingering(epoch: int, *, initial: float, target: float, steps: int) -> float:
            return target if epoch >= 2 * steps else initial

        def stuck(epoch: int, *, initial: float, target: float, steps: int) -> float:
            return initial

        return {"lingering": lingering, "stuck": stuck}


@pytest.mark.parametrize(
    ("schedule", "epochs", "told"),
    [("lingering", 7, None), ("lingering", 5, "in epoch 7, but"), ("stuck", 50, "has not reached its budget")],
)
def test_schedule_of_a_plugin_is_asked_when_it_arrives(
    tmp_path: Path, schedule: str, epochs: int, told: str | None
) -> None:
    plugins = Plugins()
    plugins.load_entry_points()
    plugins.register(Lingers(), "lingers")
    params = {"schedule": schedule, "pruning_steps": 3}
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": params}
    settings = read_settings(write_config(tmp_path, epochs=epochs, compression=compression), plugins=plugins)
    warnings = list(prepare.late_schedules(settings, plugins))
    assert len(warnings) == (told is not None)
    assert told is None or told in warnings[0]


def test_results_of_an_earlier_run_are_removed_aloud_and_other_files_stay(tmp_path: Path) -> None:
    said: list[str] = []
    old = ["plan.json", "widths.png", "dense.safetensors", "pruned/model.fp16.onnx", "optimum/openvino_model.bin"]
    old += ["optimum/config.json", "ovms/model/1/model.xml"]
    for name in [*old, "images.safetensors", "pruned/notes.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    prepare.remove_old_results(tmp_path, said.append)
    assert said == [f"Removing 7 files of an earlier run from {tmp_path}"]
    assert not any((tmp_path / name).exists() for name in old)
    assert (tmp_path / "images.safetensors").exists()
    assert (tmp_path / "pruned" / "notes.txt").exists()
    prepare.remove_old_results(tmp_path, said.append)
    assert len(said) == 1


def test_refused_config_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("old")
    with pytest.raises(ConfigError):
        pipeline.run(write_config(tmp_path, epochs=-1))
    assert (tmp_path / "out" / "plan.json").read_text() == "old"


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_told_before_anything_is_removed(device: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("old")
    with pytest.raises(ConfigError, match=r'device: no such device here: .* Write "auto", "cpu", or'):
        pipeline.run(write_config(tmp_path, device=device))
    assert (tmp_path / "out" / "plan.json").read_text() == "old"


def test_a_compression_that_cannot_begin_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("plan.json", "config.json", "dense.safetensors"):
        (tmp_path / "out" / name).write_text("old")
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 1e-6}, "params": {"schedule": "one_shot"}}
    for pretrain_epochs in (0, 1):
        config = write_config(tmp_path, compression=compression, epochs=0, pretrain_epochs=pretrain_epochs)
        with pytest.raises(BudgetError):
            pipeline.run(config)
        assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
            ("plan.json", "config.json", "dense.safetensors"), "old"
        )


def test_a_network_that_is_trained_first_can_be_compressed_without_data(tmp_path: Path) -> None:
    compression = {"algorithm": "data_free_layerwise", "budget": {"macs": 0.8}}
    config = write_config(tmp_path, compression=compression, epochs=0, pretrain_epochs=1)
    assert pipeline.run(config).plan.after.macs


def test_a_run_that_ended_while_factors_trained_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    pruning = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"pruning_steps": 1}}
    factors = {"algorithm": "linear_overparameterization", "params": {"form": "branches"}}
    export = {"formats": ["openvino"], "precisions": ["fp32"]}
    config = write_config(tmp_path, compression=[pruning, factors], epochs=4, export=export)
    pipeline.run(config, say=lambda line: None)
    whole = load_file(tmp_path / "out" / "model.safetensors")

    def interrupted(line: str) -> None:
        if "epoch 3/4" in line:  # the cut and the factors came before
            raise KeyboardInterrupt

    again = {"output_dir": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, overrides=again, say=interrupted)
    pipeline.run(config, overrides=again, say=lambda line: None)
    parts = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_files_that_a_config_names_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_text("weights")
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "ignored_scopes": ["{re}" + "a|" * 3000]}
    config = write_config(tmp_path, weights=str(tmp_path / "weights.safetensors"), compression=compression)
    digests = read_settings(config).file_digests()
    assert digests == {str(tmp_path / "weights.safetensors"): hashlib.sha256(b"weights").hexdigest()}


@pytest.mark.parametrize(
    "compression",
    [
        {"algorithm": "data_free_layerwise", "budget": {"macs": 0.5}, "generation": {"cache": "FILE"}},
        {
            "algorithm": "filter_pruning",
            "params": {"interlayer_ranking_type": "learned_ranking", "save_ranking_coeffs_path": "FILE"},
        },
    ],
)
def test_a_file_that_the_run_writes_makes_no_other_run_of_it(compression: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "written.json"
    settings = read_settings(
        write_config(tmp_path, compression=json.loads(json.dumps(compression).replace("FILE", str(file))))
    )
    before = settings.file_digests()
    file.write_text("written by the run")
    assert settings.file_digests() == before
