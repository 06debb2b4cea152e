"""What the self-check sees where outputs say nothing, and what it says where it saw nothing either."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.cuts import marks, random_plan
from support.networks import STRUCTURES, conv_bn, images, trained
from torch import nn

from nncf_compactprune import PruningPlan, prune
from nncf_compactprune.cut.self_check import SelfCheck, prune_in_place
from nncf_compactprune.errors import SelfCheckError
from nncf_compactprune.host.tensors import model_tensors


class Detector(nn.Module):
    """Gives the places whose score is high enough: none at all in noise."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
        self.score, self.box = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = self.features(x)
        found = self.score(y).flatten() > 100
        return self.box(y).movedim(1, -1).reshape(-1, 4)[found]


class Fragile(Detector):
    """Cannot work on what it finds in noise, as torchvision's detectors where a build lacks an operator."""

    def forward(self, x):
        y = self.features(x)
        scores, boxes = self.score(y), self.box(y)
        if not torch.equal(scores, F.conv2d(y, self.score.weight, self.score.bias)):
            raise NotImplementedError
        return boxes.movedim(1, -1).reshape(-1, 4)[scores.flatten() > 100]


class Scaled(nn.Module):
    """ConvNeXt's layer scale: at 1e-6 a branch is below the rounding of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.gamma = nn.Parameter(torch.full((16, 1, 1), 1e-6))

    def forward(self, x):
        return x + self.gamma * self.outer(F.gelu(self.inner(x)))


class Silent(nn.Module):
    """Constant whatever comes, as untrained networks of many layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16), conv_bn(16, 16))
        self.head = nn.Linear(16, 5)
        for module in self.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 1e-30)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def detector():
    return Detector()


def fragile():
    return Fragile()


def layer_scale():
    return nn.Sequential(nn.Conv2d(3, 16, 3), Scaled(), Scaled(), nn.Flatten(2))


def silent():
    return Silent()


BLIND = (detector, fragile, layer_scale, silent)


def with_one_index_exchanged(plan: PruningPlan, model: nn.Module, seed: int) -> PruningPlan:
    """A plan that keeps another position in one place, where the values there differ."""
    generator, tensors = np.random.default_rng(seed), model_tensors(model).all()
    places = [(name, dim) for name, dims in plan.kept.items() for dim in dims]
    while True:
        name, dim = places[generator.integers(len(places))]
        stays = list(plan.kept[name][dim])
        gone = sorted(set(range(tensors[name].shape[dim])) - set(stays))
        at, new = generator.integers(len(stays)), gone[generator.integers(len(gone))]
        values = tensors[name].data.movedim(dim, 0)
        if not torch.equal(values[stays[at]], values[new]):
            stays[at] = new
            kept = {n: dict(dims) for n, dims in plan.kept.items()}
            kept[name][dim] = tuple(sorted(stays))
            return dataclasses.replace(plan, kept=kept)


@pytest.mark.parametrize("build", BLIND)
@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_index_is_seen_where_the_outputs_do_not_tell(build, seed):
    torch.manual_seed(seed)
    model, x = build().eval(), images(torch.float32)
    plan = random_plan(model, x, seed=seed)
    check = prune_in_place(model, plan, x, dry_run=True)
    assert check.is_proof
    assert check.inside <= 1e-5
    assert check.compared
    before = marks(model)
    wrong = with_one_index_exchanged(plan, model, seed)
    with pytest.raises(SelfCheckError, match=r"differs from the masked one.* in '"):
        prune_in_place(model, wrong, x)
    assert marks(model) == before


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_wrong_index_is_seen_in_every_structure(name):
    model, x = trained(name), images()
    for seed in range(5):
        plan = with_one_index_exchanged(random_plan(model, x, seed=seed), model, seed)
        with pytest.raises(SelfCheckError):
            prune_in_place(model, plan, x)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_cut_layer_is_compared(name):
    model, x = trained(name), images()
    check = prune_in_place(model, random_plan(model, x), x)
    assert check.unseen == ()
    assert check.inside <= 1e-13
    assert check.is_proof


