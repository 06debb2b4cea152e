"""Who goes: allocation of channels under budgets of MACs and parameters, on exact costs, and of measured time.

Scores rank channels inside a group; an allocation decides how many each group keeps. All budgets hold at once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from nncf_compactprune.channels import ChannelGraph, ChannelGroup
from nncf_compactprune.config.registered import qualified_name
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.plugins.hookspecs import Allocation, hookimpl

RESOLUTION = 1e-6  # of the bisections: finer than one channel in any group

Widths = npt.NDArray[np.float64]
Scores = Sequence[npt.NDArray[np.float64]]
Normalizer = Literal["mean", "max", "sum", "none"]


@dataclass(frozen=True)
class Limits:
    """What bounds every group.

    :param min_channels: least channels kept.
    :param max_ratio: largest share removed, in [0, 1].
    :param round_to: widths are multiples of this many positions; a group that is no multiple may stay whole.
        ``"auto"``: of a sixteenth of the group's positions, brought down to a power of two between 1 and 8.
    :param vector: what was measured to be the width of the device's vectors, which ``"auto"`` then goes by: multiples
        of an eighth of the group's positions, brought down to a power of two between 1 and this; None: not measured.
    """

    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | Literal["auto"] = 1
    vector: int | None = None

    def step(self, positions: int) -> int:
        """What widths of a group are multiples of.

        Vector units like widths of 8, but a 16-wide layer would have two choices then, and the wide layers would pay
        for it with capacity that no training brings back.

        :param positions: outputs of the group's first producer.

        >>> [Limits(round_to="auto").step(positions) for positions in (10, 16, 32, 100, 512)]
        [1, 1, 2, 4, 8]
        """
        if self.round_to != "auto":
            return self.round_to
        choices, most = (16, 8) if self.vector is None else (8, self.vector)
        return min(1 << max(positions // choices, 1).bit_length() - 1, most)


def allowed_widths(group: ChannelGroup, limits: Limits) -> npt.NDArray[np.int64]:
    """Widths a group may take, ascending, the dense width last.

    A channel of a grouped or repeated group stands for several positions of its producer; ``round_to`` counts
    positions.

    :param group: the channel group.
    :param limits: bounds of its width.
    """
    repeats = group.members[0].indices.shape[1]
    positions = limits.step(repeats * group.size)
    step = positions // math.gcd(positions, repeats)
    least = max(limits.min_channels, math.ceil((1 - limits.max_ratio) * group.size - 1e-9), 1)
    if least >= group.size:
        return np.array([group.size])
    multiples = np.arange(math.ceil(least / step) * step, group.size, step)
    return np.append(multiples, group.size)


def least_widths(graph: ChannelGraph, prunable: Sequence[bool], limits: Limits) -> Widths:
    """The least that every group may keep, ``[groups]``.

    :param graph: the dense model's channels.
    :param prunable: which groups may be cut, ``[groups]``.
    :param limits: bounds of every group.
    """
    groups = zip(graph.groups, prunable, strict=True)
    return np.array([allowed_widths(g, limits)[0] if free else g.size for g, free in groups], np.float64)


class CostOfWidths(Protocol):
    """What a network costs at any widths."""

    def __call__(self, widths: Widths) -> int:
        """The cost at the given group widths, ``[groups]``."""

    def saved(self, widths: Widths, group: int, removed: int) -> float:
        """What removing channels of one group saves.

        :param widths: of all groups before, ``[groups]``.
        :param group: its index.
        :param removed: how many of its channels go.
        """


class AllocationProblem:
    """The problem: groups, their allowed widths, costs and budgets.

    :param graph: the dense model's channels.
    :param prunable: which groups may be cut, shape ``[groups]``.
    :param budgets: kind (``"macs"``, ``"params"``, ``"latency"``) to the most that may be left.
    :param limits: bounds of every group.
    :param widest: the most that each group may still keep, an allowed width, ``[groups]``; None: all of it.
    :param latency: nanoseconds of one request at any widths, where there is such a budget.
    :param normalizer: how scores of different groups are made comparable, see :meth:`normalized`.
    :raises BudgetError: the floors make a budget unreachable; the message states the reachable minimum.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        prunable: Sequence[bool],
        budgets: Mapping[str, int],
        limits: Limits,
        widest: npt.NDArray[np.int64] | None = None,
        latency: CostOfWidths | None = None,
        normalizer: Normalizer = "mean",
    ) -> None:
        self.graph = graph
        self.normalizer = normalizer
        self.costs: dict[str, CostOfWidths] = {"macs": graph.cost.macs, "params": graph.cost.params}
        if latency is not None:
            self.costs["latency"] = latency
        self.budgets = dict(budgets)
        self.sizes = graph.sizes.astype(np.float64)
        self.allowed = [
            allowed_widths(group, limits) if free else np.array([group.size])
            for group, free in zip(graph.groups, prunable, strict=True)
        ]
        if widest is not None:
            self.allowed = [options[options <= most] for options, most in zip(self.allowed, widest, strict=True)]
        self.floor = np.array([options[0] for options in self.allowed], np.float64)
        for kind, most in self.budgets.items():
            least, dense = self.costs[kind](self.floor), self.costs[kind](self.sizes)
            if least > most:
                shown = partial(_shown, kind)
                msg = (
                    f"budget: {kind} of at most {shown(most)} ({most / max(dense, 1):.1%} of {shown(dense)}) cannot be "
                    f"reached: with min_channels={limits.min_channels}, max_ratio={limits.max_ratio}, "
                    f"round_to={limits.round_to} and {sum(map(bool, prunable))} of {len(self.allowed)} groups prunable "
                    f"the least is {shown(least)} ({least / max(dense, 1):.1%}). Raise the budget or loosen the floors."
                )
                raise BudgetError(msg)

    def fits(self, widths: Widths) -> bool:
        """Whether all budgets hold."""
        return all(self.costs[kind](widths) <= most for kind, most in self.budgets.items())

    def normalized(self, scores: Scores) -> list[npt.NDArray[np.float64]]:
        """Scores over their group's mean, largest or sum, or as they are: the scales of layers differ.

        :param scores: one score a channel for each group, ``[group.size]``.
        """
        if self.normalizer == "none":
            return list(scores)
        return [s / max(float(getattr(s, self.normalizer)()), 1e-12) for s in scores]

    def round_up(self, group: int, width: float) -> int:
        """The smallest allowed width of at least ``width``.

        :param group: the group's index.
        :param width: in channels; may be a fraction.
        """
        options = self.allowed[group]
        return int(options[min(int(np.searchsorted(options, width - 1e-9)), len(options) - 1)])


