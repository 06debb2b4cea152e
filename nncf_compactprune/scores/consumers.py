"""Where channels are used: finds, while a model runs, the operations that consume the channels of each group.

A consumer is recognised by the identity of its weight in the call of a convolution or a matrix product, so functional
use counts like modules do. A weight that is computed from parameters (weight normalisation, a mask, a cast) stands for
the parameter it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nncf_compactprune.channels import ChannelGraph, Member
from nncf_compactprune.channels.tensors import model_tensors
from nncf_compactprune.scores.class_statistics import reduced

PATCHES = 6  # output positions looked at in each sample
SKETCH = 64  # outputs of a consumer, at most; more are mixed down at random
CHUNK_ELEMENTS = 2**23  # of one intermediate result
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


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
        consumed = (n for n in sources if any(member.role == "in" for _, member in self._members.get(n or "", ())))
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
    if func is F.linear:
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
        if member.dim != 1 or member.role != "in" or (width == 1 and groups > 1):  # depthwise only passes on
            return None
        repeated = member.indices[:, None, :] + (np.arange(groups) * width)[None, :, None]
        return repeated.reshape(len(member.indices), -1)
    if kind == "transposed":
        return None if member.dim != 0 or (groups == x.shape[1] and groups > 1) else member.indices
    if member.role != "in" or x.shape[-1] <= int(member.indices.max()):
        return None
    return member.indices


# -- what channels contribute ------------------------------------------------------------------------------------------


class Contributions:
    """What the channels of a group contribute to one consumer's output, ``W_k x_k``, over a fixed lattice of output
    positions of every sample.

    The lattice is the same for all samples, so the sums do not depend on order and batches. Outputs beyond
    :data:`SKETCH` are mixed by a fixed random sign matrix, which keeps inner products in expectation (Johnson and
    Lindenstrauss). A transposed convolution is looked at before its outputs overlap.

    :param channels: of the group.
    """

    def __init__(self, channels: int) -> None:
        self.products = torch.zeros(channels, channels, dtype=torch.float64)
        self.sums: list[Tensor] = []
        self.rows: list[Tensor] = []

    @torch.no_grad()
    def update(self, call: Call, use: Use) -> None:
        """Adds the samples of one call."""
        for at, (inputs, weights) in enumerate(_blocks(call, use.positions.to(call.x.device))):
            wide = torch.promote_types(inputs.dtype, torch.float32)
            mixed = _sketched(weights.to(wide))
            if at == len(self.sums):
                self.sums.append(torch.zeros(mixed.shape[0], mixed.shape[2], dtype=torch.float64))
                self.rows.append(torch.zeros((), dtype=torch.float64))
            rows = max(1, CHUNK_ELEMENTS // max(mixed.shape[0] * mixed.shape[2], 1))
            for part in torch.split(inputs.to(wide), rows):
                contributed = torch.bmm(part.transpose(0, 1), mixed)
                self.sums[at] += contributed.sum(1).to("cpu", torch.float64)
                flat = contributed.flatten(1)
                self.products += (flat @ flat.T).to("cpu", torch.float64)
            self.rows[at] += len(inputs)

    def all_reduce(self) -> None:
        """Sums up over all processes."""
        self.products = reduced(self.products)
        self.sums, self.rows = [reduced(s) for s in self.sums], [reduced(n) for n in self.rows]

    @property
    def gram(self) -> Tensor:
        """``G[k, l] = Σ <z_k - mean z_k, z_l - mean z_l>``, ``[channels, channels]``. What is constant over samples and
        positions is left out: a bias, or the BatchNorm behind, makes up for it."""
        total = self.products.clone()
        for sums, rows in zip(self.sums, self.rows, strict=True):
            total -= sums @ sums.T / rows.clamp_min(1)
        return total


def _sketched(weights: Tensor) -> Tensor:
    """``[channels, taps, outputs]`` with at most :data:`SKETCH` outputs."""
    outputs = weights.shape[2]
    if outputs <= SKETCH:
        return weights
    generator = torch.Generator().manual_seed(outputs)
    signs = torch.randint(0, 2, (outputs, SKETCH), generator=generator) * 2.0 - 1
    return weights @ (signs / math.sqrt(SKETCH)).to(weights)


def _blocks(call: Call, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs ``[rows, channels, taps]`` with weights ``[channels, taps, outputs]``, whose product is what the channels
    contribute; one pair for each set of outputs."""
    x, weight = call.x.detach(), call.weight.detach()
    channels = len(positions)
    if call.kind in ("linear", "product"):
        table = weight if call.kind == "product" else weight.T
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        rows = flat[:, _lattice(x.shape[1:-1]).to(x.device)].flatten(0, 1)
        yield rows[:, positions], table[positions]
        return
    flat = x.flatten(2)
    groups = int(call.options.get("groups", 1))
    if call.kind == "transposed":
        rows = flat[:, :, _lattice(x.shape[2:]).to(x.device)].transpose(1, 2).flatten(0, 1)
        for repeat in positions.T:
            yield rows[:, repeat, None], weight[repeat].reshape(channels, 1, -1)
        return
    at, inside = _taps(x, weight, call.options)
    taken = (flat[:, :, at] * inside).permute(0, 2, 1, 3).flatten(0, 1)  # [rows, all channels, taps]
    per_group, outputs = positions.shape[1] // groups, weight.shape[0] // groups
    for g in range(groups):
        own = positions[:, g * per_group : (g + 1) * per_group]
        kernel = weight[g * outputs : (g + 1) * outputs, own - g * weight.shape[1]].flatten(3)
        every = torch.arange(taken.shape[1], device=own.device)
        used = taken if groups == own.shape[1] == 1 and torch.equal(own[:, 0], every) else taken[:, own].flatten(2)
        yield used, kernel.permute(1, 2, 3, 0).flatten(1, 2)


