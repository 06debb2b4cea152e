"""Where layers stand in NNCF's graph of a model: first, last, with a stride. NNCF 2.x's pruning keys speak of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nncf_compactprune.host.nncf_hooks import nncf_graph

CONVOLUTIONS = frozenset(f"{kind}{dims}d" for kind in ("conv", "conv_transpose") for dims in (1, 2, 3))
#: what carries filters, and what NNCF 2.x does not follow channels through
LAYERS = CONVOLUTIONS | {"linear"}
_STOPS = frozenset({"max", "min", "sum"})
#: position of the stride among the arguments of every convolution
_STRIDE = 3


@dataclass(frozen=True)
class Positions:
    """Names of the parameters of some layers, as NNCF's graph knows them.

    :param first: no convolution or linear layer stands between them and an input.
    :param last: no convolution stands between them and an output; convolutions only.
    :param downsampling: convolutions with a stride above 1, transposed ones left out.
    """

    first: frozenset[str]
    last: frozenset[str]
    downsampling: frozenset[str]


class _Holder(nn.Module):
    """Runs a bare ``nn.Sequential`` as a part: as the whole, it would run NNCF's hook storage as a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x)


def positions(model: nn.Module, example_inputs: Any) -> Positions:
    """Finds first, last and downsampling layers.

    :param model: in the mode to run it in.
    :param example_inputs: a tensor, a tuple or a dict.
    """
    held = isinstance(model, nn.Sequential)
    graph = nncf_graph(_Holder(model).train(model.training) if held else model, example_inputs)

    def parameters(nodes: Collection[Any]) -> frozenset[str]:
        names = {
            str(getattr(before.layer_attributes, "name", "") or "")
            for node in nodes
            for before in graph.get_previous_nodes(node)
        } - {""}
        return frozenset(name.removeprefix("inner.") if held else name for name in names)

    every = graph.get_all_nodes()
    strided = [node for node in every if node.node_type in CONVOLUTIONS and _strides(node)]
    return Positions(
        parameters(_reached(graph.get_input_nodes() or _without_inputs(graph), graph.get_next_nodes, LAYERS)),
        parameters(_reached(graph.get_output_nodes(), graph.get_previous_nodes, CONVOLUTIONS)),
        parameters(strided),
    )


def _without_inputs(graph: Any) -> list[Any]:
    """Operations that only constants go into: NNCF sees no input where ``forward`` takes ``*args``."""
    constants = {node.node_id for node in graph.get_all_nodes() if node.node_type == "nncf_model_const"}
    return [
        node
        for node in graph.get_all_nodes()
        if node.node_id not in constants
        and all(before.node_id in constants for before in graph.get_previous_nodes(node))
    ]


def _reached(start: Sequence[Any], neighbours: Callable[[Any], Sequence[Any]], kinds: Collection[str]) -> list[Any]:
    """The first nodes of some kinds on every way from the start."""
    found, seen, waiting = [], set(), list(start)
    while waiting:
        node = waiting.pop()
        if node.node_id in seen:
            continue
        seen.add(node.node_id)
        if node.node_type in kinds:
            found.append(node)
        elif node.node_type not in _STOPS:
            waiting.extend(neighbours(node))
    return found


def _strides(node: Any) -> bool:
    """Whether a convolution skips positions; a transposed one does not."""
    arguments: Sequence[Any] = getattr(node.layer_attributes, "op_args", ())
    named: Mapping[str, Any] = getattr(node.layer_attributes, "op_kwargs", None) or {}
    stride = named.get("stride", arguments[_STRIDE] if len(arguments) > _STRIDE else 1)
    steps = stride if isinstance(stride, (tuple, list)) else (stride,)
    return "transpose" not in node.node_type and any(step != 1 for step in steps)
