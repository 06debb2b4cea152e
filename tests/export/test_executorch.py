"""``.pte`` files in ExecuTorch's own runtime. It has an environment of its own: ``make test-executorch``."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.networks import Words, model32
from support.quantizers import QUANTIZATION, quantized
from torch import Tensor, nn
from typer.testing import CliRunner

from nncf_compactprune import prune
from nncf_compactprune.cli import app
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportOptions, export_model
from nncf_compactprune.run.pipeline import run
from nncf_compactprune.serving.benchmark import benchmark
from nncf_compactprune.serving.reference import TorchSide
from nncf_compactprune.serving.verify import verify_served

IMAGES = torch.randn(2, 3, 12, 12)
needs = pytest.mark.skipif(
    find_spec("executorch") is None, reason="ExecuTorch has its environment: make test-executorch"
)
lacks = pytest.mark.skipif(find_spec("executorch") is not None, reason="ExecuTorch is installed")


def digits(folder: Path, **export: object) -> dict[str, object]:
    return {
        "model": "python:nncf_compactprune.run.networks.digits_net:digits_net",
        "dataset": "digits",
        "epochs": 1,
        "compression": [{"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}],
        "export": {"formats": ["onnx", "executorch"], **export},
        "output_dir": str(folder),
    }


@lacks
def test_a_missing_executorch_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"executorch is not installed\. .*pip install 'nncf-compactprune\[executorch\]'"
    ):
        export_model(model32("residual"), IMAGES, tmp_path / "net.pte")
    with pytest.raises(ExportError, match="executorch is not installed"):
        run(digits(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@needs
def test_a_pruned_network_is_lowered_and_computes_the_same(tmp_path: Path) -> None:
    model = model32("residual").eval()
    prune(model, IMAGES, budget={"macs": 0.5}, round_to=1)
    (file,) = export_model(model, IMAGES, tmp_path / "net.pte")
    assert (file.label, file.verification.batch_sizes) == ("ExecuTorch FP32", (1,))
    assert file.verification.max_rel_error < 1e-5
    assert b"XnnpackBackend" in file.path.read_bytes()
    check = verify_served(file.path, TorchSide(model, IMAGES))
    assert (check.passed, check.batch_sizes, check.runtime) == (True, (1,), "ExecuTorch")
    assert verify_served(file.path, None).passed
    (timed,) = benchmark([file.path], seconds=0.2).timings
    assert timed.median_ms > 0
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        next(one for one in wrong.modules() if isinstance(one, nn.Conv2d)).weight.mul_(1.5)
    assert not verify_served(file.path, TorchSide(wrong, IMAGES)).passed


@needs
def test_a_batch_that_is_asked_for_is_the_files(tmp_path: Path) -> None:
    model = model32("residual").eval()
    (file,) = export_model(model, IMAGES, tmp_path / "net.pte", options=ExportOptions(batch=4))
    assert file.verification.batch_sizes == (4,)
    assert verify_served(file.path, TorchSide(model, IMAGES)).batch_sizes == (4,)


@needs
def test_inputs_keep_their_types(tmp_path: Path) -> None:
    words = {"ids": torch.randint(0, 200, (2, 5)), "mask": torch.ones(2, 5)}
    (file,) = export_model(Words().eval(), words, tmp_path / "net.pte")
    assert verify_served(file.path, None).passed


@needs
def test_what_it_does_not_take_is_refused_in_a_sentence(tmp_path: Path) -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(self.conv(x)).real

    with pytest.raises(ExportError, match="ExecuTorch could not lower the model"):
        export_model(Fourier().eval(), IMAGES, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="ExecuTorch files hold no quantized model"):
        export_model(quantized(model32("residual"), QUANTIZATION), IMAGES, tmp_path / "net.pte")


@needs
def test_a_run_writes_and_verifies_it(tmp_path: Path) -> None:
    run(digits(tmp_path))
    assert {one.name for one in (tmp_path / "pruned").iterdir()} >= {"model.onnx", "model_fp16.onnx", "model.pte"}
    said = CliRunner().invoke(app, ["verify", str(tmp_path / "pruned" / "model.pte")])
    assert said.exit_code == 0, said.output
    assert "ExecuTorch" in said.output
