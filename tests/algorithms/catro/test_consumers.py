"""Consumers are found however a network calls them, and effects and contributions are what removal really does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import STRUCTURES, images, trained
from torch import Tensor, nn

from nncf_compactprune.algorithms.catro import consumers, contributions
from nncf_compactprune.algorithms.catro.class_effects import FeatureScatter, MarginEffects, margins
from nncf_compactprune.algorithms.catro.consumers import ConsumerMode
from nncf_compactprune.algorithms.catro.contributions import Contributions
from nncf_compactprune.channels import ChannelGraph, ChannelGroup, trace
from nncf_compactprune.cut.masks import Masks

LABELS = torch.tensor([1, 3])


def labelled(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 3, 12, 12, generator=generator, dtype=torch.float64), torch.arange(n) % 5


def effects_of(model: nn.Module, graph: ChannelGraph, *batches: tuple[Tensor, Tensor], **kw: object) -> MarginEffects:
    result = MarginEffects(graph, range(len(graph.groups)), **kw)
    result.collect(model, batches)
    return result


@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - {"transposed", "recurrent"}))
def test_effects_are_the_derivative_of_margins_when_a_channel_fades(name: str) -> None:
    """For every structure and group: scale a channel's slices at all consumers and differentiate numerically."""
    model = trained(name)
    x = images()
    graph = trace(model, x)
    found = effects_of(model, graph, (x, LABELS))
    assert {group for group, _ in found.effects} == set(range(len(graph.groups)))  # no group without consumers
    for (index, consumer), effects in found.effects.items():
        group = graph.groups[index]
        channel = index % group.size
        derivative = faded(model, group, consumer, channel, 1e-5, x) - faded(model, group, consumer, channel, -1e-5, x)
        squared = float(effects[channel, channel])
        assert squared == pytest.approx(float((derivative / 2e-5).square().sum()), rel=1e-3, abs=1e-12), group.name


@torch.no_grad()
def faded(model: nn.Module, group: ChannelGroup, consumer: str, channel: int, step: float, x: Tensor) -> Tensor:
    """Margins with a channel's slice of one consumer scaled by 1 + step."""
    changed = copy.deepcopy(model)
    (member,) = (m for m in group.members if m.parameter == consumer and m.role == "consumer")
    weight = dict(changed.named_parameters())[consumer]
    weight.data.movedim(member.dim, 0)[torch.as_tensor(member.indices[channel])] *= 1 + step
    return margins(changed(x), LABELS)


class Several(nn.Module):
    """Consumers as modules, functions and products of either orientation; 1-d, 3-d, strided, dilated, grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.strided = nn.Conv2d(8, 8, 3, 2, 2, 2, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, (5, 3), padding="same", groups=2)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.volume = nn.Conv3d(6, 4, (1, 3, 2))
        self.kernel = nn.Parameter(torch.randn(4, 8))
        self.table = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.same(F.relu(self.strided(F.relu(self.stem(x))))))
        x = F.relu(self.line(x.flatten(2)))
        x = F.relu(F.conv3d(input=x.reshape(*x.shape[:2], 1, 5, 5), weight=self.volume.weight))
        x = x.mean((2, 3, 4)).to(x.dtype)
        return F.relu(x @ self.kernel).matmul(self.table)


def test_consumers_are_found_in_functional_code() -> None:
    torch.manual_seed(0)
    model, (x, y) = Several().double().eval(), labelled()
    graph = trace(model, x)
    found = effects_of(model, graph, (x, y))
    assert {parameter for _, parameter in found.effects} == {
        "strided.weight", "same.weight", "line.weight", "volume.weight", "kernel", "table"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "grouped", "flatten", "option_a", "pixel_shuffle", "attention"])
def test_contributions_are_those_of_single_channels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the consumer itself, run with one channel at a time and all positions looked at."""
    monkeypatch.setattr(contributions, "PATCHES", 10**6)
    model, x = trained(name), images()
    graph = trace(model, x)
    checked = 0

    def see(call: consumers.Call) -> Tensor:
        nonlocal checked
        for use in call.uses:
            got = Contributions(len(use.positions))
            got.update(call, use)
            outputs = []
            for positions in use.positions:
                alone = torch.zeros_like(call.x)
                alone.movedim(call.axis, 0)[positions] = call.x.movedim(call.axis, 0)[positions]
                if call.kind == "convolution":
                    options = {k: v for k, v in call.options.items() if k not in ("input", "weight", "bias")}
                    function = {3: F.conv1d, 4: F.conv2d}[call.x.dim()]
                    outputs.append(function(alone, call.weight, None, **options).movedim(1, -1))
                else:
                    outputs.append(alone @ (call.weight if call.kind == "product" else call.weight.T))
            z = torch.stack([o.reshape(-1, o.shape[-1]) for o in outputs])
            z = (z - z.mean(1, keepdim=True)).flatten(1)
            torch.testing.assert_close(got.gram, z @ z.T, rtol=1e-8, atol=1e-8)
            checked += 1
        return call.x

    with torch.no_grad(), ConsumerMode(model, graph, range(len(graph.groups)), see):
        model(x)
    assert checked >= len(graph.groups)