def _lattice(sizes: Sequence[int]) -> Tensor:
    """At most :data:`PATCHES` flat positions, spread evenly over all dimensions (Roberts' R-sequence)."""
    total = math.prod(sizes)
    if total <= PATCHES:
        return torch.arange(total)
    root = 2.0
    for _ in range(50):
        root = (1 + root) ** (1 / (len(sizes) + 1))
    steps = torch.arange(1, PATCHES + 1, dtype=torch.float64)
    flat = torch.zeros(PATCHES, dtype=torch.int64)
    for dim, size in enumerate(sizes):
        flat = flat * size + (((0.5 + steps / root ** (dim + 1)) % 1) * size).long()
    return flat


def _taps(x: Tensor, weight: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Input positions under the kernel at lattice points of the output, and which of them exist, ``[points, taps]``."""
    kernel, sizes = weight.shape[2:], x.shape[2:]
    dims = len(kernel)
    stride, dilation = _each(options.get("stride", 1), dims), _each(options.get("dilation", 1), dims)
    padding = options.get("padding", 0)
    if padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        after = [d * (k - 1) - b for d, k, b in zip(dilation, kernel, before, strict=True)]
    else:
        before = after = [0] * dims if padding == "valid" else _each(padding, dims)
    outputs = [
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(sizes, before, after, dilation, kernel, stride, strict=True)
    ]
    points = torch.stack(torch.unravel_index(_lattice(outputs), outputs), 1)
    taps = torch.stack(torch.unravel_index(torch.arange(math.prod(kernel)), tuple(kernel)), 1)
    at = points[:, None] * torch.tensor(stride) + taps[None] * torch.tensor(dilation) - torch.tensor(before)
    inside = ((at >= 0) & (at < torch.tensor(sizes))).all(2)
    flat = torch.zeros(at.shape[:2], dtype=torch.int64)
    for dim, size in enumerate(sizes):
        flat = flat * size + at[..., dim].clamp(0, size - 1)
    return flat.to(x.device), inside.to(x.device, x.dtype)


def _each(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value] * (dims if len(value) == 1 else 1)
