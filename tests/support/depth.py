"""Networks whose branches say something, and plans that take some of these branches whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nncf_compactprune import PruningPlan
from nncf_compactprune.channels import ChannelGraph, trace
from nncf_compactprune.cut.depth import with_branches
from nncf_compactprune.plan import make_plan


def with_statistics(model: nn.Module) -> nn.Module:
    """Vectors that are neither 0 nor 1, so that a branch without channels would still add a constant."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model.eval()


def graph_with_branches(model: nn.Module, x: torch.Tensor) -> ChannelGraph:
    return with_branches(model, trace(model, x), x)


def shallower(graph: ChannelGraph, *, seed: int = 0, every: int = 2, ratio: float = 0.4) -> PruningPlan:
    """A plan that takes every so many branches whole, and a random part of all other groups, streams among them."""
    generator = np.random.default_rng(seed)
    gone = {group for groups in list(graph.branches.values())[::every] for group in groups}
    keep = [generator.random(group.size) >= ratio for group in graph.groups]
    for index, mask in enumerate(keep):
        mask[0] = True
        mask &= index not in gone
    return make_plan(graph, keep)
