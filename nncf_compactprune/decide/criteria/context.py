"""What a criterion may look at: one context for each group, data and gradients shared by all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.channels import ChannelGraph, ChannelGroup, Member
from nncf_compactprune.decide.criteria.observed import input_squares, output_changes
from nncf_compactprune.decide.labelled import scored
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.distributed import summed
from nncf_compactprune.host.tensors import model_tensors

Batches = Callable[[], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True)
class CriterionContext:
    """One group, and the network that it is scored in. A criterion reads; it changes nothing.

    :param group: the channel group to score.
    :param graph: all groups of the network, and its costs.
    :param model: the network.
    :param tensors: its parameters and buffers by name.
    :param batches: call it for model inputs and labels, one pair a batch; labels are None where there are none.
    :param gradients: call it for the gradient of the mean cross-entropy by parameter name: computed at the first call,
        over all labelled batches and all processes, and kept for the other groups.
    :param output_changes: call it for :func:`~nncf_compactprune.decide.criteria.observed.output_changes` of this
        process's labelled batches; kept likewise.
    :param input_squares: call it for :func:`~nncf_compactprune.decide.criteria.observed.input_squares`; kept likewise.
    """

    group: ChannelGroup
    graph: ChannelGraph
    model: nn.Module
    tensors: Mapping[str, Tensor]
    batches: Batches
    gradients: Callable[[], Mapping[str, Tensor]]
    output_changes: Callable[[], Mapping[str, Tensor]] = dict
    input_squares: Callable[[], Mapping[str, Tensor]] = dict

    def rows(self, member: Member, tensor: Tensor | None = None) -> Tensor:
        """What one member holds of every channel.

        :param member: one of the group's.
        :param tensor: a tensor of the member's shape, such as its gradient; the member's own, where None.
        :return: ``[group.size, elements]``, float32 or float64, without a gradient.
        """
        tensor = (self.tensors[member.parameter] if tensor is None else tensor).detach()
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
        if member.indices.shape == (len(rows), 1):
            return rows  # every position is a channel: positions ascend, so this is their order
        indices = torch.as_tensor(member.indices, device=rows.device)
        return rows[indices.reshape(-1)].reshape(indices.shape[0], -1)


def criterion_contexts(
    model: nn.Module, graph: ChannelGraph, batches: Batches | None = None
) -> Iterator[CriterionContext]:
    """One context for every group, in the graph's order.

    :param model: the network that was analysed.
    :param graph: its channels.
    :param batches: gives model inputs and labels anew at every call; none, where None.
    """
    given: Batches = batches if batches is not None else tuple
    tensors = model_tensors(model).all()
    gradients = functools.cache(lambda: mean_gradients(model, given()))
    changes = functools.cache(lambda: output_changes(model, given()))
    squares = functools.cache(lambda: input_squares(model, given()))
    for group in graph.groups:
        yield CriterionContext(group, graph, model, tensors, given, gradients, changes, squares)


def mean_gradients(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy over the batches of all processes, by parameter name.

    The model runs in eval mode; its own gradients are left alone. Frozen parameters have gradients here too.

    :param model: a classifier.
    :param batches: model inputs with labels.
    :raises DataError: no batch, no labels, or labels that are no class indices.
    """
    parameters = {name: p for name, p in model_tensors(model).parameters.items() if p.is_floating_point()}
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    samples = torch.zeros((), dtype=torch.float64)
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for inputs, labels in batches:
            with evaluating(model), torch.enable_grad():
                scores, wanted = scored(model, inputs, labels)
                loss = nn.functional.cross_entropy(scores.float(), wanted, reduction="sum")
                # before the context takes back what the forward pass wrote: autograd may have kept it
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
            samples += len(wanted)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    count, *totals = summed([samples, *sums.values()])
    if not count:
        msg = "the criterion needs gradients of labelled samples, but there are none. "
        msg += "Give a train_loader of (inputs, labels)."
        raise DataError(msg)
    return {name: (total / float(count)).to(parameters[name]) for name, total in zip(sums, totals, strict=True)}
