"""Which channels to keep, as pure mathematics on statistics: no model in here.

*Trace ratio*: the subset of a given size with the largest ``Σ between / Σ within`` (Nie et al. 2008, "Trace Ratio
Criterion for Feature Selection"). *Joint removal*: channels in the order in which a quadratic form of what is removed
grows least. Both give a :class:`RemovalCurve` for a group, over which
:func:`nncf_compactprune.decide.budgets.lazy_greedy` shares out a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
    best = _best(between, width)
    while True:
        with np.errstate(over="ignore", invalid="ignore"):  # a ratio may be infinite; it then outweighs any scatter
            kept = _best(np.where(within > 0, between - ratio * within, between), width)
            total = within[kept].sum()
            risen = float(between[kept].sum() / total) if total > 0 else 0.0
        if risen <= ratio:  # the fixpoint; another set of the same score may have no ratio at all
            return TraceRatio(best, ratio, tuple(history))
        best, ratio = kept, risen
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
    """The trace-ratio optimum of every width; the loss is the share of the scatter between classes that goes.

    :param between: scatter of class means, ``[channels]``, non-negative.
    :param within: scatter inside classes, ``[channels]``, non-negative.
    """
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

    :param gram: the loss form, ``[channels, channels]``.
    :param exponent: the power, in [0, 1].
    """
    mean = float(np.diag(gram).mean())
    return gram * mean**-exponent if mean > 0 else gram
