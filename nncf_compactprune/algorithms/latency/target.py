"""Widths whose measured time holds a budget: measured, modelled, allocated and measured again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from nncf.common.logging import nncf_logger

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.latency.candidates import Candidates
from nncf_compactprune.algorithms.latency.model import Measured, TimeModel
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import Budget
from nncf_compactprune.decide.budgets import Limits, least_widths, removable_branches
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.serving.meter import MeterOptions

TOLERANCE = 0.05
"""How far, relative, the measured time may be from what was asked for."""
_CLOSE = (0.97, 1.01)  # of what was asked for, where the search ends
_SAMPLES = 3  # networks of random widths that the model learns from, beside the dense and the smallest
_STAYS = 0.7  # of the branches that may go, in these networks
_ROUNDS = 7  # most candidates that are measured
_LESSONS = 2  # after so many of them the model learns
_CHOICES = 3  # networks that are chosen and measured anew, at most


@dataclass(frozen=True)
class LatencyResult:
    """What a budget of time came to.

    :param asked_ms: milliseconds of one request.
    :param ms: what the network takes, by its ratio to the dense one.
    :param dense_ms: what the dense network took at the start.
    :param ratio: of both, measured in turns and anew: not by the measurement that chose the network.
    :param spread: what the ratio is uncertain by, relative.
    :param chosen_by: the ratio that chose it.
    :param vector: how many channels the device takes at once, as far as that shows; else 1.
    :param measured: every network that was measured, the final one included.
    :param title: what measured and how, such as ``OpenVINO 2026.4.1 on CPU, FP32, batch 1, 1 thread``.
    :param seconds: what all measurements took, in this run or in an earlier one that left them in the cache.
    """

    asked_ms: float
    ms: float
    dense_ms: float
    ratio: float
    spread: float
    chosen_by: float
    vector: int
    measured: tuple[Measured, ...]
    title: str
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the network takes no longer than asked for, but for the tolerance."""
        return self.ms <= self.asked_ms * (1 + TOLERANCE)

    def to_markdown(self) -> list[str]:
        """Every network that was measured, as a table."""
        dense = max(sum(self.measured[0].widths), 1)
        return [
            "| channels kept | time of the dense | ± | seconds of measuring |",
            "| ---: | ---: | ---: | ---: |",
            *(
                f"| {sum(one.widths) / dense:.1%} | {one.ratio:.1%} | {one.spread:.1%} | {one.seconds:.1f} |"
                for one in self.measured
            ),
        ]

    def __str__(self) -> str:
        return (
            f"{self.ms:.3g} ms ({self.ratio:.1%} of {self.dense_ms:.3g} ms, ± {self.spread:.1%}), asked "
            f"{self.asked_ms:.3g} ms; {self.title}; measured anew, chosen at {self.chosen_by:.1%}; "
            f"{len(self.measured)} networks in {self.seconds:.0f} s"
        )


