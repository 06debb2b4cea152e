"""NNCF's scope grammar on channel groups: node names, ``{re}`` patterns, and torch's module names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import nn

from nncf_compactprune.channels import ChannelGraph, ChannelGroup
from nncf_compactprune.errors import ScopeError, nearest
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import operations

PATTERN = "{re}"


def prunable_groups(
    model: nn.Module,
    example_inputs: Any,
    graph: ChannelGraph,
    ignored: Sequence[str],
    target: Sequence[str] | None,
) -> list[bool]:
    """Which groups the scopes leave to prune.

    A scope names an operation as NNCF's graph does (``conv1/conv2d/0``), a module (``layer1.0.conv1``, or ``layer1``
    for all below it), or ``{re}`` and a pattern matched from the start of either. An ignored layer keeps its output
    channels; its input channels may still go with the layer before. A coupled group is ignored when one of its
    producers is, and targeted when one of them is.

    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not ignored and target is None:
        return [True] * len(graph.groups)
    names = _parameters_by_name(model, example_inputs, graph.parameters.keys())
    left_out = _matched(ignored, names, "ignored_scopes")
    chosen = None if target is None else _matched(target, names, "target_scopes")
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
) -> set[str]:
    """Which of the parameters the scopes leave, in the same grammar.

    :raises ScopeError: a scope matches nothing, or is no valid pattern.
    """
    if not ignored and target is None:
        return set(parameters)
    every = {name for name, _ in model.named_parameters()}
    names = _parameters_by_name(model, example_inputs, every)
    chosen = every if target is None else _matched(target, names, "target_scopes")
    return (chosen - _matched(ignored, names, "ignored_scopes")) & set(parameters)


def operations_by_parameter(model: nn.Module, example_inputs: Any) -> dict[str, list[str]]:
    """Names of the NNCF operations that each parameter goes into, in the order of execution."""
    result: dict[str, list[str]] = {}
    for node, constants in _nncf_nodes(model, example_inputs):
        for constant in constants:
            result.setdefault(constant, []).append(node)
    return result


def _produced_by(group: ChannelGroup) -> set[str]:
    return {member.parameter for member in group.members if member.role != "in"}


def _parameters_by_name(model: nn.Module, example_inputs: Any, parameters: Set[str]) -> dict[str, set[str]]:
    """Every name a scope may match, with the parameters behind it."""
    names: dict[str, set[str]] = {}
    for parameter in parameters:
        module = parameter
        while "." in module:
            module = module.rpartition(".")[0]
            names.setdefault(module, set()).add(parameter)
    for node, constants in _nncf_nodes(model, example_inputs):
        names.setdefault(node, set()).update(constants & parameters)
    return names


def _nncf_nodes(model: nn.Module, example_inputs: Any) -> Iterator[tuple[str, set[str]]]:
    """Name and constants of every node of NNCF's graph."""
    if isinstance(model, nn.Sequential):
        return  # a bare Sequential would run NNCF's hook storage as a layer; module names match it all the same
    with evaluating(model):
        yield from operations(model, example_inputs)


def _matched(scopes: Sequence[str], names: Mapping[str, set[str]], key: str) -> set[str]:
    matched: set[str] = set()
    for scope in scopes:
        if scope.startswith(PATTERN):
            try:
                pattern = re.compile(scope.removeprefix(PATTERN))
            except re.error as error:
                msg = f"{key}: '{scope}' is no valid regular expression: {error}."
                raise ScopeError(msg) from error
            found = [name for name in names if pattern.match(name)]
        else:
            found = [scope] if scope in names else []
        if not found:
            msg = (
                f"{key}: '{scope}' matches no operation and no module.{nearest(scope, names)} "
                "`nncf-compactprune inspect` lists the names."
            )
            raise ScopeError(msg)
        for name in found:
            matched |= names[name]
    return matched
