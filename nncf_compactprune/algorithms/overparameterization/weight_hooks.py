"""NNCF function hooks that give a layer another weight than its own, made of parameters of theirs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from nncf_compactprune.algorithms.overparameterization.factors import Geometry
from nncf_compactprune.host.nncf_hooks import HookModule, without_function_mode


class MergedWeights(dict[str, Tensor]):
    """The merged weights of the last forward in training mode, by name. A copied model must not share or copy them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeights:
        return MergedWeights()


class ReplacedWeight(HookModule):
    """Base of the hooks on a layer's weight. The parameters of the hook stand for the weight.

    :param geometry: of the weight.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.used = False
        self.trainable = True  # whether the weight itself is, once the hook is gone
        self.watch: tuple[str, MergedWeights] | None = None

    @abstractmethod
    def assign(self, weight: Tensor, generator: torch.Generator) -> None:
        """Takes over a weight exactly, with its device, in float32 at least.

        :param weight: of the shape that ``geometry`` states.
        :param generator: of random parts, on the CPU.
        """

    @abstractmethod
    def matrices(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the parameters stand for.

        :param dtype: compute in this precision, on the CPU and without gradients; None: as the parameters are.
        :return: ``[groups, out, taps, in]``.
        """

    def forward(self, weight: Tensor) -> Tensor:
        """What the layer computes with; ``weight`` itself only says dtype and memory format."""
        if not self.used:  # written once: a value that changes at every call would make torch.compile start anew
            self.used = True
        if torch.compiler.is_compiling():
            return self.given(weight)
        # NNCF would name every operation in here, and look for hooks on it: most of the time that merging takes.
        with without_function_mode():
            return self.given(weight)

    def given(self, weight: Tensor) -> Tensor:
        """The merged weight, of the dtype and memory format of ``weight``."""
        # In half precision three roundings would add up, in the weight itself.
        with torch.autocast(weight.device.type, enabled=False):
            merged = self.geometry.weight(self.matrices())
        if self.watch is not None and self.training and torch.is_grad_enabled():
            name, seen = self.watch
            seen[name] = merged
        channels_last = merged.dim() == 4 and not weight.is_contiguous()
        kept = torch.channels_last if channels_last else torch.contiguous_format
        return merged.to(weight.dtype).contiguous(memory_format=kept)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight, computed in float64 on the CPU, in the parameters' dtype and on their device."""
        return self.geometry.weight(self.matrices(torch.float64)).to(next(self.parameters()))

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        geometry = {"shape": list(self.geometry.shape), "groups": self.geometry.groups}
        return {**geometry, "transposed": self.geometry.transposed}
