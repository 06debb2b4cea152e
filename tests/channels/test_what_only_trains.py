"""Layers that run in training mode only (auxiliary heads) follow the cut of what they take."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Auxiliary(nn.Module):
    def __init__(self, *, wants_targets: bool = False) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
        self.helper = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        self.wants_targets = wants_targets

    def forward(self, x, targets=None):
        x = self.stem(x).relu()
        y = self.head(self.body(x).relu())
        if not self.training:
            return y
        if self.wants_targets:
            return ((self.helper(x) - targets[0]) ** 2).mean() + y.mean()
        return y, self.helper(x)


def test_an_auxiliary_head_is_cut_along():
    torch.manual_seed(0)
    model = Auxiliary()
    dense = trace(model, IMAGES)
    only_eval = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("helper"))
    prune(model, IMAGES, budget={"macs": 0.5}, round_to=1)
    assert model.helper[0].in_channels == model.stem.out_channels
    outputs = model.train()(IMAGES)
    sum(out.square().mean() for out in outputs).backward()
    assert dense.params > only_eval
    assert dense.macs == 36 * 16 * 27 + 16 * 16 * 16 * 9 + 16 * 16 * 4  # the helper costs nothing after training


def test_what_is_seen_before_targets_are_missed_counts():
    torch.manual_seed(0)
    model = Auxiliary(wants_targets=True).train()
    prune(model, IMAGES, budget={"macs": 0.5}, round_to=1)
    assert model.training
    assert model.helper[0].in_channels == model.stem.out_channels
    model(IMAGES, [torch.zeros(())]).backward()


class NeverCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.unused = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1), nn.Linear(16, 2)

    def forward(self, x, targets=None):
        if self.training and targets is None:
            msg = "targets are missing"
            raise ValueError(msg)
        return self.head(self.stem(x))


def test_layers_that_could_not_be_followed_are_named(caplog):
    with caplog.at_level(logging.WARNING, logger="nncf"):
        trace(NeverCalled(), IMAGES)
    assert "does not run in training mode" in caplog.text
    assert "'unused'" in caplog.text


def test_statistics_that_a_run_in_training_mode_moves_are_taken_back():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.InstanceNorm2d(16, track_running_stats=True))
    model.append(nn.Conv2d(16, 3, 3)).append(Auxiliary())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    trace(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("drop", [nn.Dropout2d(0.2), nn.FeatureAlphaDropout(0.2)])
def test_whole_channels_that_are_dropped_in_training_are_no_fixed_ones(drop):
    model = Auxiliary()
    model.body = nn.Sequential(model.body, drop)
    assert [group.size for group in trace(model, IMAGES).groups] == [16, 16, 8]
