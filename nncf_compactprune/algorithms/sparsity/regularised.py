"""``rb_sparsity``: masks are learned, under a loss that asks for a share of zeros (Louizos et al. 2018, arXiv
1712.01312, as NNCF 2.x had it), through ``nncf.prune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.sparsity.base import ScheduledSparsity, warn_unread
from nncf_compactprune.algorithms.sparsity.config import RBSparsityConfig
from nncf_compactprune.algorithms.sparsity.schedules import Adaptive
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.host.nncf_sparsity import RBLoss
from nncf_compactprune.host.optimizers import join_first


class RBSparsity(ScheduledSparsity):
    """The masks are parameters, so they belong to the optimizer; ``loss()`` pulls them to the level.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    name = "rb_sparsity"
    summary = "Single weights to zero by learned masks, with NNCF 2.x's keys and schedules, through nncf.prune"
    Config: ClassVar[type[AlgorithmConfig]] = RBSparsityConfig
    learned: ClassVar[bool] = True
    config: RBSparsityConfig

    def __init__(self, config: RBSparsityConfig, context: Context) -> None:
        super().__init__(config, context)
        warn_unread(config, self.name)
        self._loss: RBLoss | None = None
        adaptive = config.params.schedule == "adaptive"
        self._adaptive = Adaptive(config.params, config.sparsity_init) if adaptive else None

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        super().prepare(state)
        if self._sparsity is None or self._frozen:
            return
        self._loss = RBLoss(self.context.model, self._level)
        factor = self.config.compression_lr_multiplier
        if factor is not None:
            for parameter in self._sparsity.mask_parameters():
                parameter.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        self.attached()

    def attached(self) -> None:
        """An optimizer that was built before there were masks learns them too."""
        if self.context.optimizer is not None and self._sparsity is not None:
            join_first(self.context.optimizer, list(self._sparsity.mask_parameters()))

    def set_level(self, value: float) -> None:
        super().set_level(value)
        if self._loss is not None:
            self._loss.target_ratio = value

    def level_at(self, epoch: float) -> float:
        return super().level_at(epoch) if self._adaptive is None else self._adaptive(self.sparsity)

    def freeze(self) -> None:
        super().freeze()
        self._loss = None
        if self._sparsity is not None:
            self._sparsity.fix()

    def loss(self) -> Tensor | float:
        if self._loss is None:
            return 0.0
        loss: Tensor = self._loss()
        return loss.to(self.context.device)

    def strip(self) -> None:
        self._loss = None
        super().strip()

    @property
    def compression_rate(self) -> float:
        return self._level

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        self.set_level(value)

    def get_state(self) -> dict[str, Any]:
        adaptive = self._adaptive
        return {**super().get_state(), "adaptive": None if adaptive is None else [adaptive.current, adaptive.waited]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if self._adaptive is not None and state["adaptive"] is not None:
            self._adaptive.current, self._adaptive.waited = float(state["adaptive"][0]), int(state["adaptive"][1])
