"""Splits and slices whose places a module's own numbers say: the numbers follow the cut, and no other number does."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cuts import random_plan, same, snapshot
from support.networks import Classifier, MixedConvolution, conv_bn, images, model32, trained
from torch import nn

from nncf_compactprune import PruningPlan, analyse, apply_plan, prune
from nncf_compactprune.channels import trace


def stems(inner: nn.Module, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(conv_bn(3, width), inner, nn.Conv2d(width, 16, 1)), 16).eval()


def attributes(model: nn.Module) -> dict:
    return {(a.module, a.attribute): a.dense for a in trace(model, images(torch.float32)).attributes}


def by_list(self, x):
    return x.split(self.splits, 1)


def by_numbers(self, x):
    return torch.split(x, [self.a, self.b], 1)


def by_difference(self, x):
    return torch.split(x, [self.a, self.whole - self.a], 1)


def by_slices(self, x):
    return x[:, : self.a], x[:, self.a :]


def by_the_last(self, x):
    return x[:, : -self.b], x[:, -self.b :]


def by_halves(self, x):
    return x.split(self.whole // 2, 1)


def by_one_number_for_both(self, x):
    return x.split((self.a, self.a), 1)


def by_the_last_half(self, x):
    return x[:, : -self.b], x[:, -self.b :]


def by_every_other(self, x):
    return x[:, ::2], x[:, 1::2]


def by_narrow(self, x):
    return x.narrow(1, 0, self.a), x.narrow(1, self.a, self.b)


class TwoParts(nn.Module):
    """A layer of its own for each of the two parts that ``where`` cuts."""

    def __init__(self, where, a: int, /, **numbers) -> None:
        super().__init__()
        self.where = where
        self.one, self.other = nn.Conv2d(a, a, 1), nn.Conv2d(16 - a, 16 - a, 1)
        for name, value in numbers.items():
            setattr(self, name, value)

    def forward(self, x):
        first, second = self.where(self, x)
        return torch.cat([self.other(second), self.one(first)], 1)


CASES = {
    by_list: {"splits": [6, 10]},
    by_numbers: {"a": 6, "b": 10},
    by_difference: {"a": 6, "whole": 16},
    by_slices: {"a": 6},
    by_the_last: {"b": 10},
    by_halves: {"whole": 16},
    by_narrow: {"a": 6, "b": 10},
    by_one_number_for_both: {"a": 8},
    by_the_last_half: {"b": 8},
    by_every_other: {},
}


HALVES = (by_halves, by_one_number_for_both, by_the_last_half, by_every_other)


@pytest.mark.parametrize("where", CASES, ids=lambda where: where.__name__)
def test_numbers_follow_the_cut(where):
    numbers = CASES[where]
    model = stems(TwoParts(where, 8 if where in HALVES else 6, **numbers))
    graph = analyse(model, images(torch.float32))
    assert {pinned.reason for pinned in graph.pinned} == {"model output"}
    result = prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1, importance="l1")
    assert result.self_check.error <= 1e-5
    one, other = model.features[1].one.in_channels, model.features[1].other.in_channels
    assert one + other < 16
    expected = {"splits": [one, other], "a": one, "b": other, "whole": one + other}
    assert {name: getattr(model.features[1], name) for name in numbers} == {name: expected[name] for name in numbers}


def test_a_list_leaves_its_parts_free_of_each_other_and_a_number_does_not():
    for name, group, sizes in [
        ("mixed_convolution", "features.2.0", [4, 6, 10]),
        ("multi_scale", "features.1.inner.0", [6]),
    ]:
        groups = trace(trained(name), images()).groups
        assert sorted(g.size for g in groups if g.name == group) == sizes


@pytest.mark.parametrize(("where", "number"), [(by_slices, "a"), (by_the_last_half, "b")])
def test_halves_that_one_number_tells_apart_are_free_of_each_other(where, number):
    groups = trace(stems(TwoParts(where, 8, **{number: 8})), images(torch.float32)).groups
    assert [g.size for g in groups if g.name == "features.0.0"] == [8, 8]


def test_a_number_never_comes_down_to_nothing():
    """Both parts go to the same layers: without more, all of one part could go."""

    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.splits = (3, 13)

        def forward(self, x):
            return torch.cat(x.split(self.splits, 1)[::-1], 1)

    model = stems(Swap())
    graph = trace(model, images(torch.float32))
    assert sorted(g.size for g in graph.groups if g.name == "features.0.0") == [3, 13]
    prune(model, images(torch.float32), budget={"macs": 0.3}, round_to=1, importance="l1")
    assert type(model.features[1].splits) is tuple
    assert min(model.features[1].splits) >= 1


def test_a_chunk_is_no_split_by_a_number():
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = 8

        def forward(self, x):
            first, second = x.chunk(2, 1)
            return torch.cat([second * (1 / self.hidden), first], 1)

    assert attributes(stems(Chunked())) == {}


def test_what_the_running_code_does_not_read_is_left_alone():
    class Bystander(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.levels = 6, 10, 6

        def forward(self, x):
            return torch.cat(x.split([self.first, self.second], 1)[::-1], 1)

    assert attributes(stems(Bystander())) == {("features.1", "first"): 6, ("features.1", "second"): 10}


def by_literals(self, x):
    first, second = x.split([6, 10], 1)
    return first * (1 / self.a), second * (1 / self.b)  # both fit, and are something else


def test_a_wrong_guess_is_found_out_by_the_trial_cut():
    model = stems(TwoParts(by_literals, 6, a=6, b=10))
    before = snapshot(model)
    assert attributes(model) == {("features.1", "a"): 6, ("features.1", "b"): 10}
    graph = analyse(model, images(torch.float32))
    assert same(snapshot(model), before)
    pinned = {p.name: p for p in graph.pinned}["features.0.0"]
    assert "split_with_sizes in 'features.1' does not follow a smaller width" in pinned.reason
    assert pinned.location.startswith("test_cuts_by_number.py:")
    result = prune(model, images(torch.float32), budget={"macs": 0.8}, round_to=1)
    assert not result.plan.attributes
    assert (model.features[1].a, model.features[1].b) == (6, 10)


def test_numbers_of_the_class_and_shared_lists_stay_as_they_are():
    shared = [8, 8]

    class OfClass(MixedConvolution):
        splits = shared

        def __init__(self) -> None:
            super().__init__([8, 8])
            del self.splits

    model = stems(OfClass())
    prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1)
    assert OfClass.splits is shared
    assert shared == [8, 8]
    assert model.features[1].splits == [conv.in_channels for conv in model.features[1].parts] != [8, 8]


def test_plans_carry_lists_through_json_and_later_plans():
    x = images(torch.float32)
    dense = model32("mixed_convolution")
    model = copy.deepcopy(dense)
    plans = []
    for seed in (0, 1):
        plans.append(PruningPlan.from_json(random_plan(model, x, seed=seed, ratio=0.3).to_json()))
        apply_plan(model, plans[-1])
    assert plans[0].attributes["features.3"] == {"splits": tuple(map(len, split_of(plans[0])))}
    again = copy.deepcopy(dense)
    apply_plan(again, plans[0].then(plans[1]))
    assert again.features[3].splits == model.features[3].splits
    assert torch.equal(again(x), model(x))


def split_of(plan: PruningPlan) -> list[tuple[int, ...]]:
    return [plan.kept.get(f"features.3.parts.{i}.weight", {0: range(n)})[0] for i, n in enumerate((10, 6, 4))]


def test_an_average_of_the_weights_gets_its_own_list():
    x = images(torch.float32)
    model = model32("mixed_convolution")
    ema = copy.deepcopy(model)
    apply_plan(model, random_plan(model, x), ema=ema)
    assert ema.features[1].splits == model.features[1].splits
    assert ema.features[1].splits is not model.features[1].splits
    assert torch.equal(ema(x), model(x))


class Blur(nn.Module):
    """A filter for each channel, in a buffer; own code says how many groups there are."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.stem, self.head = 16, nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.register_buffer("filters", torch.ones(16, 1, 3, 3) / 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.conv2d(self.stem(x).relu(), self.filters, groups=self.channels))


def test_a_number_of_groups_follows_a_depthwise_convolution_in_own_code() -> None:
    model = Blur()
    prune(model, torch.randn(2, 3, 8, 8), budget={"macs": 0.5}, round_to=1)
    assert model.channels == len(model.filters) == model.stem.out_channels < 16
