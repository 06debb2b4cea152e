"""Which channels a network can do without when their consumers are re-fitted afterwards.

``surgeon``: optimal brain surgery on whole channels (Hassibi & Stork 1993; block form as in Kurtic et al. 2023). With
H = X^T X of a consumer's inputs, taking out the columns of channel k and re-fitting the rest optimally costs

    tr( W_k  ((H^-1)_kk)^-1  W_k^T ),

after which H^-1 and W are updated, and the next channel is chosen. So of two channels that say the same, one goes for
nothing and the other then stays, which no ranking by size can know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.gram import Moments, damped
from nncf_compactprune.algorithms.data_free.operations import Operation
from nncf_compactprune.channels.groups import ChannelGraph, ChannelGroup, Member, owner
from nncf_compactprune.host.tensors import named_modules

# Of a loss that several layers in a row see: errors of a shared stream add up (chosen on training images).
SHARED_WORTH = 3.0
SPARE = 0.15  # share of columns that are gone and still carried along


@dataclass
class Consumer:
    """One layer that takes in a group's channels.

    :param weight: ``[groups, out/groups, d]``.
    :param inputs: second moments of its inputs, ``[groups, d, d]``.
    :param columns: for each channel its columns in d, ``[channels, r]``.
    :param worth: what the squared output error is multiplied by to compare with other layers'.
    """

    weight: Tensor
    inputs: Tensor
    columns: npt.NDArray[np.int64]
    worth: float


def importance(
    model: nn.Module, graph: ChannelGraph, found: Mapping[str, Moments], ridge: float, workers: int
) -> list[Tensor]:
    """Scores of all groups: what losing a channel costs, in shares of the output variance of its consumers.

    A group with moments of no consumer scores by the squared size of the weights that produce each channel.

    :param model: the dense model.
    :param graph: its groups.
    :param found: moments of the dense model's layers, by name.
    :param ridge: see :func:`surgeon_scores`.
    :param workers: threads; groups are independent of each other.
    :return: one score a channel for each group, ``[group.size]``, larger kept.
    """
    modules = dict(named_modules(model))

    def score(group: ChannelGroup) -> Tensor:
        known = consumers(group, modules, found)
        return surgeon_scores(known, ridge) if known else _magnitude(group, modules)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(score, graph.groups))


def consumer_names(graph: ChannelGraph) -> set[str]:
    """Names of the modules that consume any group's channels."""
    return {owner(member.parameter) for group in graph.groups for member in group.with_role("consumer")}


def consumers(group: ChannelGroup, modules: Mapping[str, nn.Module], found: Mapping[str, Moments]) -> list[Consumer]:
    """The consumers of a group that have moments.

    :param group: the channels.
    :param modules: the model's, by name.
    :param found: moments by layer.
    """
    members = [member for member in group.with_role("consumer") if owner(member.parameter) in found]
    # in a grouped transposed convolution, a channel has columns of its own group only
    grouped = {name for name, m in found.items() if m.operation.transposed and m.operation.groups > 1}
    members = [member for member in members if owner(member.parameter) not in grouped]
    worth = SHARED_WORTH if len(members) > 1 else 1.0
    result = []
    for member in members:
        name = owner(member.parameter)
        energy = max(float(found[name].energy.sum()), 1e-30)
        rows = found[name].operation.rows(modules[name].get_parameter("weight"))
        columns = _columns(found[name].operation, member)
        result.append(Consumer(rows, found[name].trusted, columns, worth / energy))
    return result


def _columns(operation: Operation, member: Member) -> npt.NDArray[np.int64]:
    """Columns of a patch that belong to each channel, ``[channels, r]``; in a grouped convolution a channel is the same
    position of every group."""
    taps = operation.taps
    return (member.indices[:, :, None] * taps + np.arange(taps)).reshape(len(member.indices), -1)


def _magnitude(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.with_role("producer"):
        module, _, leaf = member.parameter.rpartition(".")
        weight = getattr(modules.get(module), leaf, None)
        if isinstance(weight, Tensor):
            rows = weight.detach().double().cpu().movedim(member.dim, 0).reshape(weight.shape[member.dim], -1)
            rows = rows.square().sum(1)
            total += rows[torch.as_tensor(member.indices)].sum(1)
    return total / total.sum().clamp_min(1e-30)


@torch.no_grad()
def surgeon_scores(consumers: Sequence[Consumer], ridge: float) -> Tensor:
    """Removes channels one by one, always the one whose loss the others make up for best.

    :param consumers: all layers that take these channels in; their losses add.
    :param ridge: added to the second moments, relative to their mean diagonal.
    :return: what each removal cost, ``[channels]``, not falling along the order of removal; larger is kept.
    """
    states = [_State(consumer, ridge) for consumer in consumers]
    count = len(consumers[0].columns)
    left = list(range(count))
    scores = torch.zeros(count, dtype=torch.float64)
    highest = 0.0
    while left:
        costs = torch.stack([state.costs(left) for state in states]).sum(0)
        at = int(costs.argmin())
        highest = max(highest, float(costs[at]))
        channel = left.pop(at)
        scores[channel] = highest
        for state in states if left else ():
            state.remove(channel)
    return scores


class _State:
    """A consumer with some channels gone and the rest re-fitted."""

    def __init__(self, consumer: Consumer, ridge: float) -> None:
        self.inverse = torch.linalg.inv(damped(consumer.inputs, ridge))
        self.weight = consumer.weight.clone()
        self.columns = torch.as_tensor(consumer.columns, device=consumer.inputs.device)
        self.worth = consumer.worth
        self.gone: list[Tensor] = []

    def costs(self, channels: list[int]) -> Tensor:
        """``[len(channels)]``."""
        columns = self.columns[channels]  # [c, r]
        if columns.shape[1] == 1:  # the same with less to move
            column = columns[:, 0]
            energy = self.weight[:, :, column].square().sum(1)
            single: Tensor = (energy / self.inverse[:, column, column]).sum(0)
            return self.worth * single.clamp_min(0).cpu()
        blocks = self.inverse[:, columns.unsqueeze(2), columns.unsqueeze(1)]  # [g, c, r, r]
        part = self.weight[:, :, columns].permute(0, 2, 3, 1)  # [g, c, r, out]
        cost: Tensor = (part * torch.linalg.solve(blocks, part)).sum((0, 2, 3))
        return self.worth * cost.clamp_min(0).cpu()

    def remove(self, channel: int) -> None:
        columns = self.columns[channel]
        across = self.inverse[:, columns]  # [g, r, d]
        block = across[:, :, columns]
        update = torch.linalg.solve(block, across)  # [g, r, d]
        self.weight -= self.weight[:, :, columns] @ update
        self.inverse -= across.transpose(1, 2) @ update
        # What is gone stays gone, whatever rounding left.
        self.weight[:, :, columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[:, :, columns] = 0
        self.gone.append(columns)
        if len(self.gone) * len(columns) > SPARE * self.inverse.shape[1]:
            self._shrink()

    def _shrink(self) -> None:
        """Leaves out the columns that are gone, so that later removals have less to go through."""
        left = torch.ones(self.inverse.shape[1], dtype=torch.bool, device=self.columns.device)
        left[torch.cat(self.gone)] = False
        self.inverse = self.inverse[:, left][:, :, left]
        self.weight = self.weight[:, :, left]
        self.columns = (left.cumsum(0) - 1)[self.columns]
        self.gone = []
