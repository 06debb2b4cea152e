"""What networks of other widths cost, and how far each is on the way from the dense one to the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from nncf_compactprune.algorithms.latency import LatencyTarget
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import Budget
from nncf_compactprune.config.budget import KINDS, Kind


@dataclass(frozen=True)
class Costs:
    """A network's costs under a budget. Rates are shares of a cost that go.

    :param graph: the dense model's channels.
    :param budget: what may be left.
    :param times: measured for its latency; None where it limits none.
    """

    graph: ChannelGraph
    budget: Budget
    times: LatencyTarget | None

    @property
    def kinds(self) -> Sequence[Kind]:
        """What is budgeted; MACs and parameters always are, by all that there are if need be."""
        return KINDS if self.times is not None else KINDS[:2]

    def cost(self, kind: Kind, widths: npt.NDArray[Any]) -> int:
        """
        :param kind: of cost.
        :param widths: of every group, ``[groups]``.
        """
        if kind != "latency":
            return self.graph.cost[kind](widths)
        assert self.times is not None
        return self.times.model(widths)

    def dense_and_saved(self, kind: Kind) -> tuple[int, int]:
        """What the dense model costs, and how much of it the budget takes away.

        :param kind: of cost.
        """
        dense = self.cost(kind, self.graph.sizes)
        return dense, dense - min(self.budget.resolve(kind, dense), dense)

    @property
    def target(self) -> float:
        """The rate of the tightest budget; below 0 where all allow more than there is."""
        dense = {kind: self.cost(kind, self.graph.sizes) for kind in self.kinds}
        return max(1 - self.budget.resolve(kind, cost) / max(cost, 1) for kind, cost in dense.items())

    def budgets(self, rate: float, target: float) -> dict[str, int]:
        """The largest costs at a rate: every budget loosened by the same share of its way, or tightened beyond it.

        :param rate: on the way.
        :param target: at its end.
        """
        budgets: dict[str, int] = {}
        share = 1.0 if rate == target else rate / target if target > 0 else 0.0
        for kind in self.kinds:
            dense, saved = self.dense_and_saved(kind)
            budgets[kind] = dense - (saved if share == 1 else math.floor(saved * share))
        if target <= 0 < rate:  # the configuration asks for nothing, a search does
            dense = self.graph.macs
            budgets["macs"] = dense - math.floor(dense * rate)
        return budgets

    def rate_of(self, widths: npt.NDArray[Any], target: float) -> float:
        """The share removed of the cost that is budgeted, the larger of several.

        :param widths: of every group, ``[groups]``.
        :param target: see :meth:`budgets`.
        """
        rates = [0.0]
        for kind in self.kinds:
            dense, saved = self.dense_and_saved(kind)
            if saved > 0 or (kind == "macs" and target <= 0):
                rates.append(1 - self.cost(kind, widths) / max(dense, 1))
        return max(rates)

    def largest_rate(self, floor: npt.NDArray[Any], target: float) -> float:
        """The largest rate that the floors leave reachable.

        :param floor: least width of every group, ``[groups]``.
        :param target: see :meth:`budgets`.
        """
        rates = []
        for kind in self.kinds:
            dense, saved = self.dense_and_saved(kind)
            removable = dense - self.cost(kind, floor)
            if target > 0 and saved:
                rates.append(target * removable / saved)
            elif target <= 0 and kind == "macs":
                rates.append(removable / max(dense, 1))
        return max(min(rates, default=0.0) - 1e-9, 0.0)
