"""Only the host room reaches into the internals of NNCF, torch and transformers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.places import ROOT

PACKAGE = ROOT / "nncf_compactprune"
HOSTS = ("torch", "nncf", "transformers", "accelerate")
#: what torch's modules keep for themselves
PRIVATE = {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_forward_hooks", "_forward_pre_hooks"}
#: names with an underscore that are no reach: torch's operators and the overload they are of
OPERATORS = ("torch.ops.", "_aten.", "aten.")


def is_private(text: str, attribute: str) -> bool:
    private = attribute.startswith("_") and not attribute.startswith("__")
    return private and text.startswith((*(f"{host}." for host in HOSTS), "nn.")) and not text.startswith(OPERATORS)


def reaches(source: str) -> Iterator[str]:
    """Every private module, private attribute of a host and NNCF torch module that a file takes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = [alias.name for alias in node.names]
            for module in modules:
                if module.split(".")[0] not in HOSTS:
                    continue
                private = any(part.startswith("_") for part in (*module.split("."), *names))
                if private or module.startswith("nncf.torch"):
                    yield f"import of {module}"
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if (node.attr in PRIVATE and text != f"self.{node.attr}") or is_private(text, node.attr):
                yield text


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "host"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_other_rooms_stay_outside(path: Path) -> None:
    assert list(reaches(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch.utils._pytree import tree_map", "import of torch.utils._pytree"),
        ("import torch.utils._pytree as tree", "import of torch.utils._pytree"),
        ("from torch.nn.modules.conv import _ConvNd", "import of torch.nn.modules.conv"),
        ("from nncf.torch.function_hook import wrap_model", "import of nncf.torch.function_hook"),
        ("module._parameters['weight']", "module._parameters"),
        ("torch._C.DisableTorchFunction()", "torch._C"),
        ("isinstance(m, nn.modules.conv._ConvNd)", "nn.modules.conv._ConvNd"),
    ],
)
def test_a_reach_is_seen(source: str, found: str) -> None:
    assert found in list(reaches(source))


def test_the_host_room_does_reach() -> None:
    """Else the rule above would hold for nothing."""
    assert sum(len(list(reaches(path.read_text(encoding="utf-8")))) for path in (PACKAGE / "host").glob("*.py")) > 10
