"""NNCF function hooks that make a layer's weight a product of factors.

In mode ``"merged"`` the hook gives the layer the product, and one small convolution runs: the same function and the
same gradients as the chain of three layers, since nothing non-linear stands between them. Mode ``"chain"`` runs that
chain, for reference; its factors are the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune.algorithms.overparameterization.factors import Factors, Geometry, factorise, merge
from nncf_compactprune.algorithms.overparameterization.weight_hooks import ReplacedWeight

Mode = Literal["merged", "chain"]


class FactorizedWeight(ReplacedWeight):
    """The hook on a layer's weight. Its parameters are ``first``, ``core`` and ``last``, see
    :mod:`nncf_compactprune.algorithms.overparameterization.factors`.

    :param geometry: of the weight.
    :param expansion: how many times wider the inner layers are.
    :param mode: give the layer the merged weight, or the core where other hooks run ``first`` and ``last``.
    :param core_scale: see :func:`~nncf_compactprune.algorithms.overparameterization.factors.factorise`.
    """

    def __init__(self, geometry: Geometry, expansion: int, mode: Mode = "merged", core_scale: float = 0.0) -> None:
        super().__init__(geometry)
        self.expansion = expansion
        self.mode = mode
        self.core_scale = core_scale
        shapes = geometry.factor_shapes(expansion)
        self.first, self.core, self.last = (nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.bias: list[Tensor | None] = []  # what the chain adds in the end

    @property
    def factors(self) -> Factors:
        """The three parameters."""
        return Factors(self.first, self.core, self.last)

    def assign(self, weight: Tensor, generator: torch.Generator) -> None:
        made = factorise(weight, self.geometry, self.expansion, generator, core_scale=self.core_scale)
        for parameter, value in zip(self.factors, made, strict=True):
            parameter.data = value

    def given(self, weight: Tensor) -> Tensor:
        if self.mode == "chain":
            return self.geometry.core_weight(self.core, self.expansion).to(weight.dtype)
        return super().given(weight)

    def matrices(self, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is None:
            return merge(self.factors)
        return merge(Factors(*(factor.detach().to("cpu", dtype) for factor in self.factors)))

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        own = {"expansion": self.expansion, "mode": self.mode, "core_scale": self.core_scale}
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> FactorizedWeight:
        """Builds the hook; the factors come from the state dict."""
        geometry = Geometry(tuple(state["shape"]), state["groups"], state["transposed"])
        return cls(geometry, state["expansion"], state["mode"], state["core_scale"])


class ChainPart(nn.Module):
    """A hook beside the weight's own, with the weight's factors, which stay the weight hook's parameters alone."""

    def __init__(self, owner: FactorizedWeight) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that it is no submodule

    def pointwise(self, x: Tensor, factor: Tensor, *, linear: bool) -> Tensor:
        """Multiplies the channels of ``x`` by a factor.

        :param x: ``[n, groups * in, ...]``, or ``[..., in]`` for a linear layer.
        :param factor: ``[groups, out, in]``.
        :param linear: whether channels come last.
        :return: ``[n, groups * out, ...]``, or ``[..., out]``.
        """
        groups, outs, ins = factor.shape
        if linear:
            return functional.linear(x, factor[0])
        dims = max(len(self.owner[0].geometry.shape) - 2, 1)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return convolve(x, factor.reshape(groups * outs, ins, *[1] * dims), groups=groups)

    @property
    def linear(self) -> bool:
        return len(self.owner[0].geometry.shape) == 2


class ChainInput(ChainPart):
    """Runs the chain's first layer on the operation's input. Padding with zeros comes after it: it has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        """The operation's input."""
        return self.pointwise(x, self.owner[0].first, linear=self.linear)


class ChainBias(ChainPart):
    """Keeps the bias back until the chain's end."""

    def forward(self, bias: Tensor) -> None:
        """The operation runs without."""
        # A view, no longer the parameter: used in the chain's end, that would meet this hook again.
        self.owner[0].bias.append(bias.view_as(bias))


class ChainOutput(ChainPart):
    """Runs the chain's last layer on the operation's output, and adds the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        owner = self.owner[0]
        y = self.pointwise(x, owner.last, linear=self.linear)
        bias = owner.bias.pop() if owner.bias else None
        if bias is None:
            return y
        return y + (bias if self.linear else bias.view(-1, *[1] * (len(owner.geometry.shape) - 2)))
