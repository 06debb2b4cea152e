"""First, last and downsampling layers, by NNCF's graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nncf_compactprune.host.nncf_layers import positions

X = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=(1, 2))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.fc = nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.zeros(4, 4, 1, 1))

    def forward(self, x):
        y = torch.relu(self.left(x)) + self.right(x)
        y = nn.functional.conv2d(y, self.weight, stride=2)
        return self.fc(self.up(self.down(y)).mean((2, 3)))


class Star(Net):
    def forward(self, *args):
        return super().forward(args[0])


@pytest.mark.parametrize("kind", [Net, Star])
def test_positions(kind):
    found = positions(kind().eval(), X)
    assert {name.partition(".")[0] for name in found.first} == {"left", "right"}
    assert {name.partition(".")[0] for name in found.last} == {"up"}
    assert {name.partition(".")[0] for name in found.downsampling} == {"down", "weight"}  # not the transposed one


def test_a_bare_sequential():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2)), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    found = positions(model, X)
    assert found.first == found.downsampling == {"0.0.weight", "0.0.bias"}
    assert found.last == {"2.weight", "2.bias"}
    assert list(model._modules) == ["0", "1", "2"]
