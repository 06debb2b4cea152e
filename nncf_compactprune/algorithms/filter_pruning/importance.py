"""What filters are worth, layer by layer, and across layers.

A group of channels that hang together has a filter in each of its producing layers. Its importance is the sum of
theirs, as in NNCF 2.x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.channels import ChannelGraph, ChannelGroup, Member
from nncf_compactprune.decide.criteria import CriterionContext, criterion_contexts

#: norms of the filters of each producing weight, by the weight's name, ``[group.size]`` each; one mapping a group
Norms = Sequence[Mapping[str, Tensor]]
#: factor and summand of the norms of each producing weight
Ranking = Mapping[str, tuple[float, float]]
Scores = list[npt.NDArray[np.float64]]


def _distances(rows: Tensor) -> Tensor:
    """Sum of distances to all filters of the layer (He et al. 2019, FPGM)."""
    return torch.cdist(rows, rows).sum(1)


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "L1": lambda rows: torch.linalg.vector_norm(rows, 1, dim=1),
    "L2": lambda rows: torch.linalg.vector_norm(rows, 2, dim=1),
    "geometric_median": _distances,
}


def filter_norms(model: nn.Module, graph: ChannelGraph, importance: str, *, normalised: bool) -> Norms:
    """The norms of all filters that may go.

    :param model: the network.
    :param graph: its channels.
    :param importance: ``"L1"``, ``"L2"`` or ``"geometric_median"``.
    :param normalised: each weight is divided by its own L2 norm first, which makes layers comparable.
    """
    measure = _MEASURES[importance]
    return [_group_norms(context, measure, normalised) for context in criterion_contexts(model, graph)]


def _group_norms(
    context: CriterionContext, measure: Callable[[Tensor], Tensor], normalised: bool
) -> Mapping[str, Tensor]:
    result: dict[str, Tensor] = {}
    for member in _ranked_members(context.group, context.graph):
        rows = context.rows(member)
        scale = torch.linalg.vector_norm(rows).clamp_min(1e-30) if normalised else 1.0
        result[member.parameter] = result.get(member.parameter, 0.0) + measure(rows / scale)
    return result


def _ranked_members(group: ChannelGroup, graph: ChannelGraph) -> Sequence[Member]:
    """The producing weights of a group; whatever parameters it has, where there are none."""
    members = [m for m in group.with_role("producer") if len(graph.parameters[m.parameter]) > 1]
    return members or [m for m in group.members if not m.is_buffer]


def ranked_weights(graph: ChannelGraph) -> list[str]:
    """Names of the weights whose filters are ranked, in the graph's order.

    :param graph: the model's channels.
    """
    return list(dict.fromkeys(m.parameter for group in graph.groups for m in _ranked_members(group, graph)))


def importances(norms: Norms, ranking: Ranking | None = None) -> list[Tensor]:
    """One importance a channel for every group, ``[group.size]``: larger ones stay.

    :param norms: of every group.
    :param ranking: maps of the layers' norms that make layers comparable; none, where None.
    """
    maps: Mapping[str, Any] = ranking or {}
    result = []
    for group in norms:
        mapped = [norm * maps.get(name, (1.0, 0.0))[0] + maps.get(name, (1.0, 0.0))[1] for name, norm in group.items()]
        result.append(torch.stack(mapped).sum(0))
    return result


def widths_of_lowest(scores: Scores, removed: int, most: Sequence[int]) -> npt.NDArray[np.float64]:
    """What is left of every group when the least important channels of all groups go.

    :param scores: one a channel for every group.
    :param removed: how many channels go; fewer, where no group may lose more.
    :param most: how many channels each group may lose.
    :return: widths, ``[groups]``.
    """
    group_of = np.concatenate([np.full(min(len(s), n), g) for g, (s, n) in enumerate(zip(scores, most, strict=True))])
    lowest = np.concatenate([np.sort(s)[:n] for s, n in zip(scores, most, strict=True)])
    gone = group_of[np.argsort(lowest, kind="stable")[:removed]].astype(np.int64)
    sizes = np.array([len(s) for s in scores], np.float64)
    return sizes - np.bincount(gone, minlength=len(scores))
