"""A layer's weight as a product of three: factorise exactly, merge cheaply.

Every layer is read as one matrix ``[out, in]`` per group and kernel tap, W_t = F3 · F2_t · F1 (ExpandNets, Guo et al.
2020; Linear Over-parameterization, arXiv 2204.11444), with expansion r, n outputs and m inputs of a group:

    first F1 [groups, r·m, m]      core F2 [groups, r·n, taps, r·m]      last F3 [groups, n, r·n]

so a k×k convolution is a chain 1×1, k×k, 1×1; a linear layer is a → ra → rb → b; a depthwise convolution is
1 → r → r → 1 in each channel. The core's layout is ours: both products of a merge are plain matrix products on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


@dataclass(frozen=True)
class Geometry:
    """How a weight reads as matrices.

    :param shape: the weight's shape: ``[out, in / groups, *kernel]``, transposed ``[in, out / groups, *kernel]``.
    :param groups: groups of the convolution.
    :param transposed: whether it is a transposed convolution.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """The geometry of one of :data:`LAYERS`."""
        weight = module.weight
        if isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
            return cls(tuple(weight.shape))  # type: ignore[arg-type]
        return cls(tuple(weight.shape), int(module.groups), bool(module.transposed))  # type: ignore[arg-type]

    @property
    def outs(self) -> int:
        """Outputs n of a group."""
        return self.shape[1] if self.transposed else self.shape[0] // self.groups

    @property
    def ins(self) -> int:
        """Inputs m of a group."""
        return self.shape[0] // self.groups if self.transposed else self.shape[1]

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.shape[2:])

    def factor_shapes(self, expansion: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of the three factors."""
        wide_ins, wide_outs = expansion * self.ins, expansion * self.outs
        return (
            (self.groups, wide_ins, self.ins),
            (self.groups, wide_outs, self.taps, wide_ins),
            (self.groups, self.outs, wide_outs),
        )

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as ``[groups, out, taps, in]``, a view."""
        if self.transposed:
            return weight.reshape(self.groups, self.ins, self.outs, self.taps).permute(0, 2, 3, 1)
        return weight.reshape(self.groups, self.outs, self.ins, self.taps).transpose(2, 3)

    def weight(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`."""
        kernel = self.shape[2:]
        if self.transposed:
            return matrices.permute(0, 3, 1, 2).reshape(self.shape)
        return matrices.reshape(self.shape[0], *kernel, self.ins).movedim(-1, 1)

    def core_weight(self, core: Tensor, expansion: int) -> Tensor:
        """The core as the weight of the chain's middle layer, in the layer's own layout.

        :param core: ``[groups, r·n, taps, r·m]``.
        :param expansion: r.
        """
        wide = list(self.shape)
        wide[0], wide[1] = expansion * self.shape[0], expansion * self.shape[1]
        return Geometry(tuple(wide), self.groups, self.transposed).weight(core)


class Factors(NamedTuple):
    """The three factors of one weight, in the order in which an input meets them; shapes above."""

    first: Tensor
    core: Tensor
    last: Tensor


def factorise(
    weight: Tensor, geometry: Geometry, expansion: int, generator: torch.Generator, *, core_scale: float = 0.0
) -> Factors:
    """Factors whose product is the weight, to rounding (about 1e-7 in float32).

    With P of orthonormal columns, Q of orthonormal rows (QR of Gaussian draws) and any R of the core's shape,

        F1 = P      F2 = R + Qᵀ (W − Q R P) Pᵀ      F3 = Q

    multiply to W. Without R, factors under plain SGD never leave the span of P and Q: their gradients lie in it, and so
    do momentum and decay. The expansion r then has no effect at all; it is a square factorisation in rotated
    coordinates. A random R makes the added directions take part, at the same exact start.

    :param weight: the layer's weight, in its own layout.
    :param geometry: how the weight is read as matrices.
    :param expansion: r, at least 1.
    :param generator: a CPU generator for the random draws.
    :param core_scale: standard deviation of R's entries, relative to the root mean square of the weight's. 0: no R.
    :return: in the weight's dtype, float32 at least, on the weight's device.
    """
    matrices = geometry.matrices(weight.detach()).to("cpu", torch.float64)
    first_shape, core_shape, last_shape = geometry.factor_shapes(expansion)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    first = torch.linalg.qr(draw(first_shape))[0]
    last = torch.linalg.qr(draw((last_shape[0], last_shape[2], last_shape[1])))[0].mT
    core = torch.zeros(core_shape, dtype=torch.float64)
    if core_scale:
        core = draw(core_shape) * (core_scale * matrices.square().mean().sqrt())
        matrices = matrices - merge(Factors(first, core, last))
    core += merge(Factors(first.mT.contiguous(), matrices.contiguous(), last.mT.contiguous()))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    first, core, last = (factor.to(weight.device, dtype).contiguous() for factor in (first, core, last))
    return Factors(first, core, last)


def merge(factors: Factors) -> Tensor:
    """F3 · F2_t · F1 for every group and tap.

    The narrower side is contracted first: about r² n m min(n, m) multiplications a tap.

    :return: ``[groups, out, taps, in]``.
    """
    first, core, last = factors
    groups, wide_outs, taps, wide_ins = core.shape
    outs, ins = last.shape[1], first.shape[2]
    if outs <= ins:
        half = torch.bmm(last, core.reshape(groups, wide_outs, taps * wide_ins))
        merged = torch.bmm(half.view(groups, outs * taps, wide_ins), first)
    else:
        half = torch.bmm(core.reshape(groups, wide_outs * taps, wide_ins), first)
        merged = torch.bmm(last, half.view(groups, wide_outs, taps * ins))
    return merged.view(groups, outs, taps, ins)
