"""Magnitude criteria: L1, L2, geometric median, BatchNorm scale.

Each takes a channel group and the model's tensors and returns one score a channel, shape ``[group.size]``, float32,
larger kept. A coupled group (residual stages) sums over its members, so a channel counts for everything it produces.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nncf_compactprune.channels import ChannelGroup, Member
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl


def filters(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The rows of every weight that produces the group's channels, each of shape ``[group.size, elements]``.

    Groups without a producing weight (an embedding added to the input, a lone norm) fall back on whatever parameters
    they have.
    """
    members = [m for m in group.with_role("out") if parameters[m.parameter].dim() > 1]
    if not members:
        members = [m for m in group.members if not m.is_buffer]
    return [_rows(parameters[m.parameter], m) for m in members]


def _rows(weight: Tensor, member: Member) -> Tensor:
    rows = weight.detach().float().movedim(member.dim, 0).reshape(weight.shape[member.dim], -1)
    if member.indices.shape == (len(rows), 1):
        return rows  # every position is a channel: positions ascend, so this is their order
    indices = torch.as_tensor(member.indices, device=rows.device)
    return rows[indices.reshape(-1)].reshape(indices.shape[0], -1)


def l1(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of absolute weights of the producing filters (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""
    return torch.stack([torch.linalg.vector_norm(rows, 1, dim=1) for rows in filters(group, parameters)]).sum(0)


def l2(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of the producing filters, over all members of a coupled group."""
    norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in filters(group, parameters)])
    return norms.square().sum(0).sqrt()


def geometric_median(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of distances to all filters of the layer (He et al. 2019, FPGM, eq. 7): a filter near the geometric median
    can be stood in for by the others. Summed over the members of a coupled group."""
    return torch.stack([torch.cdist(rows, rows).sum(1) for rows in filters(group, parameters)]).sum(0)


def batch_norm_scale(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """Absolute scale of the normalisation behind the producer (Liu et al. 2017, "Network Slimming").

    Deviation: a group without a normalisation of its own is ranked by its L1 norms, scaled to mean 1, so that a mixed
    network can be pruned with one criterion.
    """
    scales = [m for m in group.with_role("norm") if not m.is_buffer and m.parameter.endswith("weight")]
    if not scales:
        scores = l1(group, parameters)
        return scores / scores.mean().clamp_min(1e-12)
    return torch.stack([_rows(parameters[m.parameter], m).abs().sum(1) for m in scales]).sum(0)


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
