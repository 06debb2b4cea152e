"""Importing what a name points at: optional packages and a user's own functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from nncf_compactprune.errors import ResolveError, nearest

Value = TypeVar("Value")


def require_package(package: str, install: str) -> ModuleType:
    """Imports an optional package.

    :param package: import name, such as ``timm``.
    :param install: what to give to ``pip install`` when it is missing.
    :raises ResolveError: if it is not installed, or is installed and does not import.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        name = package.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            msg = f"{name} is not installed. Install it with: pip install '{install}'"
        else:
            msg = f"{name} is installed but does not import: {error}"
            if isinstance(error, RuntimeError):  # of torchvision's compiled part
                msg += ". Its build must match torch's: take both from the same index."
        raise ResolveError(msg) from error


def pick(kind: str, name: str, known: Mapping[str, Value]) -> Value:
    """Returns ``known[name]``.

    :param kind: what a name stands for, for the message ("model scheme").
    :param name: the name looked for.
    :param known: values by name.
    :raises ResolveError: naming the nearest known name and all of them.
    """
    if name in known:
        return known[name]
    msg = f"Unknown {kind} '{name}'.{nearest(name, known)} Known: {', '.join(sorted(known))}."
    raise ResolveError(msg)


def load_function(reference: str) -> Callable[..., Any]:
    """Returns the function named by ``module:function`` or ``path/file.py:function``.

    This runs the user's own module, so it is as trusted as the config that names it.

    :raises ResolveError: if the reference is malformed, the module does not import or has no such function.
    """
    where, separator, name = reference.rpartition(":")
    if not separator or not where or not name:
        msg = f"'python:{reference}' names no function. Write python:module:function or python:path/file.py:function."
        raise ResolveError(msg)
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        msg = f"{where} has no function '{name}'.{nearest(name, functions)}"
        raise ResolveError(msg)
    return function


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = f"Cannot import module '{name}': {error}. For a file, write python:path/file.py:function."
        raise ResolveError(msg) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        msg = f"No such file: {path}"
        raise ResolveError(msg)
    # Kept in sys.modules under a name of its own: dataclasses and pickling of its classes look there.
    name = f"_compactprune_{path.resolve().as_posix().strip('/').replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"Cannot import {path}."
        raise ResolveError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        msg = f"Cannot import {path}: {error}"
        raise ResolveError(msg) from error
    return module
