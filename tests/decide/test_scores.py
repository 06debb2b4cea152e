"""Importance criteria on hand-set weights."""

from __future__ import annotations

import pytest
import torch
from support.networks import STRUCTURES, images, trained
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.decide.criteria.magnitude import batch_norm_scale, geometric_median, l1, l2, lamp, random
from nncf_compactprune.plugins import default_plugins


class Small(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)))


def context_of(model, graph, name=None):
    return next(c for c in criterion_contexts(model, graph) if name in (None, c.group.name))


def scored(model, criterion):
    return criterion(context_of(model, trace(model, torch.randn(1, 1, 3, 3))))


def test_by_hand():
    model = Small()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, -2.0, 3.0, 10.0]).view(4, 1, 1, 1))
        model.norm.weight.copy_(torch.tensor([0.1, -0.4, 0.2, 0.3]))
    assert scored(model, l1).tolist() == [1, 2, 3, 10]
    assert scored(model, l2).tolist() == [1, 2, 3, 10]
    assert scored(model, geometric_median).tolist() == [3 + 2 + 9, 3 + 5 + 12, 2 + 5 + 7, 9 + 12 + 7]
    torch.testing.assert_close(scored(model, batch_norm_scale), torch.tensor([0.1, 0.4, 0.2, 0.3]))


def test_without_a_norm_batch_norm_scale_falls_back_on_l1():
    model = Small(norm=False)
    expected = scored(model, l1)
    torch.testing.assert_close(scored(model, batch_norm_scale), expected / expected.mean())


def test_coupled_groups_sum_over_their_producers():
    model = trained("residual", dtype=torch.float32)
    graph = trace(model, images(torch.float32))
    stem, block = model.features[0][0].weight, model.features[1].conv2.weight
    expected = stem.detach().abs().sum((1, 2, 3)) + block.detach().abs().sum((1, 2, 3))
    torch.testing.assert_close(l1(context_of(model, graph)), expected)


def test_grouped_channels_sum_over_their_positions():
    model = trained("grouped", dtype=torch.float32)
    graph = trace(model, images(torch.float32))
    expected = model.features[1][0].weight.detach().abs().sum((1, 2, 3)).reshape(4, 8).sum(0)
    torch.testing.assert_close(l1(context_of(model, graph, "features.1.0")), expected)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median", "batch_norm_scale"])
def test_every_structure_scores(name, criterion):
    model = trained(name)
    for context in criterion_contexts(model, trace(model, images())):
        scores = default_plugins().importance[criterion](context)
        assert scores.shape == (context.group.size,)
        assert torch.isfinite(scores).all()
        assert (scores >= 0).all()


def test_lamp_is_the_share_of_what_is_not_smaller():
    model = Small()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([1.0, -2.0, 2.0, 3.0]).view(4, 1, 1, 1))
    torch.testing.assert_close(scored(model, lamp), torch.tensor([1 / 18, 4 / 17, 4 / 17, 1.0]))


def test_random_is_the_same_at_every_call_and_another_under_another_seed():
    model = trained("plain", dtype=torch.float32)
    graph = trace(model, images(torch.float32))
    torch.manual_seed(1)
    first = [random(one) for one in criterion_contexts(model, graph)]
    torch.rand(3)
    assert all(map(torch.equal, first, [random(one) for one in criterion_contexts(model, graph)]))
    torch.manual_seed(2)
    assert not any(map(torch.equal, first, [random(one) for one in criterion_contexts(model, graph)]))
    assert not torch.equal(first[0][:4], first[1][:4])


class Scaled(nn.Module):
    """Constants of one element on a map of one pixel: channels of their own, without a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 1)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.rand(1))

    def forward(self, x):
        return self.head(self.conv(x).amax((2, 3), keepdim=True) * self.scale + self.shift)


@pytest.mark.parametrize("importance", ["l1", "l2", "geometric_median", "batch_norm_scale", "lamp", "random"])
def test_a_group_of_constants_alone_has_scores(importance):
    model, x = Scaled(), torch.randn(2, 3, 8, 8)
    assert any(all(member.is_buffer for member in group.members) for group in trace(model, x).groups)
    assert prune(model, x, budget={"macs": 0.5}, importance=importance, round_to=1).self_check.error < 1e-5
