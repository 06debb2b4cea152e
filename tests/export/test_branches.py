"""A network that reads values of its input is refused, or its branch is in the file as a branch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import export_model
from nncf_compactprune.serving import open_server
from nncf_compactprune.serving.departure import relative_error

EXAMPLE = torch.rand(2, 3, 8, 8)
OTHER_SIDE = torch.full((2, 3, 8, 8), -3.0)


class Backbone(nn.Module):
    """A small ConvNet; subclasses decide what happens between its convolution and its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)
        nn.init.ones_(self.conv.weight)  # so that positive inputs take one side, negative ones the other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 3:  # reads a size, which is the same for every input of this shape
            msg = "expected three channels"
            raise ValueError(msg)
        return self.head(self.between(torch.relu(self.conv(x))).mean((2, 3)))

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y


class Halved(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if bool(y.mean() > 0.1):
            y = y * 0.5
        return y


class Branching(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Halved()

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return self.gate(y)


class ReadsNumber(Backbone):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return y / (1 + y.max().item())


class Checks(Backbone):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        assert y.min() >= 0
        return y


class Where(Backbone):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y.mean() > 0.1, y * 0.5, y)


class Guarded(Backbone):
    """As transformers' masks: a shortcut that is no part of a trace."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing() and bool(y.max() <= 0):
            return y
        return y * 0.5


class Scripted(Branching):
    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(DeprecationWarning, match="script"):
            self.gate = torch.jit.script(Halved())


class Cond(Backbone):
    def between(self, y: torch.Tensor) -> torch.Tensor:
        return torch.cond(y.mean() > 0.1, lambda t: t * 0.5, lambda t: t.clone(), (y,))


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_branch_on_values_is_refused_with_module_and_line(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"module 'gate' reads a value .*test_branches.py:\d+ .`if bool\(y.mean"
    ) as info:
        export_model(Branching(), EXAMPLE, tmp_path / f"m{suffix}")
    assert "torch.where" in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_number_that_a_trace_would_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the model reads a value .*`return y / \(1 \+ y.max"):
        export_model(ReadsNumber(), EXAMPLE, tmp_path / "m.xml")


@pytest.mark.parametrize(
    ("network", "suffix"),
    [(Backbone, ".xml"), (Checks, ".xml"), (Where, ".xml"), (Where, ".onnx"), (Scripted, ".xml"), (Cond, ".onnx")],
)
def test_what_is_exported_computes_both_sides(network: type[nn.Module], suffix: str, tmp_path: Path) -> None:
    model = network().eval()
    export_model(model, EXAMPLE, tmp_path / f"m{suffix}")
    server = open_server(tmp_path / f"m{suffix}")
    for images in (EXAMPLE, OTHER_SIDE):
        with torch.no_grad():
            expected = model(images).numpy()
        # bfloat16, where the CPU has it
        assert relative_error(expected, server.run([images.numpy()])[0]) < 2e-2


def quantized(model: nn.Module) -> nn.Module:
    config = {"input_info": {"sample_size": list(EXAMPLE.shape)}, "compression": {"algorithm": "quantization"}}
    controller, _ = create_compressed_model(model, config, [(EXAMPLE, torch.zeros(2))])
    return controller.strip()


def test_a_branch_is_found_below_the_hooks_of_a_quantized_network(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"module 'gate' reads a value .*test_branches.py:\d+ .`if bool\(y.mean"):
        export_model(quantized(Branching()), EXAMPLE, tmp_path / "m.xml")


def test_a_read_that_no_trace_holds_is_none_in_a_quantized_network(tmp_path: Path) -> None:
    """Sizes are warned of, in the same line of NNCF's hooks. OpenVINO's last quantizer multiplies by 0.5, too."""
    (file,) = export_model(quantized(Guarded()), EXAMPLE, tmp_path / "m.xml")
    assert file.precision == "int8"
