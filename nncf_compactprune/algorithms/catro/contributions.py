"""What the channels of a group contribute to the operations that consume them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nncf_compactprune.algorithms.catro.consumers import Call, Use
from nncf_compactprune.host.distributed import summed

PATCHES = 4  # output positions looked at in each sample
SKETCH = 64  # outputs of a consumer, at most; more are mixed down at random
CHUNK_ELEMENTS = 2**23  # of one intermediate result


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
        """Adds the samples of one call.

        :param call: the consumer's operation, with its input and weight.
        :param use: where it takes the group's channels in.
        """
        for at, (inputs, weights) in enumerate(_blocks(call, use.positions.to(call.x.device))):
            wide = torch.promote_types(inputs.dtype, torch.float32)
            mixed = _sketched(weights.to(wide))
            if at == len(self.sums):
                self.sums.append(torch.zeros(mixed.shape[0], mixed.shape[2], dtype=torch.float64))
                self.rows.append(torch.zeros((), dtype=torch.float64))
            rows = max(1, CHUNK_ELEMENTS // max(mixed.shape[0] * mixed.shape[2], 1))
            for part in torch.split(inputs.to(wide), rows):
                contributed = torch.bmm(part.transpose(0, 1), mixed)
                flat = contributed.flatten(1)
                self.products += (flat @ flat.T).to("cpu", torch.float64)
            total = torch.bmm(inputs.to(wide).sum(0)[:, None], mixed)[:, 0]
            self.sums[at] += total.to("cpu", torch.float64)
            self.rows[at] += len(inputs)

    def all_reduce(self) -> None:
        """Sums up over all processes."""
        blocks = len(self.sums)
        self.products, *rest = summed([self.products, *self.sums, *self.rows])
        self.sums, self.rows = rest[:blocks], rest[blocks:]

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
        rows = flat[:, _lattice(tuple(x.shape[1:-1]), PATCHES).to(x.device)].flatten(0, 1)
        yield rows[:, positions], table[positions]
        return
    flat = x.flatten(2)
    groups = int(call.options.get("groups", 1))
    if call.kind == "transposed":
        rows = flat[:, :, _lattice(tuple(x.shape[2:]), PATCHES).to(x.device)].transpose(1, 2).flatten(0, 1)
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


@cache
def _lattice(sizes: tuple[int, ...], most: int) -> Tensor:
    """At most so many flat positions, spread evenly over all dimensions (Roberts' R-sequence)."""
    total = math.prod(sizes)
    if total <= most:
        return torch.arange(total)
    root = 2.0
    for _ in range(50):
        root = (1 + root) ** (1 / (len(sizes) + 1))
    steps = torch.arange(1, most + 1, dtype=torch.float64)
    flat = torch.zeros(most, dtype=torch.int64)
    for dim, size in enumerate(sizes):
        flat = flat * size + (((0.5 + steps / root ** (dim + 1)) % 1) * size).long()
    return flat


def _taps(x: Tensor, weight: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Input positions under the kernel at lattice points of the output, and which of them exist, ``[points, taps]``."""
    dims = weight.dim() - 2
    padding = options.get("padding", 0)
    at, inside = _window(
        tuple(x.shape[2:]), tuple(weight.shape[2:]), _each(options.get("stride", 1), dims),
        _each(options.get("dilation", 1), dims), padding if isinstance(padding, str) else _each(padding, dims),
        PATCHES,
    )  # fmt: skip
    return at.to(x.device), inside.to(x.device, x.dtype)


@cache
def _window(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str | tuple[int, ...],
    most: int,
) -> tuple[Tensor, Tensor]:
    dims = len(kernel)
    before: Sequence[int]
    after: Sequence[int]
    if padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        after = [d * (k - 1) - b for d, k, b in zip(dilation, kernel, before, strict=True)]
    else:
        before = after = [0] * dims if isinstance(padding, str) else padding
    outputs = tuple(
        (n + b + a - d * (k - 1) - 1) // s + 1
        for n, b, a, d, k, s in zip(sizes, before, after, dilation, kernel, stride, strict=True)
    )
    points = torch.stack(torch.unravel_index(_lattice(outputs, most), outputs), 1)
    taps = torch.stack(torch.unravel_index(torch.arange(math.prod(kernel)), kernel), 1)
    at = points[:, None] * torch.tensor(stride) + taps[None] * torch.tensor(dilation) - torch.tensor(before)
    inside = ((at >= 0) & (at < torch.tensor(sizes))).all(2)
    flat = torch.zeros(at.shape[:2], dtype=torch.int64)
    for dim, size in enumerate(sizes):
        flat = flat * size + at[..., dim].clamp(0, size - 1)
    return flat, inside


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (int(value),) * dims
    return tuple(int(v) for v in value) * (dims if len(value) == 1 else 1)
