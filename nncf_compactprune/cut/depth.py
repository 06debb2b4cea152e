"""Which residual branches may go as a whole, found and tried out.

A branch may go where groups of channels lie in it altogether: with the last of these channels its layers compute
nothing that depends on the input. What its last layers would still add (a bias, the shift of a BatchNorm) goes too: in
the masked model every parameter of the branch is zero, and the block is its shortcut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_compactprune.channels.branches import Branch, NoBranchError, branches_of, shortcut
from nncf_compactprune.channels.groups import ChannelGraph, ChannelGroup, owner
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.transaction import for_a_while
from nncf_compactprune.errors import PlanError, SelfCheckError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import model_tensors, named_modules
from nncf_compactprune.host.torch_internals import results_of, tree_map
from nncf_compactprune.plan import make_plan
from nncf_compactprune.plugins import Plugins

IN_NO_BRANCH = "no residual branch holds all of its layers"

Found = dict[Branch, list[int]]


def with_branches(
    model: nn.Module, graph: ChannelGraph, example_inputs: Any, plugins: Plugins | None = None
) -> ChannelGraph:
    """The same channels, and which of them may go to none, together with the residual branch that they lie in.

    :param model: dense; it is run and cut on trial, and left as it was.
    :param graph: its channels.
    :param example_inputs: as the model is called.
    :param plugins: where facts of modules come from; the installed plugins by default.
    :return: with :attr:`~nncf_compactprune.channels.groups.ChannelGraph.branches`, and the reason for every group that
        is in none.
    """
    found, reasons = _found(model, graph)
    refused = _refused(model, list(found), example_inputs)
    good = {branch: tuple(groups) for branch, groups in found.items() if branch not in refused}
    reasons |= {group: reason for branch, reason in refused.items() for group in found[branch]}
    if good:
        tried = _with(graph, good, reasons)
        keep = [np.full(group.size, index not in tried.in_branches) for index, group in enumerate(graph.groups)]
        try:
            prune_in_place(model, make_plan(tried, keep), example_inputs, plugins=plugins, dry_run=True)
        except (PlanError, SelfCheckError) as error:
            reasons |= dict.fromkeys(tried.in_branches, f"the network does not run without its branches: {error}")
            good = {}
    return _with(graph, good, reasons)


def _with(graph: ChannelGraph, branches: Mapping[Branch, tuple[int, ...]], reasons: Mapping[int, str]) -> ChannelGraph:
    return dataclasses.replace(
        graph, branches=branches, keep_one=dict(sorted(reasons.items())), cost=graph.cost.with_branches(branches)
    )


def _found(model: nn.Module, graph: ChannelGraph) -> tuple[Found, dict[int, str]]:
    """Branches with the groups that lie in them, and why the other groups lie in none."""
    modules = dict(named_modules(model))
    options: dict[str, list[Branch] | NoBranchError] = {}
    found: Found = {}
    reasons: dict[int, str] = {}
    for index, group in enumerate(graph.groups):
        reason = ""
        for block in _around(group):
            if block not in options:
                options[block] = _options(block, modules[block])
            here = options[block]
            if isinstance(here, NoBranchError):
                reason = reason or f"{here} in '{block}'"
                continue
            branch = next((one for one in here if all(one.owns(m.parameter) for m in group.members)), None)
            if branch is not None:
                found.setdefault(branch, []).append(index)
                break
        else:
            reasons[index] = reason or IN_NO_BRANCH
    for branch, groups in list(found.items()):
        reason = _shared(branch, graph) or _taken(branch, found, modules[branch.block])
        if reason:
            del found[branch]
            reasons |= dict.fromkeys(groups, reason)
    return found, reasons


def _around(group: ChannelGroup) -> list[str]:
    """Modules that hold all layers of a group, inner ones first, the model itself left out."""
    paths = [owner(member.parameter).split(".") for member in group.members]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    return [".".join(paths[0][:length]) for length in range(shared, 0, -1)]


def _options(name: str, block: nn.Module) -> list[Branch] | NoBranchError:
    if isinstance(block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return []
    try:
        return [Branch(name, layers) for layers in branches_of(block)]
    except NoBranchError as error:
        return error


def _shared(branch: Branch, graph: ChannelGraph) -> str:
    both = next((names for names in graph.tied.items() if any(map(branch.owns, names))), None)
    return f"'{both[0]}' and '{both[1]}' are one weight" if both else ""


def _taken(branch: Branch, found: Found, block: nn.Module) -> str:
    """Two branches that are added to each other do not both go: the earlier one may."""
    for other in found:
        if other is branch:
            break
        if other.block == branch.block:
            try:
                shortcut(shortcut(block, other.layers), branch.layers)
            except NoBranchError:
                return f"the other operand of its addition, {other}, may go"
    return ""


def _refused(model: nn.Module, branches: Sequence[Branch], example_inputs: Any) -> dict[Branch, str]:
    """Branches without which their block computes something else than with zeros for all their parameters."""
    modules, parameters = dict(named_modules(model)), model_tensors(model).parameters
    refused: dict[Branch, str] = {}
    ran: set[Branch] = set()

    def compare(branch: Branch) -> Any:
        busy = False

        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:  # before it runs: it may write into its input
            nonlocal busy
            if busy or branch in refused:
                return
            busy = True
            ran.add(branch)
            try:
                without = shortcut(block, branch.layers)
                with for_a_while() as log:
                    for name, parameter in parameters.items():
                        if branch.owns(name):
                            log.set_data(parameter, torch.zeros_like(parameter.data))
                    expected = block(*_copies(args), **_copies(kwargs))
                    actual = without(*_copies(args), **_copies(kwargs))
                if not _equal(expected, actual):
                    refused[branch] = f"{branch} with zeros for weights is not the shortcut alone"
            except NoBranchError as error:
                refused[branch] = str(error)
            finally:
                busy = False

        return hook

    handles = [
        modules[branch.block].register_forward_pre_hook(compare(branch), with_kwargs=True) for branch in branches
    ]
    try:
        with evaluating(model, example_inputs):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return refused | {branch: f"'{branch.block}' does not run" for branch in branches if branch not in ran}


def _copies(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def _equal(expected: Any, actual: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results_of(expected), results_of(actual), strict=True))