def _shown(kind: str, cost: int) -> str:
    return f"{cost / 1e6:.3g} ms" if kind == "latency" else f"{cost:,}"


def uniform(problem: AllocationProblem, scores: Scores) -> Widths:
    """The same share of every group: the largest share whose widths fit (bisection). What the budget still allows goes
    to the groups that rounding has left furthest below it. Scores play no part.

    :param problem: allowed widths, costs and budgets.
    :param scores: not used.
    """

    def widths_at(share: float) -> Widths:
        return np.array([problem.round_up(g, share * size) for g, size in enumerate(problem.sizes)], np.float64)

    return _filled(problem, _largest(problem, widths_at, 0.0, 1.0))


def _filled(problem: AllocationProblem, widths: Widths) -> Widths:
    """One allowed width more for each group, the narrowest share first, as long as the budgets hold."""
    widths = widths.copy()
    for group in np.argsort(widths / problem.sizes, kind="stable"):
        trial = widths.copy()
        trial[group] = problem.round_up(int(group), widths[group] + 1)
        if problem.fits(trial):
            widths = trial
    return widths


def global_ranking(problem: AllocationProblem, scores: Scores) -> Widths:
    """One threshold for all channels, on normalised scores: see :meth:`AllocationProblem.normalized`.

    :param problem: allowed widths, costs and budgets.
    :param scores: one score a channel for each group, ``[group.size]``; larger ones are kept.
    """
    scaled = [np.sort(s)[::-1] for s in problem.normalized(scores)]
    thresholds = np.unique(np.concatenate(scaled)) if scaled else np.zeros(0)

    def widths_at(position: float) -> Widths:
        """Position 1 keeps everything above the lowest threshold, position 0 nothing above the highest."""
        at = round((1 - position) * len(thresholds))
        bound = thresholds[at] if at < len(thresholds) else math.inf
        return np.array(
            [problem.round_up(g, float(np.count_nonzero(s >= bound))) for g, s in enumerate(scaled)], np.float64
        )

    return _largest(problem, widths_at, 0.0, 1.0)


