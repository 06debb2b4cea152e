"""Streams of channels that may be rotated: what writes them, what reads them, and what must not be in between.

One run with channel labels writes down every operation. Then each stream is followed through that list: sums, scalings
by a number and norms commute with a rotation of the channels, a matrix product reads or writes them, and anything else
(an activation, a slice, a product of two streams) ends it with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from nncf_compactprune.algorithms.rotation.tape import Site, Step, Tape, recorded
from nncf_compactprune.channels import ChannelGroup, Member, trace
from nncf_compactprune.channels.rules import dims_of, named
from nncf_compactprune.errors import shortened
from nncf_compactprune.host.tensors import named_modules, temporary_buffers
from nncf_compactprune.plugins import Plugins, default_plugins

Slot: TypeAlias = tuple[str, int]
"""Name of a parameter or buffer, and its dimension that carries the stream."""


@dataclass(frozen=True)
class Scale:
    """What a norm multiplies its result by: ``parameter + offset``, and what it adds then.

    :param parameter: shape ``[channels]``, or with dimensions of size 1 beside.
    :param offset: 1 where the code multiplies by ``1 + weight``.
    :param shift: the parameter that is added, or empty.
    """

    parameter: str
    offset: float = 0.0
    shift: str = ""


@dataclass(frozen=True)
class Reading:
    """A weight's dimension that the stream is multiplied with.

    :param scale: of the norm in front of it, or None.
    :param site: that norm, or None where it reads the stream itself.
    """

    scale: Scale | None
    site: Site | None


@dataclass(frozen=True)
class Stream:
    """Channels that may be rotated.

    :param name: of the channel group.
    :param width: number of channels.
    :param written: what makes them: a rotation multiplies these from the right.
    :param read: what reads them: likewise, once the norms' scales are in it.
    """

    name: str
    width: int
    written: frozenset[Slot]
    read: Mapping[Slot, Reading]

    @property
    def scales(self) -> set[Scale]:
        """Scales of norms, which become ones."""
        return {reading.scale for reading in self.read.values() if reading.scale is not None}

    @property
    def sites(self) -> list[Site]:
        """The norms in front of what reads the stream."""
        return list(dict.fromkeys(reading.site for reading in self.read.values() if reading.site is not None))

    @property
    def has_means(self) -> bool:
        """Whether a norm takes the mean away first (LayerNorm)."""
        return any(site.kind == "layer_norm" for site in self.sites)


class CannotRotate(Exception):
    """Why a stream cannot be rotated, in words."""


def streams_of(
    model: nn.Module, example_inputs: Any, plugins: Plugins | None = None
) -> tuple[list[Stream], dict[str, str]]:
    """The streams of a network that may be rotated, and why the others may not.

    Candidates are the channel groups that norms run over, and that may go by consent alone.

    :param model: it is only run.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param plugins: where the rules of operations come from; the installed plugins by default.
    :return: streams, and reasons by the name of the group or, where nothing but a pin is in the way, of the layer.
    """
    plugins = plugins or default_plugins()
    graph = trace(model, example_inputs, plugins=plugins, allow_approximate=True)
    groups = [group for group in graph.groups if group.approximate and group.with_role("consumer")]
    refused = {one.name: f"its {one.size} channels stay: {one.reason}" for one in graph.pinned}
    if not groups:
        return [], refused
    tape = recorded(model, example_inputs, plugins)
    found, refused = [], {}
    for group in groups:
        try:
            found.append(_Follower(tape, group, model).stream())
        except CannotRotate as reason:
            refused[group.name] = str(reason)
    return found, refused


# -- a stream, followed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """The stream, or a part of its sum: a rotation of the channels rotates it."""

    scale: Scale | None = None
    site: Site | None = None


@dataclass(frozen=True)
class _Constant:
    """A parameter, as it is or reshaped, with a number added."""

    parameter: str
    offset: float = 0.0


@dataclass(frozen=True)
class _Squares:
    """Squares of the stream, of which only the mean or the sum is of use."""

    site: Site


@dataclass(frozen=True)
class _Statistic:
    """Computed of a mean of squares: no rotation changes it."""

    site: Site


_Kind: TypeAlias = _Value | _Constant | _Squares | _Statistic

_PASSED_ON = frozenset({
    "_to_copy", "clone", "detach", "alias", "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "unsqueeze",
    "squeeze", "expand", "repeat", "slice", "select", "unbind", "split", "split_with_sizes", "chunk", "index",
    "index_select", "native_dropout", "neg", "lift_fresh", "contiguous", "flatten", "unflatten", "_reshape_alias",
})  # fmt: skip
_SUMS = frozenset({"add", "sub", "cat", "stack", "where", "masked_fill", "index_add", "index_put", "index_copy",
                   "scatter_add"})  # fmt: skip
_PLACED = frozenset({"index_add", "index_put", "index_copy", "scatter_add"})
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "embedding", "convolution"})
_POINTWISE_OF_STATISTICS = frozenset({"add", "rsqrt", "sqrt", "pow", "reciprocal", "_to_copy", "mul", "div", "clamp"})


@dataclass
class _Follower:
    """Follows one group of channels through the operations of a run."""

    tape: Tape
    group: ChannelGroup
    model: nn.Module
    kinds: dict[int, _Kind] = field(default_factory=dict)
    written: set[Slot] = field(default_factory=set)
    read: dict[Slot, Reading] = field(default_factory=dict)
    scaling: set[str] = field(default_factory=set)

    def stream(self) -> Stream:
        """:raises CannotRotate: with the reason."""
        self.position = self._positions()
        for step in self.tape.steps:
            self._follow(step)
        self._check()
        return Stream(self.group.name, self.group.size, frozenset(self.written), dict(self.read))

    # -- where the channels are ------------------------------------------------------------------------------------

    def _positions(self) -> npt.NDArray[np.int64]:
        """Which channel each label is, -1 for those of others, shape ``[labels]``."""
        whole = np.arange(self.group.size)
        for member in self.group.members:
            shape = self.tape.tensors.all()[member.parameter].shape
            if member.indices.shape[1] != 1 or shape[member.dim] != self.group.size:
                msg = f"'{member.parameter}' holds only a part of the channels, or repeats them"
                raise CannotRotate(msg)
            if not np.array_equal(member.indices[:, 0], whole):
                msg = f"'{member.parameter}' holds the channels in another order"
                raise CannotRotate(msg)
        first = self.group.members[0]
        slot = next(s for s in self.tape.space.slots if (s.parameter, s.dim) == (first.parameter, first.dim))
        classes = self.tape.component[slot.start + whole]
        of_class = np.full(int(self.tape.component.max()) + 1, -1, np.int64)
        of_class[classes] = whole
        return of_class[self.tape.component]

    def _dims(self, step: Step, tensor: Tensor) -> list[int]:
        """Dimensions of a tensor that carry the whole stream, in order."""
        dims = []
        for dim, array in enumerate(step.labels.get(id(tensor), ())):
            if array is None or not (self.position[array] >= 0).any():
                continue
            if not np.array_equal(self.position[array], np.arange(self.group.size)):
                raise self._refusal(step, "takes the channels apart or reorders them")
            dims.append(dim)
        return dims

    def _slot(self, step: Step, tensor: Tensor, dim: int) -> Slot:
        """The parameter's dimension that a dimension of a tensor made of it is."""
        array = step.labels[id(tensor)][dim]
        assert array is not None
        label = int(array.flat[0])
        for slot in self.tape.space.slots:
            if slot.start <= label < slot.start + slot.size:
                return slot.parameter, slot.dim
        raise self._refusal(step, "works on a computed weight")

    def _refusal(self, step: Step, does: str) -> CannotRotate:
        where = f" in '{step.module}'" if step.module else ""
        return CannotRotate(f"aten.{step.name}{where} {does}")

    # -- operations ------------------------------------------------------------------------------------------------

    def _follow(self, step: Step) -> None:
        carrying = [tensor for tensor in step.ins if self._dims(step, tensor)]
        for tensor in carrying:
            if id(tensor) not in self.kinds and (name := self.tape.constants.get(id(tensor))) is not None:
                self.kinds[id(tensor)] = _Constant(name)
        results = [out for out in step.outs if self._dims(step, out)]
        if not carrying:
            self._follow_statistic(step)
            return
        kind = self._result(step, carrying)
        for out in results or step.outs:
            before = self.kinds.get(id(out))
            if before is not None and before != kind and any(out is tensor for tensor in step.ins):
                raise self._refusal(step, "changes the stream in place")
            if kind is None:
                self.kinds.pop(id(out), None)
            else:
                self.kinds[id(out)] = kind

    def _follow_statistic(self, step: Step) -> None:
        kinds = {id(tensor): self.kinds[id(tensor)] for tensor in step.ins if id(tensor) in self.kinds}
        statistics = [kind for kind in kinds.values() if isinstance(kind, _Statistic)]
        for out in step.outs:
            self.kinds.pop(id(out), None)
            if len(statistics) == 1 and step.name in _POINTWISE_OF_STATISTICS:
                self.kinds[id(out)] = statistics[0]

    def _result(self, step: Step, carrying: Sequence[Tensor]) -> _Kind | None:
        """What an operation makes of the stream."""
        for names, follow in self._families():
            if step.name in names:
                return follow(step, carrying)
        raise self._refusal(step, "does not commute with a rotation")

    def _families(self) -> Iterator[tuple[frozenset[str], Callable[[Step, Sequence[Tensor]], _Kind | None]]]:
        yield _PASSED_ON, self._passed_on
        yield _PRODUCTS, self._product
        yield _SUMS, self._sum
        yield frozenset({"mul", "div"}), self._scaled
        yield frozenset({"pow"}), self._power
        yield frozenset({"mean", "sum"}), self._reduced
        yield frozenset({"native_layer_norm"}), self._layer_norm

    def _kind(self, step: Step, tensor: Tensor) -> _Kind:
        kind = self.kinds.get(id(tensor))
        if kind is None:
            raise self._refusal(step, "takes channels from an operation that was not followed")
        return kind

    def _value(self, step: Step, tensor: Tensor) -> _Value:
        """The stream as a value; a bare parameter (a table of positions) is a part of its sum."""
        kind = self._kind(step, tensor)
        if isinstance(kind, _Constant) and not kind.offset:
            (dim,) = self._dims(step, tensor)
            self.written.add(self._slot(step, tensor, dim))
            return _Value()
        if isinstance(kind, _Value):
            return kind
        raise self._refusal(step, "does not commute with a rotation")

    def _passed_on(self, step: Step, carrying: Sequence[Tensor]) -> _Kind:
        kind = self._kind(step, carrying[0])
        if len(carrying) > 1 or not any(self._dims(step, out) for out in step.outs):
            raise self._refusal(step, "takes the channels apart or reorders them")
        if step.name == "neg" and not isinstance(kind, _Value):
            raise self._refusal(step, "does not commute with a rotation")
        return kind

    def _sum(self, step: Step, carrying: Sequence[Tensor]) -> _Kind:
        numbers = [one for one in step.args if isinstance(one, (int, float)) and not isinstance(one, bool)]
        if step.name == "add" and len(carrying) == 1 and numbers and not step.kwargs.get("alpha"):
            kind = self._kind(step, carrying[0])
            if isinstance(kind, _Constant):
                return replace(kind, offset=kind.offset + numbers[0])
        if step.name in ("add", "sub") and len(carrying) < 2 and carrying[0].numel():
            raise self._refusal(step, "adds the same to every channel")
        if step.name == "masked_fill" and (not numbers or numbers[-1] != 0):
            raise self._refusal(step, "puts numbers in place of channels")
        for tensor in step.ins:
            fits = not tensor.is_floating_point() or (step.name in (*_PLACED, "where") and id(tensor) in step.uniform)
            if not fits and not any(tensor is one for one in carrying):
                raise self._refusal(step, "puts together the stream and something else")
        values = {self._value(step, tensor) for tensor in carrying}
        if len(values) == 1:
            return values.pop()
        for value in values:
            if value.scale is not None:
                raise self._refusal(step, f"adds what '{value.scale.parameter}' has scaled to the stream")
        return _Value()

    def _scaled(self, step: Step, carrying: Sequence[Tensor]) -> _Kind:
        first, second = (*step.args[:2], None)[:2]
        if first is second:
            return self._squares(step, first)
        if step.name == "div" and (len(carrying) > 1 or carrying[0] is not first):
            raise self._refusal(step, "divides by the channels")
        constants = [tensor for tensor in carrying if isinstance(self._kind(step, tensor), _Constant)]
        if len(carrying) == 2 and len(constants) == 1:
            (value,) = (self._value(step, tensor) for tensor in carrying if tensor is not constants[0])
            constant = self._kind(step, constants[0])
            assert isinstance(constant, _Constant)
            return self._by_constant(step, value, constant)
        if len(carrying) > 1:
            raise self._refusal(step, "multiplies two streams channel by channel")
        value = self._value(step, carrying[0])
        other = second if carrying[0] is first else first
        statistic = self.kinds.get(id(other))
        if isinstance(statistic, _Statistic) and value.site is None:
            return replace(value, site=statistic.site)
        return value

    def _by_constant(self, step: Step, value: _Value, constant: _Constant) -> _Value:
        data = self.tape.tensors.all()[constant.parameter]
        if data.numel() != self.group.size:
            raise self._refusal(step, f"multiplies by '{constant.parameter}', which is no vector")
        self.scaling.add(constant.parameter)
        if bool((data == data.flatten()[0]).all()):
            return value  # one number for all channels commutes with a rotation
        if value.scale is not None:
            raise self._refusal(step, f"scales by '{constant.parameter}' what '{value.scale.parameter}' has scaled")
        return replace(value, scale=Scale(constant.parameter, constant.offset))

    def _power(self, step: Step, carrying: Sequence[Tensor]) -> _Kind:
        if step.args[1] != 2:
            raise self._refusal(step, "does not commute with a rotation")
        return self._squares(step, carrying[0])

    def _squares(self, step: Step, tensor: Tensor) -> _Kind:
        value = self._value(step, tensor)
        if value.scale is not None:
            raise self._refusal(step, f"squares what '{value.scale.parameter}' has scaled")
        (dim,) = self._dims(step, tensor)
        return _Squares(Site("square", step.number, dim - tensor.dim()))

    def _reduced(self, step: Step, carrying: Sequence[Tensor]) -> _Kind | None:
        tensor = carrying[0]
        (channels,) = self._dims(step, tensor)
        kind = self._kind(step, tensor)
        over = dims_of(named(step.func, step.args, step.kwargs, "dim"), tensor.dim())
        if isinstance(kind, _Squares):
            if channels not in over:
                raise self._refusal(step, "does not commute with a rotation")
            return _Statistic(kind.site)
        if channels in over:
            raise self._refusal(step, "runs over the channels, as the mean of a LayerNorm that is written out")
        return self._value(step, tensor)

    def _layer_norm(self, step: Step, carrying: Sequence[Tensor]) -> _Kind:
        x, shape, weight, bias = (*step.args, None, None)[:4]
        value = self._value(step, x)
        if len(shape) != 1 or weight is None or value.scale is not None:
            raise self._refusal(step, "is no norm over the stream alone")
        scale, shift = self.tape.constants.get(id(weight)), ""
        if scale is None or (bias is not None and id(bias) not in self.tape.constants):
            raise self._refusal(step, "has a computed weight or bias")
        self.scaling.add(scale)
        if bias is not None:
            shift = self.tape.constants[id(bias)]
            self.scaling.add(shift)
        site, parameters = Site("layer_norm", step.number, -1), self.tape.tensors.all()
        if bool((weight == parameters[scale].flatten()[0]).all()) and (bias is None or not bool(bias.any())):
            return _Value(None, site)  # one number for all channels commutes with a rotation
        return _Value(Scale(scale, 0.0, shift), site)

    def _product(self, step: Step, carrying: Sequence[Tensor]) -> _Kind | None:
        bias, x, weight, inner, outer = self._operands(step)
        result: _Kind | None = None
        if x is not None and (dims := self._dims(step, x)):
            value = self._value(step, x) if isinstance(self._kind(step, x), _Value) else None
            if value is None or dims != [(x.dim() - 1) if step.name != "convolution" else 1]:
                raise self._refusal(step, "reads the stream in another way than a layer does")
            if inner not in self._dims(step, weight) or not isinstance(self._kind(step, weight), _Constant):
                raise self._refusal(step, "multiplies two streams with each other")
            self._reads(step, self._slot(step, weight, inner), Reading(value.scale, value.site))
        if outer in self._dims(step, weight):
            self._constant_only(step, weight)
            self.written.add(self._slot(step, weight, outer))
            result = _Value()
        if bias is not None and self._dims(step, bias):
            value = self._value(step, bias)
            if value.scale is not None or result is None:
                raise self._refusal(step, "adds to the stream what is none of it")
        if result is None and any(self._dims(step, out) for out in step.outs):
            raise self._refusal(step, "reads the stream in another way than a layer does")
        return result

    def _operands(self, step: Step) -> tuple[Tensor | None, Tensor | None, Tensor, int, int]:
        """Bias, input, weight, and the weight's dimensions that are read and written."""
        args, name = step.args, step.name
        if name == "embedding":
            return None, None, args[0], -1, args[0].dim() - 1
        if name == "convolution":
            if args[6] or args[8] != 1:
                raise self._refusal(step, "is a convolution of groups, or a transposed one")
            return args[2], args[0], args[1], 1, 0
        if name == "linear":
            return named(step.func, args, step.kwargs, "bias"), args[0], args[1], args[1].dim() - 1, args[1].dim() - 2
        bias, x, weight = args[:3] if name in ("addmm", "baddbmm") else (None, *args[:2])
        return bias, x, weight, weight.dim() - 2, weight.dim() - 1

    def _constant_only(self, step: Step, weight: Tensor) -> None:
        kind = self._kind(step, weight)
        if not isinstance(kind, _Constant) or kind.offset:
            raise self._refusal(step, "works on a computed weight")

    def _reads(self, step: Step, slot: Slot, reading: Reading) -> None:
        before = self.read.setdefault(slot, reading)
        if before.scale != reading.scale:
            raise self._refusal(step, f"reads '{slot[0]}' behind another norm than before")
        if before != reading:
            self.read[slot] = Reading(reading.scale, None)

    # -- what must hold in the end ---------------------------------------------------------------------------------

    def _check(self) -> None:
        """:raises CannotRotate: a parameter was not accounted for, or would have to be two things at once."""
        parameters = self.tape.tensors.all()
        ends = {name for name, _ in (*self.written, *self.read)}
        for name in sorted(self.scaling & ends):
            msg = f"'{name}' scales the stream and is a part of it"
            raise CannotRotate(msg)
        unseen = sorted({member.parameter for member in self.group.members if not self._is_seen(member)})
        if unseen:
            msg = f"{shortened(unseen)}: meets the stream in an operation that was not followed"
            raise CannotRotate(msg)
        for slot in self.written & self.read.keys():
            if (scale := self.read[slot].scale) is not None:
                msg = (
                    f"'{slot[0]}' makes the stream and reads it, behind the norm of '{scale.parameter}', which would "
                    "have to go into one of both. Give the reading layer a copy of that weight first: layer.weight = "
                    "nn.Parameter(layer.weight.detach().clone()), in transformers with "
                    "config.tie_word_embeddings = False"
                )
                raise CannotRotate(msg)
        passing = {id(buffer) for _, module in named_modules(self.model) for buffer in temporary_buffers(module)}
        for name in sorted(ends | self.scaling):
            if id(parameters[name]) in passing:
                msg = f"'{name}' is a buffer that no checkpoint holds"
                raise CannotRotate(msg)

    def _is_seen(self, member: Member) -> bool:
        slot = member.parameter, member.dim
        return slot in self.written or slot in self.read or member.parameter in self.scaling
