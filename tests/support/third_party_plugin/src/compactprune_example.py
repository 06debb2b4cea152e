"""An importance criterion and an algorithm from outside the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from nncf_compactprune.algorithms import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.channels import ChannelGraph
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


def l3_importance(group: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """Scores channels by the 3-norm of what produces them.

    :param group: the channel group.
    :param parameters: the model's parameters by name.
    :return: scores, ``[group.size]``; larger ones are kept.
    """
    total = torch.zeros(group.size)
    for member in group.members:
        if member.role == "out":
            weight = parameters[member.parameter].detach().abs() ** 3
            per_index = weight.movedim(member.dim, 0).flatten(1).sum(1)
            total += per_index[torch.as_tensor(member.indices)].sum(1)
    return total


@hookimpl
def compactprune_algorithms() -> list[type[Algorithm]]:
    """Offers the algorithm."""
    return [EveryOther]


@hookimpl
def compactprune_importance() -> dict[str, Importance]:
    """Offers the criterion."""
    return {"l3": l3_importance}