def _largest(problem: AllocationProblem, widths_at: Callable[[float], Widths], low: float, high: float) -> Widths:
    """Bisection for the largest argument that fits; ``widths_at`` grows with it and fits at ``low``."""
    if problem.fits(widths_at(high)):
        return widths_at(high)
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        if problem.fits(widths_at(middle)):
            low = middle
        else:
            high = middle
    return widths_at(low)


def greedy(problem: AllocationProblem, scores: Scores) -> Widths:
    """Removes step by step what costs the least score for the most budget: :func:`lazy_greedy` on the scores lost
    (normalised, as in :func:`global_ranking`).

    :param problem: allowed widths, costs and budgets.
    :param scores: one score a channel for each group, ``[group.size]``; larger ones are kept.
    """
    scaled = [np.sort(s) for s in problem.normalized(scores)]
    return lazy_greedy(problem, [np.concatenate([[0.0], np.cumsum(s)]) for s in scaled])


def balanced(problem: AllocationProblem, scores: Scores) -> Widths:
    """As :func:`greedy`, by what the layers' inputs and outputs keep: see :func:`capacity_lost`.

    :param problem: allowed widths, costs and budgets.
    :param scores: one score a channel for each group, ``[group.size]``, not negative; larger ones are kept.
    """
    return lazy_greedy(problem, capacity_lost(problem, [np.cumsum(np.sort(s)) for s in scores]))


def capacity_lost(problem: AllocationProblem, lost: Scores) -> list[npt.NDArray[np.float64]]:
    """What a group loses at every width: the sum over the layer sides that it is part of, each −log of the share that
    the side keeps, ``[channels + 1]``.

    A side is the input or the output of one layer. The sum over the network is −log of the product of all shares: no
    layer can make up for another that is nearly gone, and a residual stream counts as often as layers read and write
    it. Layers of equal cost, with equal channels, keep equal shares, as in :func:`uniform`. Where a side has other
    channels besides, in other groups or pinned, these count as kept.

    :param problem: groups and the shapes of their parameters.
    :param lost: for each group what goes with its least one, two, ... channels, ``[channels]``, rising, convex.
    """
    shapes = problem.graph.parameters
    result = []
    for group, losses in zip(problem.graph.groups, lost, strict=True):
        share = np.concatenate([[0.0], losses]) / max(float(losses[-1]), 1e-30)
        sides = [m.indices.size / shapes[m.parameter][m.dim] for m in group.with_role("producer", "consumer")]
        kept = 1 - np.outer(np.minimum(sides or [1.0], 1.0), share)
        result.append(-np.log(kept.clip(1e-9, 1)).sum(0))
    return result


def least_loss(problem: AllocationProblem, scores: Scores) -> Widths:
    """As :func:`greedy`, for scores that are losses in one unit all over the network: nothing is scaled.

    :param problem: allowed widths, costs and budgets.
    :param scores: one loss a channel for each group, ``[group.size]``, in one unit for the whole network.
    """
    return lazy_greedy(problem, [np.concatenate([[0.0], np.cumsum(np.sort(s))]) for s in scores])


