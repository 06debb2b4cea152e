"""Runs that are killed: what the next start finds, and that it ends where a run in one piece ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.networks import trained
from support.places import ROOT
from torch import nn
from torch.utils.data import Subset

from nncf_compactprune import create_compressed_model
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.run import compare, datasets, pipeline, prepare, training
from nncf_compactprune.run.training import fit, train_epoch
from nncf_compactprune.storage import snapshots
from nncf_compactprune.storage.snapshots import Snapshots

CONFIG = {
    "input_info": {"sample_size": [2, 3, 12, 12]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "num_init_steps": 1, "pruning_steps": 2, "round_to": 1},
    },
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
}


class Dropped(nn.Module):
    """A network with dropout: it also depends on torch's own random state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained("residual", dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.net(x), 0.2, self.training)


def loader() -> torch.utils.data.DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 3, 12, 12, generator=generator), torch.randint(0, 5, (32,), generator=generator)
    )
    return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(2))


def train(folder: Path | None, optimizer: str, *, stop_after: int | None = None, seed: int = 0) -> nn.Module:
    """Five epochs, or what is left of them; a kill is an exception from within an epoch."""
    torch.manual_seed(seed)
    model: nn.Module = Dropped()
    kept = None if folder is None else Snapshots(folder, "this run")
    found = None if kept is None else kept.newest()
    ctrl, model = create_compressed_model(model, CONFIG, compression_state=found and found.facts["compression"])
    built = OPTIMIZERS[optimizer](model.parameters())
    ctrl.attach(optimizer=built)

    def kill(record: Any) -> None:
        if record.epoch == (stop_after or 0) + 1:
            raise KeyboardInterrupt

    options = {"snapshots": kept, "resume": found, "on_epoch": None if stop_after is None else kill}
    fit(model, loader(), built, epochs=5, controller=ctrl, **options)
    return ctrl.strip()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop_after", [1, 3, 4], ids=["dense", "masked", "cut"])
def test_a_killed_run_ends_with_the_same_weights(optimizer: str, stop_after: int, tmp_path: Path) -> None:
    whole = train(None, optimizer).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, optimizer, stop_after=stop_after)
    resumed = train(tmp_path, optimizer, seed=7).state_dict()
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_only_the_last_two_are_kept_and_removed_at_the_end(tmp_path: Path) -> None:
    train(tmp_path / "kept", "sgd")
    names = [path.name for path in sorted((tmp_path / "kept").iterdir())]
    assert names == ["0-000004.safetensors", "0-000005.safetensors"]
    (tmp_path / "kept" / ".0-000006.safetensors.0.tmp").mkdir()  # what a kill while writing leaves
    Snapshots(tmp_path / "kept", "this run").remove()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("damage", ["one bit", "cut short", "empty", "text"])
def test_a_damaged_newest_is_reported_and_the_one_before_taken(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, "sgd")
    newest = tmp_path / "0-000005.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes({"one bit": content, "cut short": content[:-9], "empty": b"", "text": b"x" * 99}[damage])
    (tmp_path / ".0-000006.safetensors.0.tmp").mkdir()  # what a kill while writing leaves
    with caplog.at_level("WARNING", logger="nncf"):
        found = Snapshots(tmp_path, "this run").newest()
    assert found is not None
    assert found.epoch == 4
    assert "0-000005.safetensors is damaged and passed over" in caplog.text


def test_a_full_disk_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, calls = snapshots.write_tensors, []

    def full(path: Path, tensors: Any, metadata: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            path.write_bytes(b"the first part")
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    monkeypatch.setattr(snapshots, "write_tensors", full)
    with caplog.at_level("WARNING", logger="nncf"):
        train(tmp_path, "sgd")
    assert len(calls) == 5
    assert caplog.text.count("No space left on device") == 3
    assert "Training goes on" in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0-000001.safetensors", "0-000002.safetensors"]
    found = Snapshots(tmp_path, "this run").newest()
    assert found is not None
    assert found.epoch == 2


def test_what_belongs_to_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "sgd")
    with pytest.raises(CompactPruneError, match=r"another configuration\. Delete"):
        Snapshots(tmp_path, "that run").newest()
    found = Snapshots(tmp_path, "this run").newest()
    assert found is not None
    other = nn.Linear(2, 2)
    with pytest.raises(CompactPruneError, match="snapshot of another run"):
        found.restore(other, torch.optim.SGD(other.parameters()), None, [])


