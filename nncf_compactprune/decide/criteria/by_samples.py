"""Criteria that look at what flows through the network: Fisher information of coupled channels, norms of activations.

Each takes the context of a channel group and returns one score a channel, shape ``[group.size]``, larger kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nncf_compactprune.channels import Member
from nncf_compactprune.decide.criteria.context import CriterionContext
from nncf_compactprune.decide.criteria.magnitude import l2
from nncf_compactprune.decide.criteria.observed import Rows, reads_plainly, writes_plainly
from nncf_compactprune.decide.criteria.taylor import taylor
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl


def fisher(context: CriterionContext) -> Tensor:
    """Mean over the samples of ``(∂L/∂m)²``, where ``m`` is one mask for all coupled channels (Liu et al. 2021, "Group
    Fisher Pruning", eq. 6): what zeroing a channel everywhere at once does to the loss of single samples, squared.

    Deviations: the mask is at the outputs of the layers that make the channel (behind their normalisation), not at the
    inputs of those that read it; memory and cost are left to the budget. A group that no layer of torch makes is scored
    by :func:`~nncf_compactprune.decide.criteria.taylor.taylor`.

    :raises DataError: there are no labelled batches.
    """
    group = context.group
    scales = [m for m in group.with_role("norm") if not m.is_buffer and m.parameter.endswith("weight")]
    makers = scales or [m for m in group.with_role("producer") if m.parameter.endswith("weight")]
    seen = context.output_changes()
    modules = dict(named_modules(context.model))
    makers = [m for m in makers if m.dim == 0 and writes_plainly(modules[_module(m)])]
    parts = _by_channel(makers, seen)
    if not parts:
        return taylor(context)
    return torch.stack(parts).sum(0).square().mean(0).float()


def activation_norm(context: CriterionContext) -> Tensor:
    """Mean over the samples of the Euclidean norm of a channel's activations, as the layers behind it read them;
    summed over these layers (after Molchanov et al. 2017, arXiv 1611.06440, section 2.2, who take the mean).

    Deviation: a group that no linear layer and no convolution of one group reads is ranked by its L2 norms, scaled to
    mean 1.

    :raises DataError: there are no batches.
    """
    modules = dict(named_modules(context.model))
    readers = [m for m in context.group.with_role("consumer") if m.dim == 1 and reads_plainly(modules[_module(m)])]
    parts = _by_channel(readers, context.input_squares())
    if not parts:
        scores = l2(context)
        return scores / scores.mean().clamp_min(1e-12)
    return torch.stack([part.sqrt().mean(0) for part in parts]).sum(0).float()


def _module(member: Member) -> str:
    return member.parameter.rpartition(".")[0]


def _by_channel(members: Sequence[Member], seen: Rows) -> list[Tensor]:
    """``[samples, channels]`` for every member that was seen, summed over the positions that a channel has."""
    found = []
    for member in members:
        rows = seen.get(_module(member))
        if rows is not None:
            found.append(rows[:, torch.as_tensor(member.indices)].sum(2))
    return found


@hookimpl
def compactprune_importance() -> Mapping[str, Importance]:
    """Offers :func:`fisher` and :func:`activation_norm`."""
    return {"fisher": fisher, "activation_norm": activation_norm}
