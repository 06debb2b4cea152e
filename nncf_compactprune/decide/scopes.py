"""NNCF's scope grammar, read in one way for groups of channels, parameters and operations.

A scope names an operation as NNCF's graph does (``conv1/conv2d/0``), a module (``layer1.0.conv1``, or ``layer1`` for
all below it), or ``{re}`` and a pattern that is matched from the start of either. Names of NNCF 2.x
(``ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0``) are understood too, see :mod:`.nncf2_names`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nncf_compactprune.channels import ChannelGraph, ChannelGroup
from nncf_compactprune.decide.nncf2_names import OldNames
from nncf_compactprune.errors import ScopeError, nearest
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import Operation, operations
from nncf_compactprune.host.tensors import model_tensors

PATTERN = "{re}"


@dataclass
class Found:
    """What is behind a name.

    :param tensors: parameters and buffers, by name.
    :param operations: NNCF's names of operations.
    :param module: of an operation, the module that it runs in.
    """

    tensors: set[str] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)
    module: str = ""


@dataclass(frozen=True)
class ScopeRules:
    """How scopes are read.

    :param nncf2: patterns are searched for in NNCF 2.x's names, as NNCF 2.x did, beside today's names. Else these are
        looked at only where a scope fits no name of today.
    :param validate: a scope that matches nothing is a mistake.
    :param within: the section of the entry that gives the scopes, and a dot, for messages.
    """

    nncf2: bool = False
    validate: bool = True
    within: str = ""


def prunable_groups(
    model: nn.Module,
    example_inputs: Any,
    graph: ChannelGraph,
    ignored: Sequence[str],
    target: Sequence[str] | None,
    rules: ScopeRules = ScopeRules(),
) -> list[bool]:
    """Which groups of channels the scopes leave to prune.

    An ignored layer keeps its output channels; its input channels may still go with the layer before. A coupled group
    is ignored when one of its producers is, and targeted when one of them is.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param graph: of the model.
    :param ignored: scopes that are left out.
    :param target: scopes that are meant, or None for all.
    :param rules: how scopes are read.
    :return: one entry for each group of the graph.
    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not ignored and target is None:
        return [True] * len(graph.groups)
    left_out, chosen = _tensors(model, names_of(model, example_inputs), ignored, target, rules)
    return [
        not (left_out & produced) and (chosen is None or bool(chosen & produced))
        for produced in (_produced_by(group) for group in graph.groups)
    ]


def parameters_in_scope(
    model: nn.Module,
    example_inputs: Any,
    parameters: Collection[str],
    ignored: Sequence[str],
    target: Sequence[str] | None,
    rules: ScopeRules = ScopeRules(),
) -> set[str]:
    """Which of the parameters the scopes leave.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param parameters: names to choose from.
    :param ignored: scopes that are left out.
    :param target: scopes that are meant, or None for all.
    :param rules: how scopes are read.
    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not ignored and target is None:
        return set(parameters)
    left_out, chosen = _tensors(model, names_of(model, example_inputs), ignored, target, rules)
    return {p for p in parameters if p not in left_out and (chosen is None or p in chosen)}


def operations_out_of_scope(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[str],
    target: Sequence[str] | None,
    rules: ScopeRules = ScopeRules(),
) -> set[str]:
    """NNCF's names of the operations that the scopes leave out.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param ignored: scopes that are left out.
    :param target: scopes that are meant, or None for all.
    :param rules: how scopes are read.
    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not ignored and target is None:
        return set()
    names = names_of(model, example_inputs)
    look_up = _LookUp(model, names, rules)
    left_out = look_up(ignored, "ignored_scopes").operations
    if target is None:
        return left_out
    every = {operation for found in names.values() for operation in found.operations}
    return left_out | (every - look_up(target, "target_scopes").operations)


