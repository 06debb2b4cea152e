"""Which channels to keep, as pure mathematics on statistics: no model in here.

*Trace ratio*: the subset of a given size with the largest ``Σ between / Σ within`` (Nie et al. 2008, "Trace Ratio
Criterion for Feature Selection"). *Joint removal*: channels in the order in which a quadratic form of what is removed
grows least. Both give a :class:`RemovalCurve` per group; :func:`lazy_greedy` (stage 1) shares a budget out over them on
exact costs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nncf_compactprune.budget import Allocation, Widths

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TraceRatio:
    """A subset with the largest trace ratio of its size.

    :param kept: which channels, ``[channels]``.
    :param ratio: ``Σ between / Σ within`` over them; inf where they have no scatter within.
    :param history: λ of every iteration; it never falls.
    """

    kept: Mask
    ratio: float
    history: tuple[float, ...]


def trace_ratio(between: Floats, within: Floats, width: int) -> TraceRatio:
    """The subset of ``width`` channels that maximises ``Σ between / Σ within``, exactly.

    Nie et al. 2008: score ``between - λ·within``, keep the best ``width``, let λ be their ratio, until λ stays. From
    any subset λ rises to the global optimum, as λ* is the root of the falling convex function ``max_S Σ (b - λw)``, and
    this is Newton's method on it. Among equal scores the earlier channel is kept.

    Subsets without any scatter within have no ratio: the one with the largest scatter between wins if it has
    any, else all of its ratios count as 0.

    :param between: scatter of class means, ``[channels]``, non-negative.
    :param within: scatter inside classes, ``[channels]``, non-negative.
    :param width: channels kept, from 1 to all.
    """
    still = np.flatnonzero(within <= 0)
    if len(still) >= width and between[still].max() > 0:
        kept = _best(np.where(within <= 0, between, -1.0), width)
        return TraceRatio(kept, math.inf, (math.inf,))
    ratio, history = 0.0, [0.0]
    while True:
        kept = _best(between - ratio * within, width)
        total = float(within[kept].sum())
        risen = float(between[kept].sum()) / total if total > 0 else 0.0
        if risen <= ratio:  # up to rounding, equal: the fixpoint
            return TraceRatio(kept, max(ratio, risen), tuple(history))
        ratio = risen
        history.append(ratio)


def _best(scores: Floats, width: int) -> Mask:
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:width]] = True
    return kept


@dataclass(frozen=True)
class RemovalCurve:
    """What a group loses at every width.

    :param loss: lost when that many channels are removed, ``[channels]`` for 0 to all but one; ``loss[0]`` is 0.
    :param kept: the channels that stay then, ``[channels, channels]``, one row a number removed.
    """

    loss: Floats
    kept: npt.NDArray[np.bool_]

    @property
    def convex(self) -> Floats:
        """The largest convex, rising curve below :attr:`loss`: its steps never get cheaper, as lazy greedy needs."""
        rising = np.minimum.accumulate(np.maximum(self.loss, 0)[::-1])[::-1]
        hull: list[int] = []
        for at in range(len(rising)):
            while len(hull) > 1 and (rising[hull[-1]] - rising[hull[-2]]) * (at - hull[-1]) >= (
                rising[at] - rising[hull[-1]]
            ) * (hull[-1] - hull[-2]):
                hull.pop()
            hull.append(at)
        return np.interp(np.arange(len(rising)), hull, rising[hull])


def trace_ratio_curve(between: Floats, within: Floats) -> RemovalCurve:
    """The trace-ratio optimum of every width; the loss is the share of the scatter between classes that goes."""
    kept = np.array([trace_ratio(between, within, width).kept for width in range(len(between), 0, -1)])
    total = max(float(between.sum()), np.finfo(np.float64).tiny)
    return RemovalCurve(1 - kept @ between / total, kept)


def joint_removal(gram: Floats) -> RemovalCurve:
    """Removes channel by channel what adds least to ``Σ_{k,l removed} gram[k, l]``.

    With ``gram[k, l] = Σ_i t_ik t_il`` that is the squared effect of all removed channels *together*: two channels that
    do the same count four times when both go, two that cancel count nothing. Among equals the later channel goes.

    :param gram: symmetric, positive semi-definite, ``[channels, channels]``.
    """
    size = len(gram)
    kept = np.ones((size, size), bool)
    loss = np.zeros(size)
    price = np.diag(gram).astype(np.float64)
    for removed in range(1, size):
        kept[removed] = kept[removed - 1]
        candidates = np.where(kept[removed], price, math.inf)
        goes = size - 1 - int(np.argmin(candidates[::-1]))
        kept[removed, goes] = False
        loss[removed] = loss[removed - 1] + candidates[goes]
        price = price + 2 * gram[:, goes]
    return RemovalCurve(loss, kept)


def damped(gram: Floats, exponent: float) -> Floats:
    """A loss form over the mean loss of its channels to some power: 0 leaves it, 1 gives every group the same mean.

    Losses are taken at the dense network, where the groups that look cheapest look too cheap: they are all cut at
    once, and what they lose adds up.
    """
    mean = float(np.diag(gram).mean())
    return gram * mean**-exponent if mean > 0 else gram


def lazy_greedy(problem: Allocation, curves: Sequence[Floats]) -> Widths:
    """Stage 1: widths of all groups under every budget, by the least loss for the most missing budget.

    A step takes a group to its next allowed width; its price is the loss over the share that it saves, on exact cost
    polynomials, of what the dense network is above budget; of several budgets still missed, the largest share counts.
    Prices only rise, on convex curves and as savings shrink with the other groups, so a popped step that is still the
    cheapest is the cheapest of all.

    When the budget holds, steps are taken back where it allows, dearest first.

    :param curves: for each group the loss at every number removed, ``[channels]``, convex, rising.
    :return: widths, ``[groups]``.
    """
    widths = problem.sizes.copy()
    missing = {kind: problem.graph.cost[kind](widths) - most for kind, most in problem.budgets.items()}
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
    taken: list[int] = []
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
        taken.append(group)
        heapq.heappush(heap, (price(group), group))
    if not problem.fits(widths):
        return problem.floor
    return _given_back(problem, curves, widths, level)


def _saving(problem: Allocation, missing: Mapping[str, int], widths: Widths, group: int, removed: int) -> float:
    """The largest share of what a budget missed at first, among the budgets still missed, that a step saves."""
    shares = [0.0]
    for kind, most in problem.budgets.items():
        excess = problem.graph.cost[kind](widths) - most
        if excess > 0:
            shares.append(min(problem.graph.cost[kind].saved(widths, group, removed), excess) / missing[kind])
    return max(shares)


def _given_back(problem: Allocation, curves: Sequence[Floats], widths: Widths, level: list[int]) -> Widths:
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