class ByFunction(nn.Module):
    """Its layers are used without being called, and it answers with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        y = F.conv2d(x, self.first.weight, self.first.bias).relu()
        return F.conv2d(y, self.second.weight, self.second.bias)[:0]


def test_an_empty_comparison_is_no_proof(caplog):
    model, x = ByFunction(), images(torch.float32)
    with caplog.at_level(logging.WARNING, logger="nncf"):
        result = prune(model, x, budget={"macs": 0.6}, round_to=1)
    assert not result.self_check.is_proof
    assert result.self_check.unseen == ("first", "second")
    assert "no proof: 'first', 'second' not compared" in str(result.self_check)
    assert "proves nothing" in caplog.text


RUNS: list = []  # what networks are called with and answer: no attribute, or it would be taken back


class Counted(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        RUNS.append((x, y))
        return y


class OneExample(nn.Module):
    """Takes one example at a time."""

    def forward(self, x):
        return x.view(1, *x.shape[1:])


@pytest.mark.parametrize("more", [(), (OneExample(),)], ids=["in pairs", "one example"])
def test_one_number_is_compared_where_other_inputs_change_it(more):
    model = nn.Sequential(counted(*more), nn.ReLU(), nn.Linear(4, 1)).eval()
    x = torch.randn(1, 3, 32, 32)
    plan = random_plan(model, x)
    check = prune_in_place(model, plan, x, dry_run=True)
    assert not check.silent
    assert "at the outputs" in str(check)
    with torch.no_grad():
        model[2].weight.mul_(1e-30)
    assert prune_in_place(model, plan, x, dry_run=True).silent


class OfTokens(nn.Module):
    """One number for each text, by the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 1)

    def forward(self, tokens, mask):
        seen = self.table(tokens) * mask.unsqueeze(-1)
        return self.last(self.first(seen.sum(1) / mask.sum(1, keepdim=True)).relu())


def test_one_number_of_tokens_is_compared_as_well():
    torch.manual_seed(0)
    model, tokens = OfTokens().eval(), torch.randint(1, 50, (1, 12))
    inputs = (tokens, torch.ones(1, 12, dtype=torch.int64))
    check = prune_in_place(model, random_plan(model, inputs), inputs, dry_run=True)
    assert not check.silent


def test_the_result_says_what_was_compared():
    seen = SelfCheck(1e-7, "float32", 0.1, 2e-7, "a", ("a", "b"), ("c",))
    assert str(seen) == "error 1e-07 at the outputs, 2e-07 inside (2 of 3 cut layers compared)"
    assert seen.is_proof


def counted(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = (conv_bn(3, 16), conv_bn(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return Counted(*more, *layers).eval()


def test_two_runs_tell_the_outputs_and_what_is_inside():
    model = counted()
    x = torch.randn(1, 3, 224, 224)
    plan = random_plan(model, x)
    RUNS.clear()
    check = prune_in_place(model, plan, x)
    assert check.is_proof
    assert check.unseen == ()
    assert [tuple(given.shape) for given, _ in RUNS] == [(2, 3, 56, 56)] * 2
    own = model(RUNS[0][0])
    torch.testing.assert_close(RUNS[0][1][:1], own[:1])  # the first example's answer is the network's own
    torch.testing.assert_close(RUNS[1][1][:1], own[:1])
    assert not torch.allclose(RUNS[0][1][1:], own[1:], rtol=0.1)  # the second got noise


def test_a_network_of_one_example_runs_twice_each():
    model = counted(OneExample())
    x = torch.randn(1, 3, 32, 32)
    plan = random_plan(model, x)
    RUNS.clear()
    check = prune_in_place(model, plan, x, dry_run=True)
    assert check.unseen == ()
    assert [len(given) for given, _ in RUNS] == [1] * 4
    with pytest.raises(SelfCheckError, match="differs from the masked one"):
        prune_in_place(model, with_one_index_exchanged(plan, model, 0), x)


def test_behind_a_dead_layer_noise_tells():
    model = counted()
    x = torch.randn(1, 3, 32, 32)
    plan = random_plan(model, x)
    with torch.no_grad():
        model[0][1].weight.zero_()
        model[0][1].bias.fill_(-1)  # behind its ReLU all is 0
    assert prune_in_place(model, plan, x, dry_run=True).is_proof
    consumer = "1.0.weight"
    stays = list(plan.kept[consumer][1])
    stays[0] = next(at for at in range(16) if at not in stays)
    kept = {**plan.kept, consumer: {**plan.kept[consumer], 1: tuple(sorted(stays))}}
    with pytest.raises(SelfCheckError, match=r"in '1\.0'"):
        prune_in_place(model, dataclasses.replace(plan, kept=kept), x)


def test_computed_weights_are_compared_too():
    model = counted()
    torch.nn.utils.parametrizations.weight_norm(model[0][0])
    x = torch.randn(1, 3, 32, 32)
    plan = random_plan(model, x)
    check = prune_in_place(model, plan, x, dry_run=True)
    assert any("parametrizations" in name for name in check.compared)
    assert check.inside <= 1e-5
