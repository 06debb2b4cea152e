"""One run of a network with channel labels, written down operation by operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.channels.labels import DimLabels, LabelArray, LabelSpace
from nncf_compactprune.channels.rules import name_of
from nncf_compactprune.channels.shapes import ValuesNeeded
from nncf_compactprune.channels.tracer import Tracer
from nncf_compactprune.host.tensors import ModelTensors
from nncf_compactprune.host.torch_internals import COMPOSITE, tensors_of
from nncf_compactprune.plugins import Plugins

_aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A norm over the stream, by its place in a run of the network.

    :param kind: ``"square"``: the mean of squares (RMSNorm); ``"layer_norm"``.
    :param number: how many of its kind ran before it.
    :param dim: dimension of its input that holds the channels, counted from the end.
    """

    kind: str
    number: int
    dim: int


@dataclass(frozen=True, eq=False)
class Step:
    """One operation; it keeps its tensors alive, so that their identities stay theirs."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    outs: Sequence[Tensor]
    labels: Mapping[int, DimLabels]
    uniform: frozenset[int]
    module: str
    number: int

    @property
    def name(self) -> str:
        """``add`` for ``aten.add_``."""
        name = name_of(self.func).removeprefix("aten.")
        return name if name.startswith("_") or name == "copy_" else name.rstrip("_")

    @property
    def ins(self) -> list[Tensor]:
        return tensors_of((self.args, dict(self.kwargs)))


class SiteCounter:
    """Numbers the operations that a norm can be told by, alike in every run of a network."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {"square": 0, "layer_norm": 0}

    def number(self, func: Any, args: Sequence[Any]) -> tuple[str, int]:
        """Kind and number of an operation; an empty kind where it is none of them.

        :param func: the operation.
        :param args: its positional arguments.
        """
        kind = ""
        if func is _aten.native_layer_norm.default:
            kind = "layer_norm"
        elif (func is _aten.pow.Tensor_Scalar and args[1] == 2) or (func is _aten.mul.Tensor and args[0] is args[1]):
            kind = "square"
        if not kind:
            return "", 0
        self.seen[kind] += 1
        return kind, self.seen[kind] - 1


class _Recorder(Tracer):  # type: ignore[no-untyped-call]
    """Writes every operation down."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[Step] = []
        self._counter = SiteCounter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ins = tensors_of((args, dict(kwargs)))
        labels = {id(tensor): self.labels(tensor) for tensor in ins}
        uniform = frozenset(id(tensor) for tensor in ins if self.is_uniform(tensor))
        labelled = any(map(self.has_labels, ins))
        apart = labelled and self._rule(func) is None and func.has_kernel_for_dispatch_key(COMPOSITE)
        number = 0 if apart else self._counter.number(func, args)[1]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not apart:  # the smaller operations that it consists of are in the list
            outs = tensors_of(out)
            after = {id(tensor): self.labels(tensor) for tensor in outs}
            self.steps.append(Step(func, args, kwargs, outs, {**labels, **after}, uniform, self.module, number))
        return out


@dataclass(frozen=True)
class Tape:
    steps: Sequence[Step]
    space: LabelSpace
    component: LabelArray
    constants: Mapping[int, str]
    tensors: ModelTensors


def recorded(model: nn.Module, example_inputs: Any, plugins: Plugins) -> Tape:
    run = _Recorder(model, LabelSpace(), plugins.op_rules, shapes_only=True)
    try:
        run.run(example_inputs)
    except ValuesNeeded:
        run = _Recorder(model, LabelSpace(), plugins.op_rules, shapes_only=False)
        run.run(example_inputs)
    constants = {id(tensor): name for name, tensor in run.tensors.named()}
    return Tape(run.steps, run.space, run.space.solve().component, constants, run.tensors)
