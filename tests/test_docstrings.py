"""Public functions of two or more parameters say what each parameter is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nncf_compactprune

PACKAGE = Path(nncf_compactprune.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# A protocol says what these parameters are: torch's forward, an OpRule, a FactsFn, Hugging Face's and Lightning's
# callbacks, and methods that override a documented one without a docstring of their own.
PROTOCOLS = (("tracer", "func", "args", "kwargs", "out"), ("module", "shapes"))
CALLBACK_PREFIX = "on_"
# typer shows docstrings as help, and has a text for each parameter: tests/test_cli.py asks for those.
COMMAND = "app.command"


def undocumented(source: str) -> list[str]:
    """The parameters that no ``:param`` names, and the names that no parameter has, as ``"line function: names"``."""
    return [
        f"{function.lineno} {function.name}: {', '.join(wrong)}"
        for function in _public_functions(ast.parse(source))
        if (wrong := [*_missing(function), *_unknown(function)])
    ]


def _public_functions(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for node in scope.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def _names(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [star for star in (arguments.vararg, arguments.kwarg) if star is not None]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


def _unknown(function: ast.FunctionDef) -> list[str]:
    documented = re.findall(r":param (\w+):", ast.get_docstring(function) or "")
    return [f"no {name}" for name in documented if name not in _names(function)]


def _missing(function: ast.FunctionDef) -> list[str]:
    names = _names(function)
    text = ast.get_docstring(function)
    command = any(ast.unparse(decorator).startswith(COMMAND) for decorator in function.decorator_list)
    exempt = text is None or command or function.name == "forward" or function.name.startswith(CALLBACK_PREFIX)
    if len(names) < 2 or exempt or tuple(names) in PROTOCOLS:
        return []
    return [name for name in names if f":param {name}:" not in (text or "")]


@pytest.mark.parametrize("file", FILES)
def test_every_parameter_is_documented(file: str) -> None:
    assert not undocumented((PACKAGE / file).read_text(encoding="utf-8"))


def test_a_missing_parameter_is_found() -> None:
    source = 'class A:\n    def f(self, x, *, y):\n        """Does it.\n\n        :param x: a number.\n        """\n'
    assert undocumented(source) == ["2 f: y"]
    assert not undocumented(source.replace("a number.", "a number.\n        :param y: another."))


def test_a_name_that_no_parameter_has_is_found() -> None:
    assert undocumented('def f(x):\n    """Does it.\n\n    :param z: a number.\n    """\n') == ["1 f: no z"]
