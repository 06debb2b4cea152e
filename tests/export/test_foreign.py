"""Other people's exporters: silent while they succeed, quoted when they fail."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.places import ROOT
from torch import Tensor, nn
from torch._higher_order_ops import scan

from nncf_compactprune import ExportError, export_model
from nncf_compactprune.export.foreign import conversion_reason

WITHOUT_TORCHVISION = """
    import importlib.util, sys
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *more: None if name == "torchvision" else real(name, *more)
    sys.modules["torchvision"] = None
"""
WITH_TORCHVISION = f"""
    import sys
    sys.path.insert(0, {str(ROOT / "examples" / "benchmarks")!r})
    from timm_import import let_torchvision_import
    let_torchvision_import()
"""
EXPORT = """
    import torch
    from torch import nn
    from nncf_compactprune import export_model
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    print("only this", len(export_model(net, torch.randn(2, 3, 8, 8), sys.argv[1])), flush=True)
"""


@torch.library.custom_op("compactprune_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


class Scanned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = scan(lambda sums, row: (sums + row, sums * row), x[:, 0], x.transpose(0, 1))[1]
        return result


def test_a_network_that_cannot_be_watched_is_told_why_its_export_failed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="torch's ONNX exporter failed: "):
        export_model(Scanned(), torch.rand(2, 3, 4), tmp_path / "m.onnx")


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


class Talking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("a word from the model")
        logging.getLogger("torch.onnx").warning("a word from the exporter")
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize(
    "start",
    [pytest.param(WITHOUT_TORCHVISION, marks=pytest.mark.slow), WITH_TORCHVISION],
    ids=["without", "with"],
)
def test_a_good_export_prints_nothing(start: str, tmp_path: Path) -> None:
    code = textwrap.dedent(start) + textwrap.dedent(EXPORT)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == "only this 4\n"


@pytest.mark.parametrize(
    ("layer", "suffix", "operation"),
    [
        (Twice, ".onnx", r"DispatchError: No ONNX function found for .*compactprune_test\.twice"),
        (Twice, ".xml", r"OpConversionFailure: No conversion rule found for operations: compactprune_test::twice"),
        (Eigenvalues, ".onnx", r"No ONNX function found for .*aten\.linalg_eig'"),
        (Eigenvalues, ".xml", "operations: aten::linalg_eigvals"),
    ],
)
def test_an_error_names_the_operation_and_its_module(
    layer: type[nn.Module], suffix: str, operation: str, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer()))
    with pytest.raises(ExportError, match=rf"{operation}.*Module '1\.0' runs it\."):
        export_model(net, torch.randn(2, 4, 4), tmp_path / f"net{suffix}")
    assert not any(tmp_path.iterdir())


def test_a_failed_export_quotes_what_was_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match=r"linalg_eig(?s:.*)It said:(?s:.*)a word from the exporter"):
        export_model(Talking(), torch.randn(2, 4, 4), tmp_path / "net.onnx")
    printed = capfd.readouterr()
    assert "a word from the exporter" not in printed.out + printed.err
    handlers = [handler for handler in logging.getLogger("torch.onnx").handlers if handler.filters]
    assert not handlers


def test_a_cause_keeps_its_line_beside_the_operation() -> None:
    inner = RuntimeError("sizes do not fit\nadvice")
    outer = ValueError("pages of advice\nError when translating node target=torch.ops.aten.addmm.default(x)")
    outer.__cause__ = inner
    reason = "RuntimeError: sizes do not fit (Error when translating node target=torch.ops.aten.addmm.default(x))"
    assert conversion_reason(outer) == reason
    assert conversion_reason(inner) == "RuntimeError: sizes do not fit"
    checks = RuntimeError("Check 'false' failed at src/x.cpp:1:\nFrontEnd API failed\n-- No rule for: aten::istft\n")
    assert re.fullmatch("RuntimeError: No rule for: aten::istft", conversion_reason(checks))
    follows = RuntimeError("Check 'false' failed\n-- prim::Constant with a message:\n-- No rule for: aten::istft\n")
    assert conversion_reason(follows) == "RuntimeError: No rule for: aten::istft"