def test_many_outputs_are_mixed_down_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = torch.randn(6, 3, 4000)
    exact = torch.einsum("kto,lto->kl", weights, weights)
    mixed = contributions._sketched(weights)
    assert mixed.shape == (6, 3, contributions.SKETCH)
    approximate = torch.einsum("kto,lto->kl", mixed, mixed)
    assert float((exact - approximate).abs().max() / exact.max()) < 0.35
    assert torch.equal(mixed, contributions._sketched(weights))


def test_a_lattice_is_spread_over_all_dimensions() -> None:
    points = contributions.PATCHES
    flat = contributions._lattice((32, 32), points)
    assert len(flat.unique()) == points
    for values in (flat // 32, flat % 32):
        assert values.min() < 11
        assert values.max() >= 21
        assert len(values.unique()) > points // 2
    assert contributions._lattice((2, 2), points).tolist() == [0, 1, 2, 3]


# -- invariances -------------------------------------------------------------------------------------------------------


def gram(found: MarginEffects, group: int = 1) -> Tensor:
    result = found.gram(group, 3.0)
    assert result is not None
    return result


def test_order_and_batches_do_not_matter() -> None:
    model, (x, y) = trained("residual"), labelled()
    graph = trace(model, x)
    whole = effects_of(model, graph, (x, y))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    parts = zip(x[order].split([1, 3, 2]), y[order].split([1, 3, 2]), strict=True)
    split = effects_of(model, graph, *parts)
    for group in range(len(graph.groups)):
        torch.testing.assert_close(gram(whole, group), gram(split, group))


def test_relabelling_the_classes_changes_nothing() -> None:
    model, (x, y) = trained("residual"), labelled()
    graph = trace(model, x)
    before = gram(effects_of(model, graph, (x, y)))
    rename = torch.tensor([2, 0, 4, 1, 3])  # old class c is called rename[c] now
    with torch.no_grad():
        for tensor in (model.head.weight, model.head.bias):
            tensor.data = torch.empty_like(tensor).index_copy_(0, rename, tensor.data)
    torch.testing.assert_close(gram(effects_of(model, graph, (x, rename[y]))), before)


def test_margins_look_at_the_classes_that_count_only() -> None:
    scores = torch.tensor([[1.0, 2.0, 30.0, 0.5]])
    wanted = torch.tensor([0, 1, 3])
    got = margins(scores, torch.tensor([1]), wanted)
    assert got.item() == pytest.approx(2 - torch.tensor([1.0, 0.5]).logsumexp(0).item())
    assert margins(scores, torch.tensor([1])).item() < -20


# -- other models ------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """Frozen parameters stay frozen, gradients stay what they were, training flags too."""
    model, (x, y) = trained("residual").train(), labelled()
    for parameter in model.features[0].parameters():
        parameter.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, x)
    effects_of(model, graph, (x, y))
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert model.head.weight.grad.eq(1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")


def test_masked_channels_have_no_effect() -> None:
    """Under NNCF's hooks, where a weight is computed from its parameter."""
    from support.cuts import random_plan

    model, (x, y) = trained("residual"), labelled()
    graph = trace(model, x)
    plan = random_plan(model, x)
    masks = Masks(model, graph)
    masks.update(plan)
    found = effects_of(model, graph, (x, y))
    masks.remove()
    alive = [gram(found, g).diagonal() > 0 for g in range(len(graph.groups))]
    for group, living in zip(graph.groups, alive, strict=True):
        first = group.members[0]
        kept = set(plan.kept[first.parameter][first.dim])
        assert {k for k in range(group.size) if living[k]} <= kept
        assert living.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tells_the_same(dtype: torch.dtype) -> None:
    model, (x, y) = trained("plain", dtype=torch.float32), labelled()
    graph = trace(model, x.float())
    full = gram(effects_of(model, graph, (x.float(), y)))
    half = gram(effects_of(model.to(dtype), graph, (x.to(dtype), y)))
    assert half.dtype == torch.float64
    assert float((half - full).norm() / full.norm()) < 0.1


def test_statistics_are_taken_in_full_precision_inside_autocast_too() -> None:
    model, (x, y) = trained("plain", dtype=torch.float32), labelled()
    graph = trace(model, x.float())
    full = gram(effects_of(model, graph, (x.float(), y)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gram(effects_of(model, graph, (x.float(), y))), full)


@pytest.mark.gpu
def test_the_device_does_not_matter() -> None:
    model, (x, y) = trained("residual"), labelled()
    graph = trace(model, x)
    expected = gram(effects_of(model, graph, (x, y)))
    torch.testing.assert_close(gram(effects_of(model.cuda(), graph, (x.cuda(), y.cuda()))), expected)


def test_feature_scatter_is_that_of_pooled_inputs() -> None:
    model, (x, y) = trained("plain"), labelled(10)
    graph = trace(model, x)
    scatter = FeatureScatter(graph, range(len(graph.groups)), 5, 2)
    scatter.collect(model, [(x[:3], y[:3]), (x[3:], y[3:])])
    with torch.no_grad():
        features = F.adaptive_avg_pool2d(model.features[1](model.features[0](x)), 2).flatten(2)  # enters features.2
    mean = torch.stack([features[y == c].mean(0) for c in range(5)])
    between = (2 * (mean - features.mean(0)).square()).sum((0, 2))
    within = (features - mean[y]).square().sum((0, 2))
    scale = (between + within).mean()
    got = scatter.scatter(0)
    assert got is not None
    torch.testing.assert_close(got[0], between / scale)
    torch.testing.assert_close(got[1], within / scale)
