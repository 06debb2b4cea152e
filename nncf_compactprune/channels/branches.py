"""Residual branches that may go as a whole: where a block adds one to its shortcut, and the block without it.

``torch.fx`` records a block's own ``forward``, its children as single steps. At an addition, everything that only leads
to one operand is a branch. Without it the addition is its other operand, and the block becomes its shortcut, with what
follows the addition: a ``torch.fx.GraphModule`` that holds the children which are left, under their names.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from nncf_compactprune.errors import first_line
from nncf_compactprune.host.tensors import named_modules, own_tensors, share_hooks

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    :param block: name of the module whose code adds it to the shortcut.
    :param layers: names in the block of its children and parameters that only the branch uses.
    """

    block: str
    layers: tuple[str, ...]

    def owns(self, name: str) -> bool:
        """Whether a module, parameter or buffer belongs to the branch.

        :param name: as in the whole model.
        """
        return any(name == part or name.startswith(f"{part}.") for part in self.parts)

    @property
    def parts(self) -> list[str]:
        """Names of the layers in the whole model."""
        return [f"{self.block}.{layer}" for layer in self.layers]

    def __str__(self) -> str:
        return f"{self.block} ({', '.join(self.layers)})"


class NoBranchError(Exception):
    """Why a block has no branch that could go, in words."""


def branches_of(block: nn.Module) -> list[tuple[str, ...]]:
    """The layers of every branch that a block's own code adds to something else.

    :param block: any module.
    :raises NoBranchError: its code cannot be recorded.
    """
    graph = _recorded(block)
    return [layers for _, _, layers in _branches(graph, block)]


def shortcut(block: nn.Module, layers: Sequence[str]) -> nn.Module:
    """The block without one of its branches. What is left of its children is shared with it.

    :param block: it is left as it is.
    :param layers: of the branch, see :class:`Branch`.
    :return: a module that computes what the block does where the branch gives zeros. It writes nothing in place, as
        what it gets may be the shortcut itself.
    :raises NoBranchError: the block has no such branch.
    """
    graph = _recorded(block)
    for node, operand, found in _branches(graph, block):
        if found != tuple(layers):
            continue
        gone = _only_for(graph, node, operand)
        node.replace_all_uses_with(next(other for other in node.all_input_nodes if other is not operand))
        graph.erase_node(node)
        for one in reversed(gone):
            graph.erase_node(one)
        return _module(block, graph, layers)
    msg = f"{type(block).__name__} adds no branch of the layers {', '.join(layers)} to a shortcut"
    raise NoBranchError(msg)


class _OwnForward(fx.Tracer):
    """Records a module's own code."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _recorded(block: nn.Module) -> fx.Graph:
    """The steps of a block, the same in training as in evaluation."""
    before, steps = block.training, []
    try:
        for training in (True, False):
            block.training = training
            graph = _OwnForward().trace(block)
            steps.append(str(graph))
    except Exception as error:
        said = first_line(error) or type(error).__name__
        msg = f"the code of {type(block).__name__} cannot be recorded ({said})"
        raise NoBranchError(msg) from error
    finally:
        block.training = before
    if steps[0] != steps[1]:
        msg = f"{type(block).__name__} runs other code in training than in evaluation"
        raise NoBranchError(msg)
    return graph


def _branches(graph: fx.Graph, block: nn.Module) -> Iterator[tuple[fx.Node, fx.Node, tuple[str, ...]]]:
    """Additions, the operand that is a branch, and the branch's layers."""
    for node in graph.nodes:
        operands = [one for one in node.args if isinstance(one, fx.Node)]
        if node.target not in _ADDITIONS or node.kwargs or len(set(operands)) != 2 or len(node.args) != 2:
            continue
        for operand in operands:
            layers = _layers(graph, _only_for(graph, node, operand), block)
            if layers:
                yield node, operand, layers


def _only_for(graph: fx.Graph, node: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """Steps that nothing needs but one operand of a step."""
    needed: set[fx.Node] = set()
    waiting = [one for one in graph.nodes if one.op == "output"]
    while waiting:
        one = waiting.pop()
        if one not in needed:
            needed.add(one)
            waiting += [of for of in one.all_input_nodes if one is not node or of is not operand]
    return [one for one in graph.nodes if one not in needed and one.op != "placeholder"]


def _layers(graph: fx.Graph, gone: Sequence[fx.Node], block: nn.Module) -> tuple[str, ...]:
    """Names of what only these steps use and what holds tensors."""
    named = [one for one in graph.nodes if one.op in ("call_module", "get_attr")]
    mine = dict.fromkeys(str(one.target) for one in named if one in set(gone))
    others = {str(one.target) for one in named if one not in set(gone)}
    return tuple(name for name in mine if name not in others and _tensors(block, name))


def _tensors(block: nn.Module, name: str) -> list[Tensor]:
    found = operator.attrgetter(name)(block)
    return [found] if isinstance(found, Tensor) else _tensors_of(found)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [tensor for _, one in named_modules(module) for tensor in own_tensors(one).values()]


def _module(block: nn.Module, graph: fx.Graph, layers: Sequence[str]) -> nn.Module:
    held: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            held[str(node.target)] = operator.attrgetter(str(node.target))(block)
        _write_apart(node, held, block)
    kept = {id(tensor) for name in held for tensor in _tensors(block, name)}
    gone = {id(tensor) for name in layers for tensor in _tensors(block, name)}
    if any(id(tensor) not in kept | gone for tensor in _tensors_of(block)):
        msg = f"{type(block).__name__} holds weights that its code does not use"
        raise NoBranchError(msg)
    module = fx.GraphModule(held, graph, type(block).__name__)
    module.training = block.training
    share_hooks(block, module)
    return module


def _write_apart(node: fx.Node, held: dict[str, Any], block: nn.Module) -> None:
    """Makes a step write into memory of its own."""
    if node.op == "call_module" and getattr(held[str(node.target)], "inplace", False):
        held[str(node.target)] = copy.copy(held[str(node.target)])
        held[str(node.target)].inplace = False
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.target is operator.iadd:
        node.target = operator.add
    if node.op == "call_method" and str(node.target).endswith("_"):
        msg = f"{type(block).__name__} writes in place behind its addition ({node.target})"
        raise NoBranchError(msg)
