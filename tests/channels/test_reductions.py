"""Reductions: over positions channels pass, over channels they are pinned, in every overload."""

from __future__ import annotations

import pytest
import torch
from support.cuts import random_plan
from torch import nn

from nncf_compactprune.channels import trace
from nncf_compactprune.cut.self_check import prune_in_place

OVER_POSITIONS = {
    "sum": lambda y: y.sum((2, 3)),
    "mean": lambda y: y.mean([-1, -2]),
    "nansum": lambda y: torch.nansum(y, dim=(2, 3)),
    "count_nonzero": lambda y: torch.count_nonzero(y > 0, dim=(2, 3)).to(y.dtype),
    "amax": lambda y: y.amax((2, 3)),
    "amin": lambda y: y.amin((2, 3)),
    "var": lambda y: torch.var(y, (2, 3)),
    "var without correction": lambda y: torch.var(y, dim=(2, 3), correction=0),
    "std": lambda y: torch.std(y, (2, 3)),
    "var_mean": lambda y: torch.var_mean(y, (2, 3))[0],
    "std_mean": lambda y: torch.std_mean(y, (2, 3))[1],
    "prod": lambda y: y.prod(3).prod(2),
    "any": lambda y: y.gt(0.5).any(3).any(2).to(y.dtype),
    "any of several": lambda y: torch.any(y > 1, dim=(2, 3)).to(y.dtype),
    "any of none": lambda y: torch.any(y > 0.5, dim=()).to(y.dtype).mean((2, 3)),
    "all": lambda y: torch.all(y > -0.2, dim=(2, 3)).to(y.dtype),
    "logsumexp": lambda y: y.logsumexp((2, 3)),
    "argmax": lambda y: y.flatten(2).argmax(2).to(y.dtype),
    "argmin": lambda y: y.flatten(2).argmin(-1).to(y.dtype),
    "max": lambda y: y.max(3).values.max(2).values,
    "min": lambda y: y.min(dim=3, keepdim=True).values.mean((2, 3)),
    "vector norm": lambda y: torch.linalg.vector_norm(y, dim=(2, 3)),
    "norm": lambda y: torch.norm(y, dim=(2, 3)),
    "norm of order 1": lambda y: y.norm(1, (2, 3)),
    "median": lambda y: y.flatten(2).median(2).values,
}
OVER_EVERYTHING = {
    "sum": lambda y: y.sum(),
    "mean": lambda y: y.mean(),
    "nansum": lambda y: torch.nansum(y),
    "sum over an empty list": lambda y: torch.sum(y, dim=[]),
    "var": lambda y: torch.var(y),
    "any": lambda y: (y > 0).any().to(y.dtype),
    "prod": lambda y: y.prod(),
    "max": lambda y: y.max(),
    "argmax": lambda y: y.argmax().to(y.dtype),
    "norm": lambda y: y.norm(),
    "median": lambda y: y.median(),
}


class Net(nn.Module):
    """A reduction between two layers; where it leaves nothing of the channels, it scales them."""

    def __init__(self, reduction, *, scales: bool = False) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.reduction, self.scales = reduction, scales

    def forward(self, x):
        y = self.conv(x)
        return self.head(y.mean((2, 3)) * self.reduction(y) if self.scales else self.reduction(y))


def net(reduction, *, scales: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Net(reduction, scales=scales).double().eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", OVER_POSITIONS)
def test_reductions_over_positions_pass_channels_on(name):
    model = net(OVER_POSITIONS[name])
    graph = trace(model, X)
    assert [g.name for g in graph.groups] == ["conv"], [p.reason for p in graph.pinned]
    assert not graph.unsupported_ops
    check = prune_in_place(model, random_plan(model, X), X)
    assert check is not None
    assert check.error <= 1e-12
    assert model.conv.out_channels < 8


@pytest.mark.parametrize("name", OVER_EVERYTHING)
def test_reductions_over_everything_pin_channels(name):
    graph = trace(net(OVER_EVERYTHING[name], scales=True), X)
    assert graph.groups == ()
    assert "reduced over its channels" in next(p.reason for p in graph.pinned if p.name == "conv")