RUN = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    from nncf_compactprune.run import compare, pipeline
    from nncf_compactprune.run.training import train_epoch
    import nncf_compactprune.run.training as training

    epochs = []
    def killed(*args, **kwargs):
        epochs.append(1)
        if len(epochs) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_epoch(*args, **kwargs)

    training.train_epoch = killed
    compare.export_model = lambda *args, **kwargs: []  # not what this is about
    pipeline.run(sys.argv[1], overrides={"output_dir": sys.argv[2]})
"""


def write_config(folder: Path) -> Path:
    config = {
        "model": "python:nncf_compactprune.run.networks.digits_net:digits_net",
        "dataset": "digits",
        "batch_size": 512,
        "pretrain_epochs": 2,
        "epochs": 3,
        "compression": {**CONFIG["compression"], "params": {"pruning_steps": 2}},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def check_same(whole: Path, killed: Path) -> None:
    assert (killed / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    for file in ("dense.safetensors", "model.safetensors"):
        ours, theirs = load_file(killed / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    epochs = [
        [(e["phase"], e["epoch"], e["loss"]) for e in json.loads((folder / "summary.json").read_text())["epochs"]]
        for folder in (whole, killed)
    ]
    assert epochs[0] == epochs[1]
    assert not (killed / "snapshots").exists()


@pytest.mark.slow
def test_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = write_config(tmp_path), []
    data = datasets.digits()
    few = dataclasses.replace(data, train=Subset(data.train, range(64)), test=Subset(data.test, range(32)))
    monkeypatch.setattr(prepare, "resolve_dataset", lambda *_: few)
    monkeypatch.setattr(compare, "export_model", lambda *_, **__: [])  # not what this is about
    pipeline.run(config, overrides={"output_dir": str(tmp_path / "whole")}, say=said.append)
    assert not any("Going on" in line for line in said)
    for interrupt_at in (2, 3):  # the second dense epoch; two epochs on, while masked

        def interrupted(*args: Any, at: list[int] = [interrupt_at], **kwargs: Any) -> Any:  # noqa: B006
            at[0] -= 1
            if at[0] == 0:
                raise KeyboardInterrupt
            return train_epoch(*args, **kwargs)

        monkeypatch.setattr(training, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, overrides={"output_dir": str(tmp_path / "killed")}, say=said.append)
    monkeypatch.setattr(training, "train_epoch", train_epoch)
    with pytest.raises(CompactPruneError, match="another configuration"):
        pipeline.run(config, overrides={"output_dir": str(tmp_path / "killed"), "seed": 3}, say=said.append)
    pipeline.run(config, overrides={"output_dir": str(tmp_path / "killed")}, say=said.append)
    assert sum("Going on" in line for line in said) == 2
    check_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_run_survives_kill_minus_nine_in_every_phase(tmp_path: Path) -> None:
    """In processes that are really killed: in dense training, while masked, after the cut."""
    config = write_config(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(folder: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", textwrap.dedent(RUN), str(config), str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)

    whole = start("whole", 0)
    assert whole.returncode == 0, whole.stderr
    for kill_at in (2, 3, 2):  # the second dense epoch; two epochs on; one more
        ended = start("killed", kill_at)
        assert ended.returncode == -signal.SIGKILL, ended.stdout + ended.stderr
    last = start("killed", 0)
    assert last.returncode == 0, last.stderr
    assert "Going on from" in last.stdout
    check_same(tmp_path / "whole", tmp_path / "killed")
