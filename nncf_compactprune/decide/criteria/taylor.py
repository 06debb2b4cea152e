"""The Taylor criterion: what the loss changes, to first order, when a channel goes. Needs labelled batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nncf_compactprune.channels import Member
from nncf_compactprune.decide.criteria.context import CriterionContext
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl


def taylor(context: CriterionContext) -> Tensor:
    """``(Σ w·∂L/∂w)²`` over what scales a channel (Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", eq. 8): over the normalisation's scale and shift where the group has one (their "gate"), else over the
    producing filters. Summed over the members of a coupled group.

    :raises DataError: there are no labelled batches.
    """
    group = context.group
    gates = [m for m in group.with_role("norm") if not m.is_buffer]
    if gates:
        layers: dict[str, list[Member]] = {}
        for member in gates:
            layers.setdefault(member.parameter.rpartition(".")[0], []).append(member)
        parts = [sum((_change(context, m) for m in layer), torch.zeros(())) for layer in layers.values()]
    else:
        members = [m for m in group.with_role("producer") if not m.is_buffer] or list(group.members)
        parts = [_change(context, member) for member in members if not member.is_buffer]
    return torch.stack([part.square() for part in parts]).sum(0).float()


def _change(context: CriterionContext, member: Member) -> Tensor:
    """``Σ w·∂L/∂w`` over each channel's part of one parameter, ``[channels]``."""
    change = context.tensors[member.parameter] * context.gradients()[member.parameter]
    return context.rows(member, change.detach().double().cpu()).sum(1)


@hookimpl
def compactprune_importance() -> Mapping[str, Importance]:
    """Offers :func:`taylor`."""
    return {"taylor": taylor}
