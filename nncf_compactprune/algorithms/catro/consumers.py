"""Where channels are used: finds, while a model runs, the operations that consume the channels of each group.

A consumer is recognised by the identity of its weight in the call of a convolution or a matrix product, so functional
use counts like modules do. A weight that is computed from parameters (weight normalisation, a mask, a cast) stands for
the parameter it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nncf_compactprune.channels import ChannelGraph, Member
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.host.torch_internals import original

CONVOLUTIONS = tuple(map(original, (F.conv1d, F.conv2d, F.conv3d)))
TRANSPOSED = tuple(map(original, (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)))
PRODUCTS = tuple(map(original, (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)))
LINEAR = original(F.linear)


@dataclass(frozen=True)
class Use:
    """One call of a consumer, as seen by one group.

    :param group: index of the group.
    :param parameter: name of the consumer's weight.
    :param positions: where each channel sits on the channel axis of the input, ``[channels, repeats]``.
    """

    group: int
    parameter: str
    positions: Tensor


@dataclass(frozen=True)
class Call:
    """A consumer's call.

    :param x: its input.
    :param weight: its weight as used.
    :param kind: ``"convolution"``, ``"transposed"``, ``"linear"`` (weight ``[out, in]``) or ``"product"`` (``[in,
        out]``).
    :param uses: the groups whose channels it consumes.
    :param options: stride, padding, dilation and groups of a convolution.
    """

    x: Tensor
    weight: Tensor
    kind: str
    uses: tuple[Use, ...]
    options: Mapping[str, Any]

    @property
    def axis(self) -> int:
        """The channel axis of the input."""
        return 1 if self.kind in ("convolution", "transposed") else self.x.dim() - 1


class ConsumerMode(TorchFunctionMode):
    """Shows every call of a consumer to a listener, which returns the input to go on with.

    :param model: runs under this mode.
    :param graph: its groups.
    :param groups: indices of those to look at.
    :param listener: from a call to the input that the consumer gets instead.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, groups: Collection[int], listener: Callable[[Call], Tensor]
    ) -> None:
        super().__init__()
        self._listener = listener
        tensors = model_tensors(model)
        # Masks of NNCF hooks have no name of their own, but what they are multiplied with stays a parameter.
        self._names = {id(tensor): "" for tensor in (*model.buffers(), *model.parameters())}
        self._names.update((id(tensor), name) for name, tensor in tensors.named())
        self._keep: list[Tensor] = []  # ids stay unique while their tensors live
        self._members: dict[str, list[tuple[int, Member]]] = {}
        for index in groups:
            for member in graph.groups[index].members:
                self._members.setdefault(member.parameter, []).append((index, member))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        kind = _kind(func)
        if kind is not None:
            bound = _bound(kind, args, named)
            call = None if bound is None else self._call(kind, *bound)
            if call is not None:
                return func(*_with_input(self._listener(call), args, named), **named)
        result = func(*args, **named)
        self._follow(args, named, result)
        return result

    def _follow(self, args: Sequence[Any], named: Mapping[str, Any], result: Any) -> None:
        """What is computed from parameters alone stands for the first of them that some group knows."""
        if not isinstance(result, Tensor) or id(result) in self._names:
            return
        tensors = [leaf for leaf in (*args, *named.values()) if isinstance(leaf, Tensor)]
        sources = [self._names.get(id(leaf)) for leaf in tensors]
        if not sources or None in sources:
            return
        consumed = (
            n for n in sources if any(member.role == "consumer" for _, member in self._members.get(n or "", ()))
        )
        self._names[id(result)] = next(consumed, "") or ""
        self._keep.append(result)

    def _call(self, kind: str, x: Tensor, weight: Tensor, options: Mapping[str, Any]) -> Call | None:
        name = self._names.get(id(weight))
        if name is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        if kind in ("convolution", "transposed") and x.dim() != weight.dim():
            return None  # without a batch dimension
        uses = []
        for group, member in self._members.get(name, ()):
            positions = _positions(kind, member, x, weight, int(options.get("groups", 1)))
            if positions is not None:
                uses.append(Use(group, name, torch.from_numpy(positions)))
        return Call(x, weight, kind, tuple(uses), options) if uses else None


def _kind(func: Callable[..., Any]) -> str | None:
    if func in CONVOLUTIONS:
        return "convolution"
    if func in TRANSPOSED:
        return "transposed"
    if func is LINEAR:
        return "linear"
    return "product" if func in PRODUCTS else None


_NAMES: Mapping[str, tuple[str, ...]] = {
    "convolution": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "transposed": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "linear": ("input", "weight", "bias"),
    "product": ("input", "other"),
}


def _bound(kind: str, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
    options = {**dict(zip(_NAMES[kind], args, strict=False)), **named}
    weight = options.get("weight", options.get("other", options.get("mat2")))
    return (options["input"], weight, options) if "input" in options and isinstance(weight, Tensor) else None


def _with_input(x: Tensor, args: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    if args:
        return (x, *args[1:])
    named["input"] = x
    return ()


def _positions(kind: str, member: Member, x: Tensor, weight: Tensor, groups: int) -> Any:
    """Positions of a member's channels on the input's channel axis; None where it does not consume here."""
    if kind == "convolution":
        width = weight.shape[1]
        if member.dim != 1 or member.role != "consumer" or (width == 1 and groups > 1):  # depthwise only passes on
            return None
        repeated = member.indices[:, None, :] + (np.arange(groups) * width)[None, :, None]
        return repeated.reshape(len(member.indices), -1)
    if kind == "transposed":
        return member.indices if member.dim == 0 and member.role == "consumer" else None
    if member.role != "consumer" or x.shape[-1] <= int(member.indices.max()):
        return None
    return member.indices
