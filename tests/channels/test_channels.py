"""Channel analysis: what hangs together, what is pinned and why, what it costs."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from support.cuts import random_plan
from support.networks import STRUCTURES, Classifier, conv_bn, images, trained
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nncf_compactprune import analyse, apply_plan, prune
from nncf_compactprune.channels import trace
from nncf_compactprune.channels.views import blocks, reshape_labels
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.errors import PlanError, TraceError


def members(graph, name):
    group = next(g for g in graph.groups if g.name == name)
    return {(m.parameter, m.dim, m.role) for m in group.members}


def test_members_of_a_plain_layer():
    graph = trace(trained("plain"), images())
    assert members(graph, "features.0.0") == {
        ("features.0.0.weight", 0, "producer"),
        ("features.0.1.weight", 0, "norm"),
        ("features.0.1.bias", 0, "norm"),
        ("features.0.1.running_mean", 0, "norm"),
        ("features.0.1.running_var", 0, "norm"),
        ("features.2.0.weight", 1, "consumer"),
    }


def test_residual_stage_is_one_group():
    graph = trace(trained("residual"), images())
    produced = {m[0] for m in members(graph, "features.0.0") if m[2] == "producer"}
    assert produced == {"features.0.0.weight", "features.1.conv2.weight"}


def test_option_a_pins_exactly_the_padded_channels():
    graph = trace(trained("option_a"), images())
    padded = [p for p in graph.pinned if "padding" in p.reason]
    assert {(p.name, p.size) for p in padded} == {("features.2.conv2", 16)}
    stage = next(g for g in graph.groups if g.name == "features.0.0")
    head = next(m for m in stage.members if m.parameter == "head.weight")
    np.testing.assert_array_equal(head.indices.ravel(), np.arange(8, 24))


def test_flatten_repeats_each_channel_for_every_position():
    graph = trace(trained("flatten"), images())
    hidden = next(m for m in graph.groups[0].members if m.parameter == "hidden.weight")
    assert hidden.indices.shape == (16, 9)
    np.testing.assert_array_equal(hidden.indices[1], np.arange(9, 18))


def test_grouped_convolution_keeps_its_groups_equal():
    graph = trace(trained("grouped"), images())
    group = next(g for g in graph.groups if g.name == "features.1.0")
    np.testing.assert_array_equal(group.members[0].indices[0], [0, 8, 16, 24])


def test_where_each_group_makes_one_channel_whole_groups_go():
    model = trained("merging_groups")
    graph = trace(model, images())
    assert [group.size for group in graph.groups] == [16, 16]
    prune_in_place(model, random_plan(model, images()), images())
    pairs = model.features[1]
    assert pairs.merge.groups == pairs.up.groups == pairs.down.groups == pairs.merge.in_channels // 2 < 16


def test_what_is_stretched_over_channels_is_as_wide_as_they_are():
    assert [group.size for group in trace(trained("stretched"), images()).groups] == [16, 24]


def test_layer_norm_is_offered_by_consent_only():
    model = trained("layer_norm")
    strict, approximate = trace(model, images()), trace(model, images(), allow_approximate=True)
    assert [g.name for g in strict.groups] == ["features.1.inner"]
    assert any(p.kind == "approximate" and "layer_norm" in p.reason for p in strict.pinned)
    extra = [g for g in approximate.groups if g.approximate]
    assert len(extra) == 1
    assert extra[0].size == 16


@pytest.mark.parametrize("name", STRUCTURES)
def test_macs_are_those_that_torch_counts(name):
    """torch counts 2 FLOPs a MAC, for the whole batch."""
    model, x = trained(name), images()
    # torch's counter knows the fused attention of CUDA, but not that of the CPU
    fused = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)  # shapes
        )
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
        model(x)
    graph = trace(model, x)
    assert graph.macs == counter.get_total_flops() // 2 // x.shape[0]
    assert graph.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_trace_leaves_no_mark(name):
    model = trained(name)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, images())
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_sides_of_transposed_convolutions():
    """Their weights are ``[in, out / groups, ...]``."""
    graph = trace(trained("transposed"), images())
    roles = {
        (member.parameter, member.dim): member.role
        for group in graph.groups
        for member in group.members
        if member.parameter.startswith("up")
    }
    assert {key: roles[key] for key in roles if key[0] in ("up.weight", "up_grouped.weight")} == {
        ("up.weight", 0): "consumer", ("up.weight", 1): "producer",
        ("up_grouped.weight", 0): "consumer", ("up_grouped.weight", 1): "producer",
    }  # fmt: skip
    assert roles["up_depthwise.weight", 0] == "producer"


def test_savings_agree_with_the_polynomial():
    cost = trace(trained("dense_concat"), images()).cost
    sizes = trace(trained("dense_concat"), images()).sizes.astype(float)
    for kind in ("macs", "params"):
        for group in range(len(sizes)):
            fewer = sizes.copy()
            fewer[group] -= 3
            assert cost[kind].saved(sizes, group, 3) == pytest.approx(cost[kind](sizes) - cost[kind](fewer), abs=1)


def test_operation_without_a_rule_pins_and_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(torch.cummax(self.conv(x), 1).values)

    graph = trace(Odd(), torch.randn(1, 3, 8, 8))
    assert dict(graph.unsupported_ops) == {"aten.cummax": 1}
    assert graph.groups == ()
    assert any("no rule for the operation aten.cummax" in p.reason for p in graph.pinned)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda y: y.softmax(1), "softmax"),
        (lambda y: y - y.mean(1, keepdim=True), "reduced over its channels by aten.mean"),
        (lambda y: y + torch.arange(8.0).view(1, 8, 1, 1), "meets a fixed tensor"),
        (lambda y: torch.cat([y[:, :3], y[:, 3:]], 1), "sliced by constants"),
        (lambda y: torch.cat(y.split([2, 6], 1), 1), "split into constant sizes"),
        (lambda y: y[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], "picked by an index tensor"),
        (lambda y: y.flip(1), "reordered"),
    ],
)
def test_pinned_with_its_reason_module_and_line(cut, words):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(cut(self.conv(x)))

    graph = trace(Cut(), torch.randn(2, 3, 8, 8))
    reason = next(p for p in graph.pinned if p.name == "conv")
    assert words in reason.reason
    assert reason.location.startswith("test_channels.py:")


def test_single_channel_broadcast_over_many_stays():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.head = conv_bn(3, 8), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(self.conv(x) * torch.sigmoid(self.gate(x)))

    graph = trace(Gate(), torch.randn(2, 3, 8, 8))
    assert [g.name for g in graph.groups] == ["conv.0"]
    assert any(p.name == "gate" and "broadcast" in p.reason for p in graph.pinned)


def test_unused_parameters_are_pinned():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    graph = trace(Spare(), torch.randn(2, 4))
    assert any(p.name == "spare" and "not used" in p.reason for p in graph.pinned)


def test_example_input_that_does_not_fit():
    with pytest.raises(TraceError, match=r"shape \[\(1, 4, 8, 8\)\].*channels"):
        trace(trained("plain", dtype=torch.float32), torch.randn(1, 4, 8, 8))


def test_model_with_hooks_is_refused():
    from nncf.torch.function_hook import register_post_function_hook, wrap_model

    model = wrap_model(trained("plain"))
    register_post_function_hook(model, "head.weight", 0, nn.Identity())
    with pytest.raises(TraceError, match="carries NNCF hooks"):
        trace(model, images())


def test_dict_and_tuple_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"out": self.head(self.a(x) + self.b(y))}

    x = torch.randn(1, 3, 4, 4)
    for inputs in ((x, x), {"x": x, "y": x}):
        graph = trace(Two(), inputs)
        assert [(g.name, g.size) for g in graph.groups] == [("a", 8)]


def test_blocks_of_a_reshape():
    assert list(blocks([2, 6, 4], [12, 4])) == [([0, 1], [0]), ([2], [1])]
    assert list(blocks([4, 1, 6], [2, 2, 6, 1])) == [([0], [0, 1]), ([2], [2])]


@pytest.mark.parametrize("shape", [(2, 12, 5), (24, 5), (2, 3, 4, 5), (2, 12, 1, 5)])
def test_reshape_there_and_back_is_the_identity(shape):
    labels = (None, np.arange(12), None)
    pairs: list[tuple] = []
    out = reshape_labels(labels, (2, 12, 5), shape, lambda a, b: pairs.append((a, b)), lambda a, r: pytest.fail(r))
    back = reshape_labels(out, shape, (2, 12, 5), lambda a, b: None, lambda a, r: pytest.fail(r))
    if not pairs:
        np.testing.assert_array_equal(back[1], np.arange(12))
    else:  # the leading factor 3 was taken for a constant: four channels, repeated
        np.testing.assert_array_equal(back[1], np.tile(np.arange(4), 3))


def test_width_of_the_pooled_feature_goes_to_the_head():
    graph = trace(Classifier(conv_bn(3, 8), 8), torch.randn(1, 3, 6, 6))
    assert ("head.weight", 1, "consumer") in members(graph, "features.0")


class TestDecoders:
    """Features that become pictures: the channels among them go where a number says how many there are."""

    def test_unflatten_and_a_view_by_a_number_are_told_anew(self) -> None:
        model = STRUCTURES["decoders"]().eval()
        names = dict(model.named_modules())
        unflatten = next(name for name, module in names.items() if isinstance(module, nn.Unflatten))
        decoder = next(name for name, module in names.items() if type(module).__name__ == "Decoder")
        graph = analyse(model, images(torch.float32))
        sizes = {group.name: group.size for group in graph.groups}
        assert sizes[f"{decoder}.up"] == 14
        assert 10 in sizes.values()
        plan = prune(model, images(torch.float32), budget={"params": 0.5}, allocation="uniform", round_to=1).plan
        channels, *size = names[unflatten].unflattened_size
        assert size == [2, 2]
        assert channels < 10
        assert names[decoder].width < 14
        assert plan.attributes[unflatten] == {"unflattened_size": (channels, 2, 2)}
        again = prune(
            model, images(torch.float32), budget={"params": 0.6}, allocation="uniform", round_to=1
        )  # once more, from there
        assert names[unflatten].unflattened_size[0] < channels
        assert again.self_check.error < 1e-5

    def test_a_view_of_constants_keeps_its_layer(self) -> None:
        class Constants(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.conv = nn.Linear(8, 12 * 4), nn.ConvTranspose2d(12, 3, 2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(self.up(x).view(-1, 12, 2, 2))

        graph = analyse(Constants(), torch.randn(2, 8))
        assert not graph.groups
        assert any("aten.view does not follow a smaller width" in pin.reason for pin in graph.pinned)

    def test_a_plan_that_turns_height_and_width_is_not_believed(self) -> None:
        model = STRUCTURES["decoders"]().eval()
        fresh = copy.deepcopy(model)
        plan = prune(model, images(torch.float32), budget={"params": 0.5}, allocation="uniform", round_to=1).plan
        ((name, values),) = [item for item in plan.attributes.items() if "unflattened_size" in item[1]]
        channels = values["unflattened_size"][0]
        forged = dataclasses.replace(plan, attributes={**plan.attributes, name: {"unflattened_size": (channels, 1, 2)}})
        with pytest.raises(PlanError, match="unflattened_size: expected a count"):
            apply_plan(fresh, forged)
