"""A layer's weight as a sum of parallel branches, each with a learned scale for every output channel.

    W = a ⊙ K + b ⊙ point(P) + c ⊙ I        for every group

K is a kernel of W's shape, P a 1×1 convolution at the kernel's middle tap, I hands channel i to channel i there; a, b
and c have one entry an output channel. P is left out where the kernel has one tap, as K is 1×1 then, and I where a
group's inputs and outputs differ in number.

Parallel linear branches that are merged into one kernel are RepVGG's (Ding et al. 2021, arXiv 2101.03697) and Diverse
Branch Block's (Ding et al. 2021, arXiv 2103.13425), with a BatchNorm a branch. As in OREPA (Hu et al. 2022, arXiv
2204.00826), learned scales take the place of those, and kernels are added instead of feature maps: one convolution
runs. Ours: the start. P is drawn at random, b and c begin at fixed values, and K is what makes the sum the
trained weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.overparameterization.factors import Geometry
from nncf_compactprune.algorithms.overparameterization.weight_hooks import ReplacedWeight

POINT_SCALE, IDENTITY_SCALE = 1.0, 0.1  # b and c at the start; a is 1


class BranchedWeight(ReplacedWeight):
    """The hook on a layer's weight. Its parameters are the branches and their scales.

    :param geometry: of the weight.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        groups, outs, ins = geometry.groups, geometry.outs, geometry.ins
        self.kernel = nn.Parameter(torch.zeros(groups, outs, geometry.taps, ins))
        self.kernel_scale = nn.Parameter(torch.zeros(groups, outs))
        self.point: nn.Parameter | None = None
        self.point_scale: nn.Parameter | None = None
        self.identity_scale: nn.Parameter | None = None
        if geometry.taps > 1:
            self.point = nn.Parameter(torch.zeros(groups, outs, ins))
            self.point_scale = nn.Parameter(torch.zeros(groups, outs))
        if ins == outs:
            self.identity_scale = nn.Parameter(torch.zeros(groups, outs))

    @torch.no_grad()
    def assign(self, weight: Tensor, generator: torch.Generator) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        target = self.geometry.matrices(weight.detach()).to("cpu", torch.float64)
        values = {"kernel": torch.zeros_like(target), "kernel_scale": torch.ones(target.shape[:2])}
        if self.point is not None:
            drawn = torch.randn(self.point.shape, generator=generator, dtype=torch.float64)
            values["point"] = drawn * target.square().mean().sqrt()
            values["point_scale"] = torch.full(target.shape[:2], POINT_SCALE)
        if self.identity_scale is not None:
            values["identity_scale"] = torch.full(target.shape[:2], IDENTITY_SCALE)
        for name, value in values.items():
            getattr(self, name).data = value.to(weight.device, dtype)
        self.kernel.data = (target - self.matrices(torch.float64)).to(weight.device, dtype).contiguous()

    def matrices(self, dtype: torch.dtype | None = None) -> Tensor:
        def of(parameter: nn.Parameter) -> Tensor:
            return parameter if dtype is None else parameter.detach().to("cpu", dtype)

        merged = of(self.kernel_scale)[..., None, None] * of(self.kernel)
        middle: Tensor | None = None
        if self.point is not None and self.point_scale is not None:
            middle = of(self.point_scale)[..., None] * of(self.point)
        if self.identity_scale is not None:
            handed_on = torch.diag_embed(of(self.identity_scale))
            middle = handed_on if middle is None else middle + handed_on
        if middle is None:
            return merged
        before = self._middle_tap
        return merged + nn.functional.pad(middle[:, :, None], (0, 0, before, self.geometry.taps - before - 1))

    @property
    def _middle_tap(self) -> int:
        """The middle of the kernel, of even sizes the later one, counted over all taps."""
        tap = 0
        for size in self.geometry.shape[2:]:
            tap = tap * size + size // 2
        return tap

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> BranchedWeight:
        """Builds the hook; branches and scales come from the state dict."""
        return cls(Geometry(tuple(state["shape"]), state["groups"], state["transposed"]))
