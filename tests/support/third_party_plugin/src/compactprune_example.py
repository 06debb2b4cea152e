"""An algorithm, a criterion, an allocation and a schedule from outside the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nncf_compactprune.algorithms import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.decide.budgets import AllocationProblem, Scores, Widths
from nncf_compactprune.decide.criteria import CriterionContext
from nncf_compactprune.plugins.hookspecs import Algorithm, Allocation, Importance, Schedule, hookimpl


class EveryOtherParams(ChannelPruningParams):
    """How the channels are picked."""

    offset: int = Field(default=0, ge=0, le=1)


class EveryOtherConfig(ChannelPruningConfig):
    """``{"algorithm": "every_other", "budget": {"macs": 0.5}}``."""

    params: EveryOtherParams = EveryOtherParams()


class EveryOther(ChannelPruning):
    """Prefers every other channel, whatever it holds."""

    name = "every_other"
    summary = "keeps every other channel (an example)"
    Config = EveryOtherConfig

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        """One where the channel's number has the wanted parity, a half elsewhere."""
        offset = self.config.params.offset  # type: ignore[attr-defined]
        return [0.5 + 0.5 * ((torch.arange(group.size) + offset) % 2 == 0) for group in graph.groups]


def l3_importance(context: CriterionContext) -> Tensor:
    """Scores channels by the sum of cubes of what produces them.

    :param context: the group, and the network that it is scored in.
    :return: scores, ``[group.size]``; larger ones are kept.
    """
    cubes = [context.rows(member).abs().pow(3).sum(1) for member in context.group.with_role("producer")]
    return sum(cubes, torch.zeros(context.group.size))


def widest_first(problem: AllocationProblem, scores: Scores) -> Widths:
    """Narrows the widest group by one allowed step, again and again, until every budget holds.

    :param problem: allowed widths, exact costs and budgets.
    :param scores: for each group one score a channel, ``[group.size]``; not needed here.
    :return: widths, ``[groups]``.
    """
    widths = problem.sizes.copy()
    while not problem.fits(widths):
        group = int(np.where(widths > problem.floor, widths, 0).argmax())
        allowed = problem.allowed[group]
        widths[group] = allowed[allowed < widths[group]].max()
    return widths


def linear(epoch: int, *, initial: float, target: float, steps: int) -> float:
    """Removes the same share more at every epoch.

    :param epoch: counted from 0.
    :param initial: share removed at epoch 0, in [0, 1).
    :param target: share removed at epoch ``steps`` and after, in [0, 1).
    :param steps: epochs from start to target.
    :return: share removed at this epoch.
    """
    if epoch >= steps:
        return target
    return initial + (target - initial) * epoch / steps


@hookimpl
def compactprune_algorithms() -> list[type[Algorithm]]:
    """Offers the algorithm."""
    return [EveryOther]


@hookimpl
def compactprune_importance() -> dict[str, Importance]:
    """Offers the criterion."""
    return {"l3": l3_importance}


@hookimpl
def compactprune_allocations() -> dict[str, Allocation]:
    """Offers the allocation."""
    return {"widest_first": widest_first}


@hookimpl
def compactprune_schedules() -> dict[str, Schedule]:
    """Offers the schedule."""
    return {"linear": linear}