def operations_by_scope(
    model: nn.Module, example_inputs: Any, scopes: Collection[str], key: str, rules: ScopeRules = ScopeRules()
) -> dict[str, set[str]]:
    """NNCF's names of the operations that each scope means.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param scopes: as the configuration gives them.
    :param key: which key gives them, for messages.
    :param rules: how scopes are read.
    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not scopes:
        return {}
    look_up = _LookUp(model, names_of(model, example_inputs), rules)
    return {scope: look_up([scope], key).operations for scope in scopes}


def operations_by_parameter(model: nn.Module, example_inputs: Any) -> dict[str, list[str]]:
    """Names of the NNCF operations that each parameter goes into, in the order of execution.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    """
    result: dict[str, list[str]] = {}
    for operation, found in _nncf_operations(model, example_inputs).items():
        for parameter in found.parameters:
            result.setdefault(parameter, []).append(operation)
    return result


def layers_by_operation(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """The layer whose own weight each NNCF operation uses, of the operations that use one.

    An operation's name does not say it: NNCF builds names from the modules that are called, so layers in a
    ``ModuleList`` lose a part of theirs, and those in different lists have the same name but for its number.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    """
    return {
        operation: parameter.removesuffix(".weight")
        for operation, found in _nncf_operations(model, example_inputs).items()
        for parameter in found.parameters
        if parameter.endswith(".weight")
    }


def names_of(model: nn.Module, example_inputs: Any) -> dict[str, Found]:
    """Every name that a scope may match, with what is behind it.

    :param model: the network.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    """
    tensors = model_tensors(model)
    own = {name: name for name, _ in tensors.named()} | tensors.tied
    names: dict[str, Found] = {}
    for name, first_name in own.items():
        for module in _containers(name.rpartition(".")[0]):
            names.setdefault(module, Found()).tensors.add(first_name)
    for operation, found in _nncf_operations(model, example_inputs).items():
        used = {name for name in found.parameters if name in own}
        names[operation] = Found({own[name] for name in used}, {operation}, found.module)
        for module in {name.rpartition(".")[0] for name in used} or {found.module}:
            for container in _containers(module):
                names.setdefault(container, Found()).operations.add(operation)
    return names


def _containers(module: str) -> list[str]:
    """A module's name and those of the modules around it, the model itself left out."""
    parts = module.split(".") if module else []
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _produced_by(group: ChannelGroup) -> set[str]:
    return {member.parameter for member in group.members if member.role != "consumer"}


def _nncf_operations(model: nn.Module, example_inputs: Any) -> dict[str, Operation]:
    """The operations of NNCF's graph by name, in the order of execution."""
    if isinstance(model, nn.Sequential):
        return {}  # a bare Sequential would run NNCF's hook storage as a layer; module names match it all the same
    with evaluating(model):
        # inputs, outputs and parameters are nodes as well, but only operations have a path
        return {found.name: found for found in operations(model, example_inputs) if "/" in found.name}


def _tensors(
    model: nn.Module,
    names: Mapping[str, Found],
    ignored: Sequence[str],
    target: Sequence[str] | None,
    rules: ScopeRules,
) -> tuple[set[str], set[str] | None]:
    look_up = _LookUp(model, names, rules)
    chosen = None if target is None else look_up(target, "target_scopes").tensors
    return look_up(ignored, "ignored_scopes").tensors, chosen


class _LookUp:
    """Finds what scopes mean among the names of one model."""

    def __init__(self, model: nn.Module, names: Mapping[str, Found], rules: ScopeRules) -> None:
        self._names = names
        self._rules = rules
        self._old = OldNames(model, {name: found.module for name, found in names.items()})

    def __call__(self, scopes: Sequence[str], key: str) -> Found:
        """
        :param scopes: as the configuration gives them.
        :param key: which key, for messages.
        :raises ScopeError: a scope matches nothing, or is no valid pattern.
        """
        matched, missed, key = Found(), [], f"{self._rules.within}{key}"
        for scope in scopes:
            hits = self._hits(scope, key)
            if not hits:
                missed.append(f"{key}: '{scope}' matches no operation and no module.{nearest(scope, self._names)}")
            for name in hits:
                matched.tensors |= self._names[name].tensors
                matched.operations |= self._names[name].operations
        if missed and self._rules.validate:
            raise ScopeError(" ".join([*missed, "`nncf-compactprune inspect` lists the names."]))
        return matched

    def _hits(self, scope: str, key: str) -> Collection[str]:
        if not scope.startswith(PATTERN):
            return [scope] if scope in self._names else self._old.named(scope)
        text = scope.removeprefix(PATTERN)
        try:
            pattern = re.compile(text)
        except re.error as error:
            msg = f"{key}: '{scope}' is no valid regular expression: {error}."
            raise ScopeError(msg) from error
        hits = {name for name in self._names if pattern.match(name)}
        if self._rules.nncf2 or not hits:
            hits |= self._old.matching(text)
        return hits
