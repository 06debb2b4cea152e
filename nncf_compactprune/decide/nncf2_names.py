"""NNCF 2.x's names of modules and operations, for the modules and operations of a model of today.

NNCF 2.x named an operation by the classes and attributes of the modules that it runs in, from the outermost inwards,
and the function with a running number: ``ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0``. Layers
that it replaced have ``NNCF`` before their class. Today's name of the same operation is ``layer1/0/conv1/conv2d/0``.

Class names change between versions of the libraries that define networks. A scope that fits no name is tried again with
the attributes alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

#: layers that NNCF 2.x replaced by its own
_REPLACED = tuple(
    [f"{kind}{dims}d" for kind in ("Conv", "ConvTranspose", "BatchNorm") for dims in (1, 2, 3)]
    + ["Linear", "GroupNorm", "LayerNorm", "Embedding", "EmbeddingBag"]
)
#: never called themselves: some versions left them out of the path
_NOT_CALLED = ("ModuleList", "ModuleDict")
#: functions whose operators have another name
_OPERATORS = {"div": "truediv", "true_divide": "truediv", "floor_divide": "floordiv", "truediv": "div"}
_ELEMENT = re.compile(r"(\w+)(?:\[([^\[\]/]*)\])?")
_CALL = re.compile(r"(\w+)_(\d+)")
#: in a pattern: the class before an attribute in brackets, and the outermost class
_CLASS_IN_PATTERN = re.compile(r"\w+(?=\\\[)")
_ROOT_IN_PATTERN = re.compile(r"^(\^?)\w+(?=/)")


@dataclass(frozen=True)
class _Place:
    """A module, or a function that runs in it.

    :param number: how often the function ran in the module before.
    """

    module: str
    function: str = ""
    number: int = 0


class OldNames:
    """What the names of a model were in NNCF 2.x.

    :param model: the network.
    :param names: today's names of modules and of operations, these in the order of execution, each with the module that
        it runs in.
    """

    def __init__(self, model: nn.Module, names: Mapping[str, str]) -> None:
        self._modules = dict(model.named_modules())
        self._names = names

    def named(self, scope: str) -> set[str]:
        """Today's names for one of NNCF 2.x's; empty where there is none.

        :param scope: with or without the operation at its end.
        """
        return self._by_old.get(scope, set()) or self._by_attributes(scope)

    def matching(self, pattern: str) -> set[str]:
        """Today's names for those of NNCF 2.x in which a pattern is found, anywhere, as NNCF 2.x searched.

        :param pattern: a regular expression.
        """
        loose = _ROOT_IN_PATTERN.sub(r"\1\\w+", _CLASS_IN_PATTERN.sub(r"\\w+", pattern))
        for expression in dict.fromkeys((pattern, loose)):
            found = re.compile(expression)
            hits = [names for old, names in self._by_old.items() if found.search(old)]
            if hits:
                return set().union(*hits)
        return set()

    @cached_property
    def _by_old(self) -> dict[str, set[str]]:
        result: dict[str, set[str]] = {}
        for name, place in self._places.items():
            for old in self._old(place):
                result.setdefault(old, set()).add(name)
        return result

    def _old(self, place: _Place) -> Iterator[str]:
        """Every form that a name had."""
        for path in self._paths(place.module):
            if not place.function:
                yield path
            for form in _forms(place.function) if place.function else []:
                yield f"{path}/{form}_{place.number}"

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Where each name of today is. Today's name can miss parts of the way to a module, and then counts the
        operations of several modules together."""
        result, seen = {}, Counter[tuple[str, str]]()
        for name, module in self._names.items():
            if "/" not in name:
                result[name] = _Place(name)
                continue
            function = name.split("/")[-2]
            result[name] = _Place(module, function, seen[module, function])
            seen[module, function] += 1
        return result

    def _paths(self, module: str) -> Iterator[str]:
        """The module's path with and without ``NNCF`` before a replaced layer and modules that are never called."""
        elements = [[type(self._modules[""]).__name__]]
        steps = module.split(".") if module else []
        for depth, step in enumerate(steps):
            at = self._modules.get(".".join(steps[: depth + 1]))
            if at is None:
                return
            kind = type(at).__name__
            forms = [f"{kind}[{step}]"]
            if kind in _REPLACED:
                forms.append(f"NNCF{kind}[{step}]")
            if kind in _NOT_CALLED:
                forms.append("")
            elements.append(forms)
        paths = [""]
        for forms in elements:
            paths = [f"{path}/{form}" if form else path for path in paths for form in forms]
        yield from (path.removeprefix("/") for path in paths)

    def _by_attributes(self, scope: str) -> set[str]:
        """By the attributes in the brackets alone, whatever the classes are."""
        steps = scope.split("/")
        call = _CALL.fullmatch(steps[-1]) if len(steps) > 1 else None
        matches = [_ELEMENT.fullmatch(step) for step in (steps[1:-1] if call else steps[1:])]
        attributes = [match[2] for match in matches if match is not None and match[2] is not None]
        if len(steps) < 2 or len(attributes) < len(matches):
            return set()
        module = ".".join(attributes)
        if call is None:
            return {module} & set(self._names)
        return {
            name
            for name, place in self._places.items()
            if place.module == module
            and place.function
            and call[1] in _forms(place.function)
            and call[2] == str(place.number)
        }


def _forms(function: str) -> list[str]:
    """Names that NNCF 2.x may have given to a function: as an operator, in place, or as it is.

    >>> _forms("add_")
    ['add_', 'add', '__add__', '__iadd__', '__radd__']
    >>> _forms("div")[-3:]
    ['__truediv__', '__itruediv__', '__rtruediv__']

    :param function: today's name of it.
    """
    plain = function.strip("_")
    forms = [function, plain, f"{plain}_"]
    for word in (plain, *([_OPERATORS[plain]] if plain in _OPERATORS else [])):
        forms += [f"__{word}__", f"__i{word}__", f"__r{word}__"]
    return list(dict.fromkeys(forms))
