"""Inference mode hands whole operations over that torch takes apart elsewhere. Their channels can go all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.diagnosis import find_culprit
from nncf_compactprune.plan import make_plan


class Backbone(nn.Module):
    """Runs in a mode of its own, as a frozen part of a network does."""

    def __init__(self, mode) -> None:
        super().__init__()
        self.mode = mode
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        with self.mode():
            return self.last(nn.functional.max_pool2d(torch.relu(self.norm(self.first(x))), 2))


class Network(nn.Module):
    def __init__(self, mode) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(mode), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


MODES = [torch.inference_mode, torch.no_grad]


def network(mode) -> tuple[Network, torch.Tensor]:
    torch.manual_seed(0)
    return Network(mode).eval(), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize("mode", MODES)
def test_channels_are_found_and_removed(mode):
    model, x = network(mode)
    graph = trace(model, x)
    assert not graph.unsupported_ops
    assert sorted(group.size for group in graph.groups) == [8, 8]
    result = prune(model, x, budget={"macs": 0.5}, round_to=1)
    assert result.self_check.error <= 1e-5
    assert model.backbone.first.out_channels < 8


@pytest.mark.parametrize("mode", MODES)
def test_the_diagnosis_follows_the_same_operations(mode):
    model, x = network(mode)
    graph = trace(model, x)
    keep = [torch.arange(group.size).numpy() % 2 == 0 for group in graph.groups]
    assert find_culprit(model, make_plan(graph, keep), graph, x) is None
