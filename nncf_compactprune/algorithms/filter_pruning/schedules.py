"""The schedules of NNCF 2.x's ``filter_pruning``: the level of pruning in each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from scipy.optimize import brentq

ScheduleName = Literal["baseline", "exponential", "exponential_with_bias"]


def level(schedule: ScheduleName, epoch: int, *, initial: float, target: float, steps: int) -> float:
    """The level in an epoch; the target is reached in epoch ``steps - 1``.

    >>> [round(level("exponential", epoch, initial=0.1, target=0.4, steps=4), 3) for epoch in range(4)]
    [0.1, 0.214, 0.313, 0.4]

    :param schedule: ``"baseline"`` is the target at once.
    :param epoch: counted from 0, where pruning starts.
    :param initial: level in epoch 0, in [0, 1).
    :param target: level in the end, in [0, 1).
    :param steps: number of epochs in which the level rises.
    """
    last = steps - 1
    if schedule == "baseline" or epoch >= last or initial >= target:
        return target
    curve = _exponential if schedule == "exponential" else _with_bias
    return min(curve(initial, target, last)(epoch), target)


def _exponential(initial: float, target: float, last: int) -> Callable[[int], float]:
    """The share that is left falls by the same factor in every epoch."""
    return lambda epoch: 1 - (1 - initial) * ((1 - target) / (1 - initial)) ** (epoch / last)


def bias_is_possible(initial: float, target: float) -> bool:
    """Whether a curve a·exp(-k·epoch) + b can pass through the three points that ``exponential_with_bias`` asks for.

    :param initial: level in epoch 0.
    :param target: level in the end.
    """
    return initial < 0.75 * target or initial >= target  # the latter is the target at once


def _with_bias(initial: float, target: float, last: int) -> Callable[[int], float]:
    """a·exp(-k·epoch) + b through ``initial`` in epoch 0, three quarters of ``target`` after an eighth of the epochs,
    and ``target`` in epoch ``last`` (Zhang et al. 2018, arXiv 1808.07471).

    With y = exp(-k·last) the middle point says y^(1/8) = 1 - c·(1 - y), where c is the part of the way that it stands
    for. The root at y = 1 is no curve; the other one lies below it for c above 1/8, and above it otherwise.
    """
    part = (0.75 * target - initial) / (target - initial)

    def miss(y: float) -> float:
        return float(y**0.125 - 1 + part * (1 - y))

    if math.isclose(part, 0.125, rel_tol=1e-6):
        return lambda epoch: initial + (target - initial) * epoch / last
    y = brentq(miss, 1e-300, 1 - 1e-9) if part > 0.125 else brentq(miss, 1 + 1e-9, (8 / part) ** 2)
    rate = -math.log(y) / last
    scale = (target - initial) / (y - 1)
    return lambda epoch: scale * (math.exp(-rate * epoch) - 1) + initial
