"""A budget out of reach names what consent would free."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nncf_compactprune import BudgetError, prune


class Normed(nn.Module):
    """A stream that a LayerNorm normalises over: pinned without consent."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.mlp = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.leave = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mlp(self.norm(self.enter(x))))  # type: ignore[no-any-return]


def test_a_budget_out_of_reach_names_what_consent_would_free() -> None:
    with pytest.raises(BudgetError, match=r'16 more channels go with "allow_approximate": true'):
        prune(Normed(), torch.randn(2, 8), budget={"macs": 0.5})


def test_nothing_is_offered_where_consent_frees_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(BudgetError) as caught:
        prune(net, torch.randn(2, 8), budget={"macs": 0.01})
    assert "allow_approximate" not in str(caught.value)
