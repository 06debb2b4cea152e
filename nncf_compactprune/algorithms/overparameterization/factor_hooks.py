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
from nncf_compactprune.host.nncf_hooks import HookModule, without_function_mode

Mode = Literal["merged", "chain"]


class MergedWeights(dict[str, Tensor]):
    """The merged weights of the last forward in training mode, by name. A copied model must not share or copy them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeights:
        return MergedWeights()


class FactorizedWeight(HookModule):
    """The hook on a layer's weight. Its parameters are ``first``, ``core`` and ``last``, see
    :mod:`nncf_compactprune.algorithms.overparameterization.factors`.

    :param geometry: of the weight.
    :param expansion: how many times wider the inner layers are.
    :param mode: give the layer the merged weight, or the core where other hooks run ``first`` and ``last``.
    """

    def __init__(self, geometry: Geometry, expansion: int, mode: Mode = "merged") -> None:
        super().__init__()
        self.geometry = geometry
        self.expansion = expansion
        self.mode = mode
        self.used = False
        self.trainable = True  # whether the weight itself is, once the hook is gone
        shapes = geometry.factor_shapes(expansion)
        self.first, self.core, self.last = (nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.watch: tuple[str, MergedWeights] | None = None
        self.bias: list[Tensor | None] = []  # what the chain adds in the end

    @property
    def factors(self) -> Factors:
        """The three parameters."""
        return Factors(self.first, self.core, self.last)

    def assign(self, weight: Tensor, generator: torch.Generator, core_scale: float) -> None:
        """Takes over a weight exactly, with dtype and device.

        :param weight: of the shape that ``geometry`` states.
        :param generator: of the random part of the factors, on the CPU.
        :param core_scale: see :func:`~nncf_compactprune.algorithms.overparameterization.factors.factorise`.
        """
        made = factorise(weight, self.geometry, self.expansion, generator, core_scale=core_scale)
        for parameter, value in zip(self.factors, made, strict=True):
            parameter.data = value

    def forward(self, weight: Tensor) -> Tensor:
        """What the layer computes with; ``weight`` itself only says dtype and memory format."""
        if not self.used:  # written once: a value that changes at every call would make torch.compile start anew
            self.used = True
        if torch.compiler.is_compiling():
            return self._weight(weight)
        # NNCF would name every operation in here, and look for hooks on it: most of the time that merging takes.
        with without_function_mode():
            return self._weight(weight)

    def _weight(self, weight: Tensor) -> Tensor:
        if self.mode == "chain":
            return self.geometry.core_weight(self.core, self.expansion).to(weight.dtype)
        # In half precision three roundings would add up, in the weight itself.
        with torch.autocast(weight.device.type, enabled=False):
            merged = self.geometry.weight(merge(self.factors))
        if self.watch is not None and self.training and torch.is_grad_enabled():
            name, seen = self.watch
            seen[name] = merged
        channels_last = merged.dim() == 4 and not weight.is_contiguous()
        kept = torch.channels_last if channels_last else torch.contiguous_format
        return merged.to(weight.dtype).contiguous(memory_format=kept)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight that the factors stand for, multiplied in float64 on the CPU, in the factors' dtype."""
        doubled = Factors(*(factor.detach().to("cpu", torch.float64) for factor in self.factors))
        return self.geometry.weight(merge(doubled)).to(self.core)

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        geometry = {"shape": list(self.geometry.shape), "groups": self.geometry.groups}
        return {**geometry, "transposed": self.geometry.transposed, "expansion": self.expansion, "mode": self.mode}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> FactorizedWeight:
        """Builds the hook; the factors come from the state dict."""
        geometry = Geometry(tuple(state["shape"]), state["groups"], state["transposed"])
        return cls(geometry, state["expansion"], state["mode"])


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