def lazy_greedy(problem: AllocationProblem, curves: Scores) -> Widths:
    """Stage 1: widths of all groups under every budget, by the least loss for the most missing budget.

    A step takes a group to its next allowed width; its price is the loss over the share that it saves, on exact cost
    polynomials, of what the dense network is above budget; of several budgets still missed, the largest share counts.
    Prices only rise, on convex curves and as savings shrink with the other groups, so a popped step that is still the
    cheapest is the cheapest of all.

    When the budget holds, steps are taken back where it allows, dearest first.

    :param problem: allowed widths, costs and budgets.
    :param curves: for each group the loss at every number removed, ``[channels]``, convex, rising.
    :return: widths, ``[groups]``.
    """
    widths = np.array([options[-1] for options in problem.allowed], np.float64)
    missing = {kind: problem.costs[kind](problem.sizes) - most for kind, most in problem.budgets.items()}
    missing = {kind: excess for kind, excess in missing.items() if excess > 0}  # the others hold whatever goes
    level = [len(options) - 1 for options in problem.allowed]

    def price(group: int) -> float:
        options, at = problem.allowed[group], level[group]
        if at == 0:
            return math.inf
        dense = int(problem.sizes[group])
        saving = _saving(problem, missing, widths, group, int(options[at] - options[at - 1]))
        loss = curves[group][dense - int(options[at - 1])] - curves[group][dense - int(options[at])]
        return max(float(loss), 0.0) / saving if saving > 0 else math.inf

    heap = [(price(group), group) for group in range(len(widths))]
    heapq.heapify(heap)
    while heap and not problem.fits(widths):
        _, group = heapq.heappop(heap)
        current = price(group)
        if math.isinf(current):
            continue
        if heap and current > heap[0][0]:
            heapq.heappush(heap, (current, group))
            continue
        level[group] -= 1
        widths[group] = problem.allowed[group][level[group]]
        heapq.heappush(heap, (price(group), group))
    if not problem.fits(widths):
        return problem.floor
    return _given_back(problem, curves, widths, level)


def _saving(problem: AllocationProblem, missing: Mapping[str, int], widths: Widths, group: int, removed: int) -> float:
    """The largest share of what a budget missed at first, among the budgets still missed, that a step saves."""
    shares = [0.0]
    for kind, first in missing.items():
        excess = problem.costs[kind](widths) - problem.budgets[kind]
        if excess > 0:
            shares.append(min(problem.costs[kind].saved(widths, group, removed), excess) / first)
    return max(shares)


def _given_back(problem: AllocationProblem, curves: Scores, widths: Widths, level: list[int]) -> Widths:
    """Undoes steps that the last one made needless."""
    while True:
        best, gain = -1, 0.0
        for group, options in enumerate(problem.allowed):
            if level[group] + 1 >= len(options):
                continue
            trial = widths.copy()
            trial[group] = options[level[group] + 1]
            dense = int(problem.sizes[group])
            back = float(curves[group][dense - int(widths[group])] - curves[group][dense - int(trial[group])])
            if back > gain and problem.fits(trial):
                best, gain = group, back
        if best < 0:
            return widths
        level[best] += 1
        widths[best] = problem.allowed[best][level[best]]


def choose(widths: Widths, scores: Scores) -> list[npt.NDArray[np.bool_]]:
    """Keeps the highest scores of every group; among equals the earlier channel.

    :param widths: channels kept, ``[groups]``.
    :param scores: one score a channel for each group, ``[group.size]``; larger ones are kept.
    :return: for each group which channels stay, shape ``[group.size]``.
    """
    result = []
    for width, score in zip(widths, scores, strict=True):
        keep = np.zeros(len(score), bool)
        keep[np.argsort(-score, kind="stable")[: int(width)]] = True
        result.append(keep)
    return result


def allocate(problem: AllocationProblem, scores: Scores, allocation: Allocation) -> list[npt.NDArray[np.bool_]]:
    """Solves the problem.

    :param problem: allowed widths, costs and budgets.
    :param scores: for each group one score a channel, finite, larger kept.
    :param allocation: says how wide each group stays.
    :return: for each group which channels stay, ``[group.size]``.
    :raises BudgetError: the widths are not allowed ones, or exceed a budget: a mistake of the allocation.
    """
    widths = np.asarray(allocation(problem, scores), np.float64)
    allowed = widths.shape == problem.sizes.shape and all(
        width in options for width, options in zip(widths, problem.allowed, strict=True)
    )
    if not allowed or not problem.fits(widths):
        fault = "exceed a budget" if allowed else "are not one allowed width for every group"
        msg = f"allocation {qualified_name(allocation)}: its widths {fault}: {widths.tolist()}. Use problem.allowed."
        raise BudgetError(msg)
    return choose(widths, scores)


@hookimpl
def compactprune_allocations() -> Mapping[str, Allocation]:
    """Offers the built-in allocations."""
    return {
        "uniform": uniform,
        "global": global_ranking,
        "greedy": greedy,
        "balanced": balanced,
        "least_loss": least_loss,
    }
