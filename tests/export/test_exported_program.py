"""``.pt2`` files: what ``torch.export.load`` gives computes what the network computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from support.networks import Words, model32
from support.quantizers import QUANTIZATION, quantized
from torch import Tensor, nn

from nncf_compactprune import prune
from nncf_compactprune.errors import ConfigError, ExportError
from nncf_compactprune.export import ExportOptions, export_model
from nncf_compactprune.run.pipeline import run
from nncf_compactprune.serving.benchmark import benchmark
from nncf_compactprune.serving.reference import TorchSide
from nncf_compactprune.serving.verify import verify_served

IMAGES = torch.randn(2, 3, 12, 12)
FRESH = """
import json, sys, torch
said = {"compactprune.json": ""}
module = torch.export.load(sys.argv[1], extra_files=said).module()
images = torch.load(sys.argv[2])
print(json.dumps([module(images)[0].tolist(), module(images[:1])[0].tolist(), said, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module", name="network")
def _network() -> nn.Module:
    model = model32("residual").eval()
    prune(model, IMAGES, budget={"macs": 0.5}, round_to=1)
    return model


def test_a_fresh_process_without_this_package_computes_the_same(network: nn.Module, tmp_path: Path) -> None:
    said = ExportOptions(labels=["cat", "dog"])
    (file,) = export_model(network, IMAGES, tmp_path / "net.pt2", input_names=["picture"], options=said)
    assert (file.label, file.verification.batch_sizes) == ("PT2 FP32", (2, 1))
    torch.save(IMAGES, tmp_path / "images")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, file.path, tmp_path / "images"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    both, one, extra, modules = json.loads(done.stdout.splitlines()[-1])
    assert not [name for name in modules if name.startswith(("nncf", "support"))]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(both), network(IMAGES))
        torch.testing.assert_close(torch.tensor(one), network(IMAGES[:1]))
    about = json.loads(extra["compactprune.json"])
    assert (about["input_names"], about["labels"]) == (["picture"], "cat\ndog")
    assert len(about["plan_sha256"]) == 64
    assert str(Path.cwd()).encode() not in file.path.read_bytes()


def test_it_is_verified_and_timed_as_served(network: nn.Module, tmp_path: Path) -> None:
    (file,) = export_model(network, IMAGES, tmp_path / "net.pt2")
    side = TorchSide(network, IMAGES)
    check = verify_served(file.path, side)
    assert check.passed
    layers = len(side.widths())
    assert (check.widths, check.batch_sizes, check.arithmetic) == ((layers, layers), (1, 2), "f32")
    assert verify_served(file.path, None, sample_size=(3, 12, 12)).passed
    (timed,) = benchmark([file.path], seconds=0.2, sample_size=(3, 12, 12)).timings
    assert timed.median_ms > 0

    other = model32("residual").eval()
    check = verify_served(file.path, TorchSide(other, IMAGES))
    assert check.widths is not None
    assert check.widths[0] < check.widths[1]
    assert any("widths differ" in problem for problem in check.problems)
    assert any("differs from torch" in problem for problem in check.problems)
    assert not any("Every single operation" in problem for problem in check.problems)  # none of them was looked at


def test_a_quantized_network_is_int8_in_torch_and_in_openvino(tmp_path: Path) -> None:
    model = quantized(model32("residual"), QUANTIZATION)
    (file,) = export_model(model, IMAGES, tmp_path, ["pt2"])
    assert (file.path.name, file.label) == ("model_int8.pt2", "PT2 INT8")
    assert verify_served(file.path, TorchSide(model, IMAGES)).arithmetic == "int8 + f32"
    converted = openvino.convert_model(torch.export.load(file.path))
    kinds = [node.get_type_name() for node in converted.get_ops()]
    assert "FakeQuantize" in kinds
    served = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(IMAGES.numpy())[0]
    with torch.no_grad():
        expected = model(IMAGES).numpy()
    assert np.abs(served - expected).max() < 0.05 * np.abs(expected).max()


def test_inputs_keep_their_types_and_names(tmp_path: Path) -> None:
    words = {"ids": torch.randint(0, 50, (2, 5)), "mask": torch.ones(2, 5)}
    (file,) = export_model(Words().eval(), words, tmp_path / "net.pt2")
    assert verify_served(file.path, None, sample_size=(5,)).passed
    program = torch.export.load(file.path)
    types = [one.meta["val"].dtype for one in program.graph.nodes if one.name in program.graph_signature.user_inputs]
    assert types == [torch.int64, torch.float32]


def test_a_branch_on_data_is_refused(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y if y.mean() > 0.1 else -y

    with pytest.raises(ExportError, match=r"torch\.export failed.*test_exported_program\.py"):
        export_model(Branch().eval(), IMAGES, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_a_run_refuses_formats_that_cannot_hold_its_network_before_it_trains(tmp_path: Path) -> None:
    config = {
        "model": "python:nncf_compactprune.run.networks.digits_net:digits_net",
        "dataset": "digits",
        "epochs": 1,
        "compression": [{"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}],
        "export": {"formats": ["onnx", "pt2"], "precisions": ["fp16"]},
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises((ConfigError, ExportError), match="PT2 has fp32, got 'fp16'"):
        run(config)
    assert not (tmp_path / "run").exists()
