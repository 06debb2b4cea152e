"""How far a scheduled algorithm is at each epoch: 0 at the start, 1 at its target."""

from __future__ import annotations

from collections.abc import Mapping

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


def exponential(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Share removed after ``epoch`` of ``steps`` epochs, fast at first (NNCF's exponential ratio).

    :param epoch: counted from 0, where pruning starts.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    """
    if epoch >= steps or initial >= target:
        return target
    return float(exponential_ratio_scheduler(epoch, initial_ratio=initial, target_ratio=target, target_epoch=steps))


@hookimpl
def compactprune_schedules() -> Mapping[str, Schedule]:
    """Offers the built-in schedules."""
    return {"one_shot": one_shot, "exponential": exponential}
