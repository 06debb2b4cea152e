"""What rules share: the registry, and reading an operation's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


Rule = Callable[["Tracer", Any, Sequence[Any], Mapping[str, Any], Any], None]


RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operations (``"aten.cat"``, or one overload: ``"aten.mean.dim"``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if name == "pointwise" else f"aten.{name}"] = function
        return function

    return register


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any = None) -> Any:
    """An operation's argument, given by position or by keyword.

    :param args: the operation's positional arguments.
    :param kwargs: its keyword arguments.
    :param index: the argument's position.
    :param name: the argument's name.
    :param default: its value where it was not given.
    """
    return args[index] if len(args) > index else kwargs.get(name, default)


def named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """An operation's argument as its own schema places it, its default included; None where it has no such argument.

    :param func: the operation.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param name: the argument's name in the schema.
    """
    place = _place(func, name)
    return None if place is None else argument(args, kwargs, *place)


@functools.cache
def _place(func: Any, name: str) -> tuple[int, str, Any] | None:
    for index, said in enumerate(func._schema.arguments):
        if said.name == name:
            return index, name, said.default_value
    return None


def dims_of(value: Any, rank: int) -> list[int]:
    """Normalises a dim argument to non-negative dims.

    :param value: one dimension, a list of them, or None for all; negative ones count from the end.
    :param rank: number of dimensions.
    """
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v % rank if rank else 0 for v in values]


@functools.cache
def name_of(func: Any) -> str:
    """``aten.mean`` for any overload."""
    return str(func.overloadpacket)
