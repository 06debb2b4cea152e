"""An RMSNorm written out, by consent: the cut takes its mean over the channels that stay, and so does the check."""

from __future__ import annotations

import pytest
import torch
from support.cuts import random_plan
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.cut import masked_model
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.errors import SelfCheckError

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class WrittenOut(nn.Module):
    """A LayerNorm as ConvNeXt's authors write it, over dimension 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))

    def forward(self, x):
        x = x.transpose(1, 2)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return (self.weight[:, None] * x + self.bias[:, None]).transpose(1, 2)


class Residual(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norms = nn.Linear(6, 16), nn.ModuleList(norm(16) for _ in range(2))
        self.wide, self.narrow, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.narrow(self.wide(self.norms[0](x)).relu())
        return self.head(self.norms[1](x))


@pytest.fixture(params=[RMSNorm, WrittenOut, nn.RMSNorm])
def model(request):
    torch.manual_seed(0)
    return Residual(request.param).double()


def test_the_residual_width_goes_by_consent_only(model):
    assert [group.size for group in trace(model, TOKENS).groups] == [24]
    graph = trace(model, TOKENS, allow_approximate=True)
    assert sorted(group.size for group in graph.groups) == [16, 24]
    assert any("aten.mean" in group.approximate for group in graph.groups)
    check = prune_in_place(model, random_plan(model, TOKENS, allow_approximate=True), TOKENS)
    assert check.error < 1e-12
    assert len(model.norms[0].weight) < 16


def test_one_call_reaches_the_budget(model):
    result = prune(model.float(), TOKENS.float(), budget={"macs": 0.4}, allow_approximate=True)
    assert result.plan.approximate
    assert model.head.in_features < 16


def test_means_over_all_channels_are_caught(model, monkeypatch):
    monkeypatch.setattr(masked_model, "means_over_kept", lambda *_: [])
    with pytest.raises(SelfCheckError, match="differs from the masked one"):
        prune_in_place(model, random_plan(model, TOKENS, allow_approximate=True), TOKENS)


class SpatialAttention(nn.Module):
    """CBAM's: a gate of the largest and the mean channel at each place; behind it, features of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x):
        x = self.conv(x)
        x = x * self.gate(torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)).sigmoid()
        return self.head(nn.functional.normalize(x.mean((2, 3)) + x.amax(1).sum((1, 2))[:, None], dim=1))


def test_maxima_norms_and_sums_over_channels_go_by_consent():
    torch.manual_seed(0)
    model, images = SpatialAttention().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert not trace(model, images).groups
    check = prune_in_place(model, random_plan(model, images, allow_approximate=True), images)
    assert check.error < 1e-12
    assert model.head.in_features < 16
