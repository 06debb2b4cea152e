"""Magnitude criteria: L1, L2, geometric median, BatchNorm scale.

Each takes the context of a channel group and returns one score a channel, shape ``[group.size]``, larger kept. A
coupled group (residual stages) sums over its members, so a channel counts for everything it produces.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nncf_compactprune.decide.criteria.context import CriterionContext
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl


def filters(context: CriterionContext) -> list[Tensor]:
    """The rows of every weight that produces the group's channels, each of shape ``[group.size, elements]``.

    Groups without a producing weight (an embedding added to the input, a lone norm) fall back on whatever parameters
    they have.
    """
    group = context.group
    members = [m for m in group.with_role("producer") if context.tensors[m.parameter].dim() > 1]
    if not members:
        members = [m for m in group.members if not m.is_buffer]
    return [context.rows(m) for m in members]


def l1(context: CriterionContext) -> Tensor:
    """Sum of absolute weights of the producing filters (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""
    return torch.stack([torch.linalg.vector_norm(rows, 1, dim=1) for rows in filters(context)]).sum(0)


def l2(context: CriterionContext) -> Tensor:
    """Euclidean norm of the producing filters, over all members of a coupled group."""
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in filters(context)])
    return norms.square().sum(0).sqrt()


def geometric_median(context: CriterionContext) -> Tensor:
    """Sum of distances to all filters of the layer (He et al. 2019, FPGM, eq. 7): a filter near the geometric median
    can be stood in for by the others. Summed over the members of a coupled group."""
    return torch.stack([torch.cdist(rows, rows).sum(1) for rows in filters(context)]).sum(0)


def batch_norm_scale(context: CriterionContext) -> Tensor:
    """Absolute scale of the normalisation behind the producer (Liu et al. 2017, "Network Slimming").

    Deviation: a group without a normalisation of its own is ranked by its L1 norms, scaled to mean 1, so that a mixed
    network can be pruned with one criterion.
    """
    scales = [m for m in context.group.with_role("norm") if not m.is_buffer and m.parameter.endswith("weight")]
    if not scales:
        scores = l1(context)
        return scores / scores.mean().clamp_min(1e-12)
    return torch.stack([context.rows(m).abs().sum(1) for m in scales]).sum(0)


@hookimpl
def compactprune_importance() -> Mapping[str, Importance]:
    """The built-in magnitude criteria."""
    criteria: dict[str, Importance] = {
        "l1": l1,
        "l2": l2,
        "geometric_median": geometric_median,
        "batch_norm_scale": batch_norm_scale,
    }
    return criteria
