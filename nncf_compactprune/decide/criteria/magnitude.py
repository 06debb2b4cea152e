"""Criteria of weights alone: L1, L2, geometric median, BatchNorm scale, LAMP; and none at all: random.

Each takes the context of a channel group and returns one score a channel, shape ``[group.size]``, larger kept. A
coupled group (residual stages) sums over its members, so a channel counts for everything it produces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from nncf_compactprune.decide.criteria.context import CriterionContext
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl


def filters(context: CriterionContext) -> list[Tensor]:
    """The rows of every weight that produces the group's channels, each of shape ``[group.size, elements]``.

    Groups without a producing weight (an embedding added to the input, a lone norm) fall back on whatever parameters
    they have, and groups of constants alone on these.
    """
    group = context.group
    members = [m for m in group.with_role("producer") if context.tensors[m.parameter].dim() > 1]
    if not members:
        members = [m for m in group.members if not m.is_buffer] or list(group.members)
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


def lamp(context: CriterionContext) -> Tensor:
    """The square of :func:`l2` over the sum of the squares that are not smaller, of the same group: the largest channel
    has 1 (Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", eq. 1, for channels in place of
    weights). Scores of all groups are on one scale: use it with ``"normalizer": "none"`` and ``"allocation":
    "global"``.
    """
    squares = l2(context).double().square()
    descending, order = squares.sort(descending=True)
    sums = descending.cumsum(0)
    last = torch.searchsorted(-descending, -descending, right=True) - 1  # equal channels have equal scores
    scores = torch.empty_like(squares)
    scores[order] = descending / sums[last].clamp_min(1e-30)
    return scores.float()


def random(context: CriterionContext) -> Tensor:
    """Uniform random numbers in [0, 1), the same at every call for a group of this name and size, under one seed of
    torch: what any criterion must beat."""
    name = f"{context.group.name} {torch.initial_seed()}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big", signed=True)
    return torch.rand(context.group.size, generator=torch.Generator().manual_seed(seed))


@hookimpl
def compactprune_importance() -> Mapping[str, Importance]:
    """The built-in criteria of weights alone."""
    criteria: dict[str, Importance] = {
        "l1": l1,
        "l2": l2,
        "geometric_median": geometric_median,
        "batch_norm_scale": batch_norm_scale,
        "lamp": lamp,
        "random": random,
    }
    return criteria
