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

_CHOICES = 8  # widths that a group may take, at least
_NARROW = 32  # positions below which a group takes any width
_VECTOR = 32  # no vectors in use are wider
RESOLUTION = 1e-6  # of the bisections: finer than one channel in any group

Widths = npt.NDArray[np.float64]
Scores = Sequence[npt.NDArray[np.float64]]
Normalizer = Literal["mean", "max", "sum", "none"]


@dataclass(frozen=True)
class Limits:
    """What bounds every group.

    :param min_channels: least channels kept; 0: one, or none of a whole residual branch.
    :param max_ratio: largest share removed of what keeps any, in [0, 1].
    :param round_to: widths are multiples of this many positions; a group that is no multiple may stay whole.
        ``"auto"``: of an eighth of the group's positions, brought down to a power of two of at most :attr:`vector`; any
        width below 32 positions.
    :param vector: what was measured to be the width of the device's vectors; None: not measured, 32.
    """

    min_channels: int = 1
    max_ratio: float = 1.0
    round_to: int | Literal["auto"] = 1
    vector: int | None = None

    def step(self, positions: int) -> int:
        """What widths of a group are multiples of.

        Runtimes like multiples of 8, 16 and 32: ONNX Runtime takes a slower way where a depthwise convolution is no
        multiple of 8. But a 16-wide layer would have one or two choices then, and the wide layers would pay for it with
        capacity that no training brings back. Multiples of 2 were too many for it already.

        :param positions: outputs of the group's first producer.

        >>> [Limits(round_to="auto").step(positions) for positions in (10, 16, 32, 100, 128, 512)]
        [1, 1, 4, 8, 16, 32]
        """
        if self.round_to != "auto":
            return self.round_to
        if positions < _NARROW:
            return 1
        return min(1 << (positions // _CHOICES).bit_length() - 1, self.vector or _VECTOR)


def allowed_widths(group: ChannelGroup, limits: Limits) -> npt.NDArray[np.int64]:
    """Widths a group may take while it keeps any channel, ascending, the dense width last.

    A channel of a grouped or repeated group stands for several positions of its producer; ``round_to`` counts
    positions. What an operation wants multiples of comes on top.

    :param group: the channel group.
    :param limits: bounds of its width.
    """
    repeats = group.members[0].indices.shape[1]
    positions = limits.step(repeats * group.size)
    step = math.lcm(positions // math.gcd(positions, repeats), group.multiple)
    least = max(limits.min_channels, math.ceil((1 - limits.max_ratio) * group.size - 1e-9), 1)
    if least >= group.size:
        return np.array([group.size])
    multiples = np.arange(math.ceil(least / step) * step, group.size, step)
    return np.append(multiples, group.size)


def least_widths(graph: ChannelGraph, prunable: Sequence[bool], limits: Limits, *, whole: bool = False) -> Widths:
    """The least that every group may keep, ``[groups]``.

    :param graph: the dense model's channels.
    :param prunable: which groups may be cut, ``[groups]``.
    :param limits: bounds of every group.
    :param whole: while it keeps any channel.
    """
    groups = zip(graph.groups, prunable, strict=True)
    least = np.array([allowed_widths(g, limits)[0] if free else g.size for g, free in groups], np.float64)
    for branch in () if whole else removable_branches(graph, prunable, limits):
        least[branch] = 0
    return least


def removable_branches(graph: ChannelGraph, prunable: Sequence[bool], limits: Limits) -> list[npt.NDArray[np.int64]]:
    """Groups that may keep no channel, a branch an entry: none or all of its groups do. Groups out of scope hold their
    branch.

    :param graph: the dense model's channels.
    :param prunable: which groups may be cut, ``[groups]``.
    :param limits: bounds of every group.
    """
    if limits.min_channels > 0:
        return []
    return [np.array(groups) for groups in graph.branches.values() if all(prunable[group] for group in groups)]


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

    ``allowed`` are the widths of a group while it keeps any channel; beside them, all groups of an entry of
    ``branches`` may keep none.

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
        self.branches = removable_branches(graph, prunable, limits)
        self.floor = np.array([options[0] for options in self.allowed], np.float64)
        for branch in self.branches:
            self.floor[branch] = 0
        for kind, most in self.budgets.items():
            least, dense = self.costs[kind](self.floor), self.costs[kind](self.sizes)
            if least > most:
                shown = partial(_shown, kind)
                offered = sum(one.size for one in graph.pinned if one.kind == "approximate")
                consent = (
                    f' {offered} more channels go with "allow_approximate": true, which changes what normalisations '
                    "over channels compute."
                )
                msg = (
                    f"budget: {kind} of at most {shown(most)} ({most / max(dense, 1):.1%} of {shown(dense)}) cannot be "
                    f"reached: with min_channels={limits.min_channels}, max_ratio={limits.max_ratio}, "
                    f"round_to={limits.round_to} and {sum(map(bool, prunable))} of {len(self.allowed)} groups prunable "
                    f"the least is {shown(least)} ({least / max(dense, 1):.1%}). Raise the budget or loosen the floors."
                    f"{consent if offered else ''}"
                )
                raise BudgetError(msg)

    def fits(self, widths: Widths) -> bool:
        """Whether all budgets hold."""
        return all(self.costs[kind](widths) <= most for kind, most in self.budgets.items())

    def allows(self, widths: Widths) -> bool:
        """Whether every group has an allowed width, or none with all of its branch.

        :param widths: ``[groups]``.
        """
        if widths.shape != self.sizes.shape:
            return False
        gone = {int(group) for branch in self.branches if not widths[branch].any() for group in branch}
        return all(g in gone or widths[g] in options for g, options in enumerate(self.allowed))

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
    to the groups that rounding has left furthest below it. Scores play no part. Branches go only where no share would
    fit, those that save the most first.

    :param problem: allowed widths, costs and budgets.
    :param scores: not used.
    """
    gone = np.zeros(len(problem.sizes), bool)

    def widths_at(share: float) -> Widths:
        widths = np.array([problem.round_up(g, share * size) for g, size in enumerate(problem.sizes)], np.float64)
        return np.where(gone, 0, widths)

    while not problem.fits(least := widths_at(0.0)):
        left = [branch.tolist() for branch in problem.branches if least[branch].any()]
        missing = {kind: max(problem.costs[kind](least) - most, 1) for kind, most in problem.budgets.items()}
        gone[max(left, key=lambda branch: _saving_of_branch(problem, missing, least, branch))] = True
    return _filled(problem, _largest(problem, widths_at, 0.0, 1.0))


def _filled(problem: AllocationProblem, widths: Widths) -> Widths:
    """One allowed width more for each group, the narrowest share first, as long as the budgets hold."""
    widths = widths.copy()
    for group in np.argsort(widths / problem.sizes, kind="stable"):
        if not widths[group]:
            continue
        trial = widths.copy()
        trial[group] = problem.round_up(int(group), widths[group] + 1)
        if problem.fits(trial):
            widths = trial
    return widths


def global_ranking(problem: AllocationProblem, scores: Scores) -> Widths:
    """One threshold for all channels, on normalised scores: see :meth:`AllocationProblem.normalized`. A branch goes
    where all of its channels are below it.

    :param problem: allowed widths, costs and budgets.
    :param scores: one score a channel for each group, ``[group.size]``; larger ones are kept.
    """
    scaled = [np.sort(s)[::-1] for s in problem.normalized(scores)]
    thresholds = np.unique(np.concatenate(scaled)) if scaled else np.zeros(0)

    def widths_at(position: float) -> Widths:
        """Position 1 keeps everything above the lowest threshold, position 0 nothing above the highest."""
        at = round((1 - position) * len(thresholds))
        bound = thresholds[at] if at < len(thresholds) else math.inf
        above = np.array([np.count_nonzero(s >= bound) for s in scaled], np.float64)
        widths = np.array([problem.round_up(g, width) for g, width in enumerate(above)], np.float64)
        for branch in problem.branches:
            if not above[branch].any():
                widths[branch] = 0
        return widths

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
    channels besides, in other groups or pinned, these count as kept. A side that keeps nothing, of a branch that goes,
    loses what one with a single channel does: its shortcut stays.

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
    for index in (int(index) for branch in problem.branches for index in branch):
        result[index][-1] = result[index][-2]
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
    :param curves: for each group the loss at every number removed, ``[channels]`` or one more, convex, rising.
    :return: widths, ``[groups]``.
    """
    descent = _Descent(problem, curves)
    heap = [(descent.price(step), step) for step in descent.steps]
    heapq.heapify(heap)
    while heap and not problem.fits(descent.widths):
        _, step = heapq.heappop(heap)
        current = descent.price(step)
        if math.isinf(current):
            continue
        if heap and current > heap[0][0]:
            heapq.heappush(heap, (current, step))
            continue
        for other in descent.take(step):
            heapq.heappush(heap, (descent.price(other), other))
    if not problem.fits(descent.widths):
        return problem.floor
    return descent.given_back()


class _Descent:
    """Widths on their way down, and the steps from there. Step g takes group g to its next allowed width. Behind those
    of all groups come the branches': one takes every channel that its groups still keep, for what these lose together.

    :param problem: allowed widths, costs and budgets.
    :param curves: see :func:`lazy_greedy`; a curve that ends before all channels says what the last ones lose, too.
    """

    def __init__(self, problem: AllocationProblem, curves: Scores) -> None:
        self.problem = problem
        self.widths = np.array([options[-1] for options in problem.allowed], np.float64)
        self.steps = range(len(self.widths) + len(problem.branches))
        missing = {kind: problem.costs[kind](problem.sizes) - most for kind, most in problem.budgets.items()}
        self._missing = {kind: excess for kind, excess in missing.items() if excess > 0}  # others hold whatever goes
        self._curves = curves
        self._level = [len(options) - 1 for options in problem.allowed]
        self._branch_of = {int(g): at for at, branch in enumerate(problem.branches) for g in branch}

    def price(self, step: int) -> float:
        """Loss over saving; inf where there is no such step, or it saves nothing."""
        groups = self._groups(step)
        if not self.widths[groups].all() or (step < len(self.widths) and not self._level[step]):
            return math.inf
        if step < len(self.widths):
            options, at = self.problem.allowed[step], self._level[step]
            after = [int(options[at - 1])]
            saving = _saving(self.problem, self._missing, self.widths, step, int(options[at]) - after[0])
        else:
            after = [0] * len(groups)
            saving = _saving_of_branch(self.problem, self._missing, self.widths, groups)
        loss = sum(self._lost(g, width) - self._lost(g, self.widths[g]) for g, width in zip(groups, after, strict=True))
        return max(loss, 0.0) / saving if saving > 0 else math.inf

    def take(self, step: int) -> list[int]:
        """Takes a step.

        :return: the steps whose price it changes most.
        """
        if step >= len(self.widths):
            self.widths[self._groups(step)] = 0
            return []
        self._level[step] -= 1
        self.widths[step] = self.problem.allowed[step][self._level[step]]
        branch = self._branch_of.get(step)
        return [step] if branch is None else [step, len(self.widths) + branch]

    def given_back(self) -> Widths:
        """Undoes steps that the last one made needless, dearest first."""
        while True:
            best, gain = -1, 0.0
            for step in self.steps:
                trial = self._back(step)
                if trial is None:
                    continue
                groups = self._groups(step)
                back = sum(self._lost(g, self.widths[g]) - self._lost(g, trial[g]) for g in groups)
                if back > gain and self.problem.fits(trial):
                    best, gain = step, back
            trial = self._back(best) if best >= 0 else None
            if trial is None:
                return self.widths
            self.widths = trial
            if best < len(self.widths):
                self._level[best] += 1

    def _back(self, step: int) -> Widths | None:
        """The widths with one step undone; None where it was not taken."""
        trial: Widths = self.widths.copy()
        groups = self._groups(step)
        if step >= len(trial):
            if trial[groups].any():
                return None
            trial[groups] = [self.problem.allowed[g][self._level[g]] for g in groups]
            return trial
        options = self.problem.allowed[step]
        if not trial[step] or self._level[step] + 1 >= len(options):
            return None
        trial[step] = options[self._level[step] + 1]
        return trial

    def _groups(self, step: int) -> list[int]:
        branch = step - len(self.widths)
        return [step] if branch < 0 else self.problem.branches[branch].tolist()

    def _lost(self, group: int, width: float) -> float:
        curve = self._curves[group]
        return float(curve[min(int(self.problem.sizes[group]) - int(width), len(curve) - 1)])


def _saving(problem: AllocationProblem, missing: Mapping[str, int], widths: Widths, group: int, removed: int) -> float:
    """The largest share of what a budget missed at first, among the budgets still missed, that a step saves."""
    return _largest_share(problem, missing, widths, lambda kind: problem.costs[kind].saved(widths, group, removed))


def _saving_of_branch(
    problem: AllocationProblem, missing: Mapping[str, int], widths: Widths, groups: Sequence[int]
) -> float:
    """The same of all channels of some groups."""
    after = widths.copy()
    after[groups] = 0
    costs = problem.costs
    return _largest_share(problem, missing, widths, lambda kind: costs[kind](widths) - costs[kind](after))


def _largest_share(
    problem: AllocationProblem, missing: Mapping[str, int], widths: Widths, saved: Callable[[str], float]
) -> float:
    shares = [0.0]
    for kind, first in missing.items():
        excess = problem.costs[kind](widths) - problem.budgets[kind]
        if excess > 0:
            shares.append(min(saved(kind), excess) / first)
    return max(shares)


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
    allowed = problem.allows(widths)
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
