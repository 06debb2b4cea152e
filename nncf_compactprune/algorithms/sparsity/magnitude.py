"""``magnitude_sparsity``: the smallest weights are zero (NNCF 2.x), through ``nncf.prune``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.sparsity.base import ScheduledSparsity, warn_unread
from nncf_compactprune.algorithms.sparsity.config import MagnitudeSparsityConfig
from nncf_compactprune.algorithms.sparsity.constant import ConstSparsity
from nncf_compactprune.algorithms.sparsity.regularised import RBSparsity
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl


class MagnitudeSparsity(ScheduledSparsity):
    """Weights of least magnitude go, more with every epoch; they may come back until the masks freeze.

    Deviation: ``"local"`` takes the scheduled share of each layer. NNCF 2.x had no schedule for it.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    name = "magnitude_sparsity"
    summary = "Single weights to zero by magnitude, with NNCF 2.x's keys and schedules, through nncf.prune"
    Config: ClassVar[type[AlgorithmConfig]] = MagnitudeSparsityConfig
    adjustable: ClassVar[bool] = True
    config: MagnitudeSparsityConfig

    def __init__(self, config: MagnitudeSparsityConfig, context: Context) -> None:
        super().__init__(config, context)
        warn_unread(config, self.name)

    def set_level(self, value: float) -> None:
        super().set_level(value)
        if self._sparsity is not None:
            params = self.config.params
            local = params.sparsity_level_setting_mode == "local"
            self._sparsity.by_magnitude(value, local=local, normalised=params.weight_importance == "normed_abs")

    @property
    def compression_rate(self) -> float:
        return self.sparsity

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        if not 0 <= value < 1:
            msg = f"compression_rate: expected a share of zeros in [0, 1), got {value}."
            raise BudgetError(msg)
        self.set_level(value)

    @property
    def maximal_compression_rate(self) -> float:
        return 1 - 1e-9


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers NNCF 2.x's three kinds of sparsity."""
    return [MagnitudeSparsity, RBSparsity, ConstSparsity]