class LatencyTarget:
    """A budget of time on a device.

    :param budget: the limits; its ``latency`` is given.
    :param context: the model and where meters come from.
    :param graph: the dense model's channels.
    :param prunable: which groups may be cut, ``[groups]``.
    :param limits: bounds of every group's width.
    :raises BudgetError: the smallest network that the limits allow takes longer; both were measured.
    :raises ExportError: no such device, or the network does not run there.
    """

    def __init__(
        self, budget: Budget, context: Context, graph: ChannelGraph, prunable: Sequence[bool], limits: Limits
    ) -> None:
        options = MeterOptions.of(budget)
        build = context.plugins.resolve("latency_meters", budget.runtime)
        self._candidates = Candidates(context, graph, lambda: build(options))
        self._measured: dict[tuple[int, ...], Measured] = {}
        self._final: Measured | None = None
        self._chosen_by = 1.0
        self._title = f"{self._candidates.title}, {options}"
        dense = self._kept(self._candidates.measure_dense())
        self.dense_ns = max(round(dense.dense_ms * 1e6), 1)
        self.asked_ns = min(budget.resolve("latency", self.dense_ns), self.dense_ns)
        #: what allocation goes by
        self.model = TimeModel(graph, self.dense_ns)
        least = least_widths(graph, prunable, limits)
        smallest = self._measure(least)
        if smallest.ratio > self._asked * (1 + TOLERANCE):
            msg = (
                f"budget: latency of at most {self.asked_ns / 1e6:.3g} ms ({self._asked:.1%} of "
                f"{self.dense_ns / 1e6:.3g} ms) cannot be reached: with min_channels={limits.min_channels} and "
                f"max_ratio={limits.max_ratio} the least is {self.dense_ns * smallest.ratio / 1e6:.3g} ms "
                f"({smallest.ratio:.1%}, ± {smallest.spread:.1%}), measured by {self._title}. Raise the budget or "
                "loosen the floors."
            )
            raise BudgetError(msg)
        random, whole = np.random.default_rng(0), least_widths(graph, prunable, limits, whole=True)
        branches = removable_branches(graph, prunable, limits)
        for _ in range(_SAMPLES):
            widths = np.round(whole + random.random(len(whole)) * (graph.sizes - whole))
            for branch in branches:
                widths[branch] *= random.random() < _STAYS
            self._measure(widths)
        self._learn(smallest)
        #: how many channels the device takes at once, as far as that shows: fixed here, as widths are multiples of it
        self.vector = self.model.vector
        self._smallest = smallest
        self._candidates.done()

    def refined(self, decide: Callable[[], PruningPlan]) -> PruningPlan:
        """Decides, measures, corrects the model and decides again, until the measured time holds.

        The nearest of several noisy measurements looks nearer than its network is, so the one that is chosen is
        measured anew, and the search goes on where that does not hold.

        :param decide: shares out the budget by :attr:`model`.
        :return: the plan whose time, measured anew, is closest to what was asked for.
        """
        tried: list[tuple[PruningPlan, Measured]] = []
        chosen: list[tuple[PruningPlan, Measured, float]] = []
        while len(chosen) < _CHOICES:
            self._search(decide, tried)
            plan, one = min(tried, key=lambda pair: self._distance(pair[1]))
            if any(one.widths == earlier.widths for _, earlier, _ in chosen):
                break
            fresh = self._kept(self._candidates.measure_anew(one.widths))
            tried[:] = [(p, fresh if m.widths == fresh.widths else m) for p, m in tried]
            chosen.append((plan, fresh, one.ratio))
            if abs(fresh.ratio / self._asked - 1) <= TOLERANCE or fresh.spread > TOLERANCE:
                break
            self._correct(tried)
        plan, self._final, self._chosen_by = min(chosen, key=lambda one: self._distance(one[1]))
        self._candidates.done()
        self._warn()
        return plan

    def _search(self, decide: Callable[[], PruningPlan], tried: list[tuple[PruningPlan, Measured]]) -> None:
        """Measures candidates until one is close, and adds them to those that were tried."""
        for _ in range(_ROUNDS):
            plan = decide()
            one = self._measure([group.after for group in plan.groups])
            if any(one.widths == earlier.widths for _, earlier in tried):
                break  # another budget binds, or the next step is too far
            tried.append((plan, one))
            if _CLOSE[0] <= one.ratio / self._asked <= _CLOSE[1]:
                break
            self._correct(tried)

    def _correct(self, tried: Sequence[tuple[PruningPlan, Measured]]) -> None:
        near = [self._smallest, *(one for _, one in tried)]
        if len(tried) <= _LESSONS:
            self._learn(*near)
        else:
            self.model.agree(near, self._asked)  # one model from here on, so that the search closes in

    def _warn(self) -> None:
        result = self.result
        if result is not None and result.spread > TOLERANCE:
            nncf_logger.warning(
                f"latency: the machine is too noisy for {TOLERANCE:.0%}: the ratio of {result.ratio:.1%} varied by "
                f"± {result.spread:.1%}. Let nothing else run, fix the CPU's clock, or set threads, and prune again."
            )
        elif result is not None and not result.holds:
            nncf_logger.warning(f"latency: the budget does not hold within {TOLERANCE:.0%}: {result}.")

    @property
    def result(self) -> LatencyResult | None:
        """What it came to; None before the decision."""
        one = self._final
        if one is None:
            return None
        dense_ms, seconds = self.dense_ns / 1e6, sum(each.seconds for each in self._measured.values())
        return LatencyResult(
            self.asked_ns / 1e6,
            dense_ms * one.ratio,
            dense_ms,
            one.ratio,
            one.spread,
            self._chosen_by,
            self.vector,
            tuple(self._measured.values()),
            self._title,
            seconds,
        )

    @property
    def _asked(self) -> float:
        return self.asked_ns / self.dense_ns

    def _measure(self, widths: Sequence[float] | np.typing.NDArray[np.number]) -> Measured:
        return self._kept(self._candidates.measure([float(width) for width in widths]))

    def _kept(self, one: Measured) -> Measured:
        self._measured[one.widths] = one
        return one

    def _learn(self, *near: Measured) -> None:
        """Fits the model to all that was measured, and bends it to the networks on the way to the budget."""
        self.model.fit(list(self._measured.values()))
        self.model.agree(near, self._asked)

    def _distance(self, one: Measured) -> float:
        """How far from what was asked for; too slow counts twice."""
        distance = math.log(one.ratio / self._asked)
        return 2 * distance if distance > 0 else -distance
