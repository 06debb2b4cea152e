"""How far a scheduled algorithm is at each epoch: 0 at the start, 1 at its target."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from nncf_compactprune.algorithms.filter_pruning.schedules import bias_is_possible, level
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.host.nncf_schedules import exponential_ratio_scheduler
from nncf_compactprune.plugins.hookspecs import Schedule, hookimpl


def one_shot(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Everything at once.

    :param epoch: not used.
    :param initial: not used.
    :param target: share removed, in [0, 1).
    :param steps: not used.
    """
    return target


def _until_steps(schedule: Schedule) -> Schedule:
    """The target from epoch ``steps`` on, and where there is no way to go; what the schedule says before."""

    @functools.wraps(schedule)
    def bounded(epoch: int, *, initial: float, target: float, steps: int) -> float:
        if epoch >= steps or initial >= target:
            return target
        return schedule(epoch, initial=initial, target=target, steps=steps)

    return bounded


@_until_steps
def exponential(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Share removed after ``epoch`` of ``steps`` epochs, fast at first (NNCF's exponential ratio).

    :param epoch: counted from 0, where pruning starts.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    """
    return float(exponential_ratio_scheduler(epoch, initial_ratio=initial, target_ratio=target, target_epoch=steps))


@_until_steps
def polynomial(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Share removed after ``epoch`` of ``steps`` epochs, fast at first: ``target + (initial - target)·(1 - t)³`` (Zhu
    and Gupta 2017, "To prune, or not to prune", eq. 1).

    >>> [round(polynomial(epoch, initial=0.0, target=0.8, steps=4), 3) for epoch in range(5)]
    [0.0, 0.463, 0.7, 0.788, 0.8]

    :param epoch: counted from 0, where pruning starts.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    """
    return target + (initial - target) * (1 - epoch / steps) ** 3


@_until_steps
def multistep(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Share removed in three equal steps, with as many epochs between them: after a third and two thirds of ``steps``,
    and at ``steps``.

    >>> [round(multistep(epoch, initial=0.0, target=0.6, steps=6), 3) for epoch in range(7)]
    [0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6]

    :param epoch: counted from 0, where pruning starts.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    """
    return initial + (target - initial) * (3 * epoch // steps) / 3


def exponential_with_bias(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Share removed after ``epoch`` of ``steps`` epochs: three quarters of the target after an eighth of them (Zhang et
    al. 2018, arXiv 1808.07471; as NNCF 2.x's schedule of this name, which arrives one epoch earlier).

    :param epoch: counted from 0, where pruning starts.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    :raises BudgetError: ``initial`` is too close to the target for such a curve.
    """
    if not bias_is_possible(initial, target):
        msg = (
            f'schedule: "exponential_with_bias" removes three quarters of the target ({target:.3f}) early, and '
            f'pruning_init is {initial:.3f}. Set it below {0.75 * target:.3f}, or "schedule": "exponential".'
        )
        raise BudgetError(msg)
    return level("exponential_with_bias", epoch, initial=initial, target=target, steps=steps + 1)


@hookimpl
def compactprune_schedules() -> Mapping[str, Schedule]:
    """Offers the built-in schedules."""
    every = (one_shot, exponential, exponential_with_bias, polynomial, multistep)
    return {schedule.__name__: schedule for schedule in every}
