"""A mixture of experts in one parameter: widths inside the experts go, the experts stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nncf_compactprune import analyse, prune
from nncf_compactprune.channels import trace

TOKENS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has no product of groups")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.up, self.down = (nn.Parameter(torch.randn(2, i, o) / 4) for i, o in ((16, 32), (32, 16)))

    def forward(self, x):
        x, ends = self.embed(x), torch.tensor([3, 8], dtype=torch.int32)
        y = torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down, offs=ends)
        return self.head(x + y)


def test_widths_of_experts_are_cut():
    torch.manual_seed(0)
    model = Experts()
    graph = trace(model, TOKENS)
    assert sorted(group.size for group in graph.groups) == [16, 32]
    assert any("experts of a mixture" in pinned.reason for pinned in graph.pinned)
    assert graph.macs == 16 * 16 + 2 * 16 * 32 + 16 * 3  # of one token, which meets one expert
    assert [group.multiple for group in graph.groups] == [4, 4]  # the operation wants rows of 16 bytes
    result = prune(model, TOKENS, budget={"macs": 0.52}, round_to=1)
    assert all(group.after % 4 == 0 for group in result.plan.groups)
    assert result.self_check.error < 1e-5
    assert model.up.shape[0] == 2
    assert model.up.shape[2] == model.down.shape[1] < 32


def test_what_is_tried_out_keeps_to_the_multiples():
    graph = analyse(Experts(), TOKENS)
    assert sorted(group.size for group in graph.groups) == [16, 32]
