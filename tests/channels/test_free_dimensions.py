"""``-1`` in a reshape: the factor that the code leaves free is the one whose channels may go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncf_compactprune import analyse, prune

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
CUTS = {
    "view": lambda y: y.view(2, 5, 3, -1, 8),
    "reshape": lambda y: y.reshape(2, 5, 3, -1, 8),
    "tuple": lambda y: torch.reshape(y, (2, 5, 3, -1, 8)),
    "copied": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1).reshape(2, 5, 3, -1, 8),
    "unflatten": lambda y: y.unflatten(-1, (3, -1, 8)),
}


class Heads(nn.Module):
    """Attention that keeps no number of its heads."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.qkv, self.out, self.cut = nn.Linear(32, 96), nn.Linear(32, 32), CUTS[cut]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(self.qkv(x)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("cut", CUTS)
def test_heads_go_whole(cut) -> None:
    torch.manual_seed(0)
    model = Heads(cut).eval()
    assert [group.size for group in analyse(model, X).groups] == [4]
    result = prune(model, X, budget={"params": 0.6}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.qkv.out_features == 3 * model.out.in_features < 96


class Pairs(nn.Module):
    """Neighbours are one channel each: pairs go, no half of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(2, 5, -1, 2).amax(-1))


def test_the_leading_factor_may_be_free() -> None:
    torch.manual_seed(0)
    model = Pairs().eval()
    assert [group.size for group in analyse(model, X).groups] == [8]
    prune(model, X, budget={"params": 0.6}, round_to=1)
    assert model.a.out_features == 2 * model.b.in_features < 16
