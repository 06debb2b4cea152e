"""The channels of a model after a cut, derived from those before it: nothing is traced again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nncf_compactprune.channels.groups import AttributeFact, ChannelGraph, ChannelGroup, Member
from nncf_compactprune.plan.pruning_plan import PruningPlan

Kept = Sequence[npt.NDArray[np.bool_]]


def kept_channels(graph: ChannelGraph, plan: PruningPlan) -> list[npt.NDArray[np.bool_]]:
    """Which channels a plan keeps, for every group: ``[group.size]``.

    :param graph: the channels that the plan was made for.
    :param plan: what stays.
    """
    result = []
    for group in graph.groups:
        first = next((member for member in group.members if not plan.goes(member.parameter)), None)
        if first is None:
            result.append(np.zeros(group.size, bool))
            continue
        positions = plan.kept.get(first.parameter, {}).get(first.dim)
        whole = np.ones(group.size, bool)
        result.append(whole if positions is None else np.isin(first.indices[:, 0], positions))
    return result


def graph_after(graph: ChannelGraph, plan: PruningPlan) -> ChannelGraph:
    """The channels of the model that a plan leaves: the same groups in the same order, each without what went.

    A fresh trace could also join groups or take them apart. Costs are the same functions of the widths.

    :param graph: the channels before the cut.
    :param plan: what stays.
    """
    keep = kept_channels(graph, plan)
    return dataclasses.replace(
        graph,
        groups=tuple(_group_after(group, mask, plan) for group, mask in zip(graph.groups, keep, strict=True)),
        parameters=plan.shapes(graph.parameters),
        attributes=tuple(_fact_after(fact, keep) for fact in graph.attributes),
    )


def _group_after(group: ChannelGroup, keep: npt.NDArray[np.bool_], plan: PruningPlan) -> ChannelGroup:
    members = tuple(_member_after(member, keep, plan) for member in group.members)
    return dataclasses.replace(group, size=int(keep.sum()), members=members)


def _member_after(member: Member, keep: npt.NDArray[np.bool_], plan: PruningPlan) -> Member:
    indices = member.indices[keep]
    positions = plan.kept.get(member.parameter, {}).get(member.dim)
    if positions is None:
        return member
    return dataclasses.replace(member, indices=np.searchsorted(np.asarray(positions, np.int64), indices))


def _fact_after(fact: AttributeFact, keep: Kept) -> AttributeFact:
    pairs = list(zip(fact.groups.tolist(), fact.channels.tolist(), strict=True))
    stays = np.array([group < 0 or bool(keep[group][channel]) for group, channel in pairs], bool)
    places = [int(keep[group][:channel].sum()) if group >= 0 else channel for group, channel in pairs]
    value = fact.value(keep)
    return dataclasses.replace(
        fact,
        groups=fact.groups[stays],
        channels=np.array(places, np.int64)[stays],
        entries=value if fact.entries and isinstance(value, tuple) else (),
    )
