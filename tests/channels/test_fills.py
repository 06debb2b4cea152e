"""Tensors of one value that the code makes as wide as it needs them: states of zeros, masks of ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nncf_compactprune import analyse, prune

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


class Scan(nn.Module):
    """A state space as Mamba's: a depthwise convolution whose weight goes through a squeeze, and a state of zeros."""

    def __init__(self, fixed: bool = False, write: bool = False) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(16, 64), nn.Conv1d(64, 64, 4, groups=64, padding=3), nn.Linear(64, 5)
        self.decay = nn.Parameter(torch.rand(64))
        self.fixed, self.write = fixed, write

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        weight = self.conv.weight.squeeze(1).unsqueeze(1)
        x = nn.functional.conv1d(x, weight, self.conv.bias, padding=3, groups=x.shape[1])[..., : x.shape[2]].sigmoid()
        state = torch.zeros(len(x), 64 if self.fixed else x.shape[1])
        if self.write:
            states = torch.zeros(len(x), 2, x.shape[1])
            states[:, 0] = x[..., 0]
            state = states.sum(1)
        for step in x.unbind(-1):
            state = self.decay * state + step
        return self.down(state)


def test_a_state_of_zeros_is_as_wide_as_it_is_made() -> None:
    torch.manual_seed(0)
    model = Scan().eval()
    assert [group.size for group in analyse(model, X).groups] == [64]
    result = prune(model, X, budget={"params": 0.5}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.conv.groups == model.down.in_features == len(model.decay) < 64


@pytest.mark.parametrize(
    ("option", "reason"),
    [("fixed", "does not follow a smaller width"), ("write", "written into a tensor of fixed size")],
)
def test_a_width_in_the_code_and_a_state_that_is_written_into_stay(option, reason) -> None:
    graph = analyse(Scan(**{option: True}).eval(), X)
    assert not graph.groups
    assert any(reason in pin.reason for pin in graph.pinned)


class Grows(nn.Module):
    """Zeros in front of what was computed: they are no channels that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(torch.cat([torch.ones(*y.shape[:2], 8).cos(), y], -1))


def test_filled_channels_in_a_concatenation_stay() -> None:
    torch.manual_seed(0)
    model = Grows().eval()
    result = prune(model, X, budget={"params": 0.6}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.b.in_features == model.a.out_features + 8
