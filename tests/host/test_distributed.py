"""Several processes: one plan, masks in sync, the weights that one process would get; wrapped models are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ddp_worker
from support.networks import images, trained
from support.places import ROOT, TESTS
from torch import nn

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host import distributed
from nncf_compactprune.host.distributed import averaged, require_agreement, summed


@pytest.mark.slow
def test_two_processes_get_what_one_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are sums in another order: weights may differ by float32 rounding, grown over the steps."""
    paths = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(TESTS / "support" / "ddp_worker.py"),
    ]
    two = subprocess.run(
        [sys.executable, *command, str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert two.returncode == 0, two.stdout + two.stderr
    monkeypatch.setattr(sys, "argv", [])
    ddp_worker.run_example("--output", str(tmp_path / "one"))
    assert (tmp_path / "one" / "plan.json").read_bytes() == (tmp_path / "two" / "plan.json").read_bytes()
    assert (tmp_path / "two" / "model.onnx").is_file()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-4 * float(weight.abs().max()), msg=name)


def test_one_process_has_nothing_to_agree_on() -> None:
    values = [torch.arange(3.0)]
    assert averaged(values)[0] is summed(values)[0] is values[0]
    require_agreement("anything", "a text")


def test_nothing_to_reduce_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    assert averaged([]) == summed([]) == []


class FullyShardedDataParallel(nn.Module):
    """Named as torch's, which needs a process group to be built."""


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.DataParallel, r"DataParallel: expected the module inside it\. Pass model\.module"),
        (torch.jit.script, r"torch\.jit: .*before it was scripted.*Compress first"),
        (torch.compile, r"torch\.compile: .*Compress first, then compile"),
        (lambda model: FullyShardedDataParallel(), r"FSDP: .*Prune first .*then wrap the compact model"),
    ],
)
def test_wrapped_models_are_refused(wrap: Any, remedy: str) -> None:
    model = trained("plain", dtype=torch.float32)
    with pytest.raises(CompactPruneError, match=remedy):
        create_compressed_model(wrap(model), ddp_worker.CONFIG)
    with pytest.raises(CompactPruneError, match=remedy):
        prune(wrap(model), images(torch.float32), budget={"macs": 0.5})
