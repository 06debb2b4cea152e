"""Plans: both ways through JSON, and refused when they do not fit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.cuts import random_plan
from support.networks import STRUCTURES, Classifier, MixedConvolution, conv_bn, images, trained
from torch import nn

from nncf_compactprune import PruningPlan, apply_plan
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import PlanError
from nncf_compactprune.plan import make_plan


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return random_plan(trained("residual"), images())


@pytest.mark.parametrize("name", STRUCTURES)
def test_json_both_ways(name):
    plan = random_plan(trained(name), images())
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_replay_on_a_fresh_model_is_bit_identical(plan):
    first, second = trained("residual"), trained("residual")
    apply_plan(first, plan)
    apply_plan(second, PruningPlan.from_json(plan.to_json()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


def test_keep_all_is_the_identity():
    graph = trace(trained("plain"), images())
    plan = make_plan(graph, [torch.ones(g.size, dtype=torch.bool).numpy() for g in graph.groups])
    assert plan.is_identity
    assert plan.after == plan.before


def test_losing_every_channel_is_refused():
    graph = trace(trained("plain"), images())
    keep = [torch.ones(g.size, dtype=torch.bool).numpy() for g in graph.groups]
    keep[0][:] = False
    with pytest.raises(PlanError, match="at least one channel"):
        make_plan(graph, keep)


def test_frozen(plan):
    with pytest.raises(TypeError):
        plan.kept["x"] = {}  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.algorithm = "x"  # type: ignore[misc]


def edited(plan: PruningPlan, change) -> str:
    document = json.loads(plan.to_json())
    change(document)
    return json.dumps(document)


FIRST = "features.0.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["kept"][FIRST].update({"0": [0, 99]}), "position 99 is out of range, expected 0 to 15"),
        (lambda d: d["kept"][FIRST].update({"0": [1, 1]}), "without repeats"),
        (lambda d: d["kept"][FIRST].update({"0": [2, 1]}), "ascending"),
        (lambda d: d["kept"][FIRST].update({"0": []}), "at least one kept position"),
        (lambda d: d["kept"][FIRST].update({"7": [0]}), "expected a dimension below 4"),
        (lambda d: d["kept"].update({"nowhere": {"0": [0]}}), "'nowhere' does not exist"),
        (lambda d: d.update(fingerprint="0" * 64), "another model"),
    ],
)
def test_plan_that_does_not_fit(plan, change, words):
    with pytest.raises(PlanError, match=words):
        PruningPlan.from_json(edited(plan, change)).validate(trained("residual"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version=2), "version"),
        (lambda d: d.update(format="x"), "format"),
        (lambda d: d.pop("kept"), "kept"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d["kept"][FIRST].update({"0": [-1]}), "kept"),
        (lambda d: d["kept"][FIRST].update({"0": ["1"]}), "kept"),
        (lambda d: d["kept"][FIRST].update({"x": [1]}), "kept"),
    ],
)
def test_text_that_is_no_plan(plan, change, words):
    with pytest.raises(PlanError, match=words):
        PruningPlan.from_json(edited(plan, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kept": ' + "[" * 5000, b"\xff\xfe"])
def test_garbage(text):
    with pytest.raises(PlanError, match="plan: "):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.update(num_heads=1), "follows from no kept width"),
        (lambda values: values.update(num_heads=99), "from 1 to what it is now"),
        (lambda values: values.update(training=1), "count of heads"),
    ],
)
def test_head_counts_are_not_believed(change, words):
    plan = random_plan(trained("attention"), images(), ratio=0.3)
    assert plan.attributes
    document = json.loads(plan.to_json())
    change(next(iter(document["attributes"].values())))
    model = trained("attention")
    with pytest.raises(PlanError, match=words):
        apply_plan(model, PruningPlan.from_json(json.dumps(document)))
    apply_plan(model, plan)


class Odd(MixedConvolution):
    """Numbers that are not for plans."""

    def __init__(self) -> None:
        super().__init__([8, 8])
        self.stride, self._version, self.levels = 2, 2, nn.ModuleList([nn.Identity()])

    @property
    def computed(self) -> int:
        pytest.fail("a plan ran a property")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"splits": [4, 0]}, "from 1 to what it is now"),
        ({"splits": [9, 4]}, "from 1 to what it is now"),
        ({"splits": [4]}, "from 1 to what it is now"),
        ({"splits": 4}, "from 1 to what it is now"),
        ({"splits": []}, "from 1 to what it is now"),
        ({"splits": [4, True]}, "expected a whole number"),
        ({"splits": [[4], 4]}, "expected a whole number"),
        ({"splits": "88"}, "expected a whole number"),
        ({"training": 1}, "count of heads or of channels"),
        ({"stride": 1}, "count of heads or of channels"),
        ({"levels": [1]}, "count of heads or of channels"),
        ({"_version": 1}, "count of heads or of channels"),
        ({"computed": 1}, "count of heads or of channels"),
        ({"forward": 1}, "count of heads or of channels"),
        ({"absent": 1}, "count of heads or of channels"),
    ],
)
def test_sizes_of_splits_are_not_believed(change, words):
    def build():
        torch.manual_seed(0)
        return Classifier(nn.Sequential(conv_bn(3, 16), Odd(), conv_bn(16, 16)), 16).double().eval()

    plan = random_plan(build(), images())
    document = json.loads(plan.to_json())
    document["attributes"]["features.1"].update(change)
    model = build()
    with pytest.raises(PlanError, match=words):
        apply_plan(model, PruningPlan.from_json(json.dumps(document)))
    apply_plan(model, plan)


def test_numbers_of_torchs_own_layers_are_not_for_plans():
    document = json.loads(random_plan(trained("mixed_convolution"), images()).to_json())
    document["attributes"]["features.2.0"] = {"out_channels": 1}
    with pytest.raises(PlanError, match=r"features\.2\.0\.out_channels: expected a count of heads or of channels"):
        apply_plan(trained("mixed_convolution"), PruningPlan.from_json(json.dumps(document)))


def test_a_split_that_loses_more_than_the_plan_removes_is_refused():
    plan = random_plan(trained("mixed_convolution"), images())
    altered = dataclasses.replace(plan, kept={}, after=plan.before, attributes={"features.1": {"splits": (1, 8)}})
    with pytest.raises(PlanError, match="follows from no kept width"):
        apply_plan(trained("mixed_convolution"), altered)
