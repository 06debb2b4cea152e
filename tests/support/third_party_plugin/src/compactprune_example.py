"""An importance criterion and an algorithm from outside the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from nncf_compactprune.algorithms import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.decide.criteria import CriterionContext
from nncf_compactprune.plugins.hookspecs import Algorithm, Importance, hookimpl


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


@hookimpl
def compactprune_algorithms() -> list[type[Algorithm]]:
    """Offers the algorithm."""
    return [EveryOther]


@hookimpl
def compactprune_importance() -> dict[str, Importance]:
    """Offers the criterion."""
    return {"l3": l3_importance}
