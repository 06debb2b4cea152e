"""The NNCF-style way in: schedule, shrinking while training, state, one-shot pruning, wrong input."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, model32
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from nncf_compactprune import CompressionStage, create_compressed_model, prune
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.budgets import uniform
from nncf_compactprune.errors import (
    BudgetError,
    CompactPruneError,
    ConfigError,
    NothingPrunableError,
    ScopeError,
)
from nncf_compactprune.plugins import default_plugins

INPUT = {"sample_size": [2, 3, 12, 12]}


def config(*, budget=None, initializer=None, scopes=None, **params):
    entry = {"algorithm": "fbnet_pruning", "budget": budget or {"macs": 0.5}, "params": {"round_to": 1, **params}}
    if initializer is not None:
        entry["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": initializer}}
    return {"input_info": INPUT, "compression": {**entry, **(scopes or {})}}


def train_epoch(model, ctrl, optimizer):
    ctrl.scheduler.epoch_step()
    model.train()
    for x, y in labelled_batches():
        ctrl.scheduler.step()
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + ctrl.loss()).backward()
        optimizer.step()


def test_schedule_ramps_masks_then_shrinks_while_training():
    model = model32()
    dense = trace(copy.deepcopy(model), images(torch.float32))
    ctrl, same = create_compressed_model(model, config(schedule="exponential", pruning_steps=3))
    assert same is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    assert ctrl.compression_stage() is CompressionStage.UNCOMPRESSED
    rates, parameters = [], []
    for _ in range(5):
        train_epoch(model, ctrl, optimizer)
        rates.append(ctrl.compression_rate)
        parameters.append(sum(p.numel() for p in model.parameters()))
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[3] == pytest.approx(0.5, abs=1e-6)
    assert parameters[:3] == [dense.params] * 3
    assert parameters[3] < dense.params
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    compact = ctrl.strip()
    assert trace(compact, images(torch.float32)).macs <= 0.5 * dense.macs
    assert not hasattr(compact, "__nncf_hooks")


def test_without_an_optimizer_masks_stay_until_strip():
    model = model32()
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=1))
    dense = sum(p.numel() for p in model.parameters())
    for _ in range(3):
        ctrl.scheduler.epoch_step()
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    x = images(torch.float32)
    with torch.no_grad():
        masked = model.eval()(x)
        assert sum(p.numel() for n, p in model.named_parameters() if "nncf" not in n) == dense
        compact = ctrl.strip().eval()(x)
    torch.testing.assert_close(masked, compact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("epochs", "told"), [(0, False), (2, True), (9, False)])
def test_a_schedule_that_training_did_not_finish_is_told(epochs, told, caplog):
    ctrl, _ = create_compressed_model(model32(), config(schedule="exponential", pruning_steps=6))
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        ctrl.scheduler.step()
    ctrl.strip()
    assert ("fbnet_pruning: training ended before the schedule did" in caplog.text) == told


def test_training_starts_only_after_num_init_steps():
    ctrl, _ = create_compressed_model(model32(), config(schedule="exponential", num_init_steps=2, pruning_init=0.1))
    rates = []
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        rates.append(round(ctrl.compression_rate, 3))
    assert rates[:3] == [0, 0, 0.1]
    assert rates[3] > 0.1


def test_one_shot_prunes_at_creation_and_adapts_batch_norm():
    reference = model32()
    ctrl, model = create_compressed_model(model32(), config(schedule="one_shot", initializer=0))
    adapted_ctrl, adapted = create_compressed_model(
        model32(), config(schedule="one_shot", initializer=8), train_loader=labelled_batches()
    )
    assert ctrl.compression_stage() is adapted_ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in reference.parameters())
    assert torch.equal(model.head.weight, adapted.head.weight)
    assert not torch.equal(model.features[0][1].running_mean, adapted.features[0][1].running_mean)
    assert all(m.training == r.training for m, r in zip(adapted.modules(), reference.modules(), strict=True))


def test_statistics_say_what_is_left():
    ctrl, _ = create_compressed_model(model32(), config(schedule="one_shot"))
    text = ctrl.statistics().to_str()
    assert "fbnet_pruning" in text
    assert "fully_compressed" in text
    assert "49." in text or "50.0%" in text


def test_two_entries_of_one_algorithm_have_a_row_each():
    first = config(schedule="one_shot", budget={"macs": 0.7})["compression"]
    second = config(schedule="one_shot", budget={"macs": 0.6})["compression"]
    ctrl, _ = create_compressed_model(model32(), {"input_info": INPUT, "compression": [first, second]})
    statistics = ctrl.statistics()
    assert list(statistics.algorithms) == ["fbnet_pruning", "fbnet_pruning (2)"]
    dense, once = (int(f["MACs"].split()[2].replace(",", "")) for f in statistics.algorithms.values())
    assert dense > once
    assert "fbnet_pruning (2)" in statistics.to_str()


@pytest.mark.parametrize("epochs", [1, 3])
def test_state_resumes_masked_and_cut_runs(epochs):
    settings = config(schedule="exponential", pruning_steps=2)
    first = model32()
    ctrl, _ = create_compressed_model(first, settings)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.01)
    ctrl.attach(optimizer=optimizer)
    for _ in range(epochs):
        train_epoch(first, ctrl, optimizer)
    state = json.loads(json.dumps(ctrl.get_compression_state()))

    resumed = model32()
    again, _ = create_compressed_model(resumed, settings, compression_state=state)
    resumed.load_state_dict(first.state_dict())
    x = images(torch.float32)
    assert torch.equal(first.eval()(x), resumed.eval()(x))
    assert again.compression_rate == ctrl.compression_rate
    assert again.scheduler.current_epoch == epochs - 1
    assert again.compression_stage() is ctrl.compression_stage()


def test_state_of_another_configuration_is_refused():
    ctrl, _ = create_compressed_model(model32(), config())
    state = {**ctrl.get_compression_state(), "algorithms": [{"name": "other", "state": {}}]}
    with pytest.raises(CompactPruneError, match=r"made by \['other'\]"):
        create_compressed_model(model32(), config(), compression_state=state)
    with pytest.raises(CompactPruneError, match="get_compression_state"):
        create_compressed_model(model32(), config(), compression_state={"x": 1})


def test_prune_at_once_meets_both_budgets():
    model = model32("depthwise")
    result = prune(
        model,
        images(torch.float32),
        budget={"macs": 0.6, "params": 0.5},
        importance="l1",
        allocation="greedy",
        round_to=1,
    )
    assert result.model is model
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    assert result.plan.after.params <= 0.5 * result.plan.before.params
    assert result.self_check.error <= 1e-5
    assert {"trace", "scores", "allocation", "surgery"} <= result.seconds.keys()


def test_prune_at_once_by_targets_in_place_of_a_budget():
    result = prune(model32("plain"), images(torch.float32), "filter_pruning", pruning_flops_target=0.4)
    assert result.plan.after.macs <= 0.6 * result.plan.before.macs
    assert result.plan.algorithm == "filter_pruning"


def test_an_algorithm_that_needs_a_budget_says_so():
    with pytest.raises(ConfigError, match="prune: budget: missing"):
        prune(model32("plain"), images(torch.float32))


def test_absolute_budget():
    result = prune(model32("plain"), images(torch.float32), budget={"params": "5K"}, round_to=1)
    assert result.plan.after.params <= 5000


@pytest.mark.parametrize(
    ("scope", "stays"),
    [
        ({"ignored_scopes": ["features.1.conv1"]}, {"features.1.conv1"}),
        ({"ignored_scopes": ["features/1/conv1/conv2d/0"]}, {"features.1.conv1"}),
        ({"ignored_scopes": ["{re}features/2/.*"]}, {"features.2.conv1", "features.2.conv2"}),
        ({"ignored_scopes": ["features.1"]}, {"features.0.0", "features.1.conv1"}),
        ({"target_scopes": ["features.1.conv1"]}, {"features.0.0", "features.2.conv1", "features.2.conv2"}),
    ],
)
def test_scopes_in_nncf_grammar(scope, stays):
    result = prune(model32(), images(torch.float32), budget={"macs": 0.8}, round_to=1, allocation="uniform", **scope)
    assert {g.name for g in result.plan.groups if g.after == g.before} == stays


@pytest.mark.parametrize("scope", ["features.9", "features.1.conv", "{re}nothing.*", "{re}("])
def test_scope_that_matches_nothing(scope):
    model = model32()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ScopeError, match=r"matches no operation and no module|no valid regular expression"):
        prune(model, images(torch.float32), budget={"macs": 0.5}, ignored_scopes=[scope])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_prunable_says_why():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1))
    with pytest.raises(NothingPrunableError, match=r"(?s)nothing can be pruned in Sequential.*'0' \(4 channels\): "):
        prune(model, torch.randn(1, 3, 8, 8), budget={"macs": 0.5})


def test_everything_ignored_says_so():
    with pytest.raises(NothingPrunableError, match="All 4 groups are left out by the scopes"):
        prune(model32(), images(torch.float32), budget={"macs": 0.5}, ignored_scopes=["features"])


def test_impossible_budget_leaves_the_model_untouched():
    model = model32()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match=r"cannot be reached.*the least is"):
        create_compressed_model(model, config(budget={"macs": 0.01}))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "__nncf_hooks")


def test_unknown_criterion_names_the_nearest():
    with pytest.raises(ConfigError, match=r"prune: params\.importance: unknown .* Did you mean 'geometric_median'"):
        prune(model32(), images(torch.float32), budget={"macs": 0.5}, importance="geometric_medain")


def by_l1(context):
    return context.rows(context.group.with_role("producer")[0]).abs().sum(1)


def halves(problem, scores):
    return np.array([problem.round_up(g, size // 2) for g, size in enumerate(problem.sizes)], float)


def test_callables_stand_for_names():
    x = images(torch.float32)
    named = prune(model32(), x, budget={"macs": 0.5}, importance="l1", allocation="uniform")
    given = prune(model32(), x, budget={"macs": 0.5}, importance=default_plugins().importance["l1"], allocation=uniform)
    assert given.plan == named.plan
    assert prune(model32(), x, budget={"macs": 0.6}, round_to=1, importance=by_l1, allocation=halves).plan.groups


def test_a_state_names_the_callables_of_its_run():
    settings = config(
        importance=by_l1, allocation=halves, budget={"macs": 0.6},
        schedule=lambda epoch, *, initial, target, steps: min(target, 0.1 * epoch),
    )  # fmt: skip
    ctrl, _ = create_compressed_model(model32(), settings)
    for _ in range(3):
        ctrl.scheduler.epoch_step()
    assert ctrl.compression_rate == pytest.approx(0.2)
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    params = state["algorithms"][0]["state"]["params"]
    assert params["importance"] == f"{__name__}:by_l1"
    assert params["allocation"] == f"{__name__}:halves"
    again, _ = create_compressed_model(model32(), settings, compression_state=state)
    assert again.compression_rate == ctrl.compression_rate
    with pytest.raises(ConfigError, match=r"unknown importance criterion .*by_l1"):
        create_compressed_model(model32(), config(importance=params["importance"]))


def test_a_callable_is_no_value_outside_the_entries():
    with pytest.raises(ConfigError, match="model: expected a JSON value, got function"):
        create_compressed_model(model32(), {**config(), "model": by_l1})


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ConfigError, match=r"prune: round_too: 'fbnet_pruning' has no such key\..*'round_to'"):
        prune(model32(), images(torch.float32), budget={"macs": 0.5}, round_too=8)


def test_bare_sequential_needs_one_shot():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    with pytest.raises(CompactPruneError, match=r"bare nn\.Sequential.*one_shot"):
        create_compressed_model(model, config(schedule="exponential"))
    create_compressed_model(model, config(schedule="one_shot"))


def test_nan_weights_are_told():
    model = model32()
    with torch.no_grad():
        model.features[0][0].weight[0] = float("nan")
    with pytest.raises(CompactPruneError, match="not finite"):
        prune(model, images(torch.float32), budget={"macs": 0.5})


def test_failed_cut_puts_the_masks_back(monkeypatch):
    model = model32()
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=1))
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    x = images(torch.float32)
    masked = model.eval()(x)
    monkeypatch.setattr("nncf_compactprune.cut.self_check.SELF_CHECK_TOLERANCE", -1.0)
    with pytest.raises(CompactPruneError, match="restored"):
        ctrl.strip()
    assert torch.equal(masked, model.eval()(x))
    monkeypatch.undo()
    torch.testing.assert_close(ctrl.strip().eval()(x), masked, rtol=1e-5, atol=1e-6)


def test_events_reach_plugins():
    from nncf_compactprune import hookimpl
    from nncf_compactprune.plugins import Plugins

    class Listener:
        def __init__(self):
            self.kinds = []

        @hookimpl
        def compactprune_event(self, event):
            self.kinds.append(event.kind)

    plugins, listener = Plugins(), Listener()
    plugins.load_entry_points()
    plugins.register(listener, "listener")
    ctrl, _ = create_compressed_model(model32(), config(schedule="one_shot"), plugins=plugins)
    ctrl.strip()
    assert listener.kinds == ["traced", "pruned", "stripped"]


def test_an_algorithm_waits_until_those_before_it_in_the_list_have_cut():
    document = config(schedule="exponential", pruning_steps=2)
    document["compression"] = [
        document["compression"],
        config(budget={"params": 0.8}, schedule="one_shot")["compression"],
    ]
    model = model32()
    ctrl, _ = create_compressed_model(model, document)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    train_epoch(model, ctrl, optimizer)
    assert len(list(ctrl.begun)) == 1
    assert [entry["state"] is None for entry in ctrl.get_compression_state()["algorithms"]] == [False, True]
    for _ in range(2):
        train_epoch(model, ctrl, optimizer)
    first, second = ctrl.begun
    assert second.plan.before.params == first.plan.after.params
    assert second.plan.after.params <= 0.8 * first.plan.after.params

    again = model32()
    resumed, _ = create_compressed_model(again, document, compression_state=ctrl.get_compression_state())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images(torch.float32)), model.eval()(images(torch.float32)))
    assert resumed.compression_stage() is CompressionStage.FULLY_COMPRESSED


@pytest.mark.parametrize("copied", ["dense", "masked"])
def test_a_shadow_copy_wears_the_same_masks_and_is_cut_along(copied):
    model = model32()
    shadow = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2))
    if copied == "masked":
        shadow = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ctrl.attach(optimizer=optimizer, ema=shadow)
    x, sizes = images(torch.float32), []
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        shadow.update_parameters(model)
        shadow.update_parameters(model)
        sizes.append(sum(p.numel() for p in shadow.parameters()))
        torch.testing.assert_close(shadow.module.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert sizes[0] == sizes[1] > sizes[2] == sum(p.numel() for p in model.parameters())
    assert "__nncf_hooks" not in shadow.module._modules


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_after_the_cut_trains_and_computes_the_same():
    model = model32()
    prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1)
    x = images(torch.float32)
    compiled = torch.compile(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.head.weight.detach().clone()
    compiled.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_scheduled_run_under_autocast(memory_format):
    model = model32().to(memory_format=memory_format)
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            train_epoch(model, ctrl, optimizer)
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.grad is not None and p.grad.shape != p.shape for p in model.parameters())
    if memory_format is torch.channels_last:
        wide = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert wide
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def test_epochs_before_the_first_channel_goes_run_without_hooks():
    model = model32()
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", num_init_steps=1, pruning_steps=2))
    for rate in (0, 0):
        ctrl.scheduler.epoch_step()
        assert ctrl.compression_rate == rate
        assert "__nncf_hooks" not in model._modules
        assert "forward" not in model.__dict__
    ctrl.scheduler.epoch_step()
    assert ctrl.compression_rate > 0
    assert "__nncf_hooks" in model._modules


class Checkpointed(nn.Module):
    """A network whose convolutions run again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.reentrant = nn.Conv2d(3, 8, 1), reentrant
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.training else self.body(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_refused_under_masks_and_taken_where_all_is_cut(reentrant):
    """With masks that the second run does not wear gradients were wrong, or torch's error told of saved tensors."""
    for more in ({}, {"shrink_every": 1}):
        model = Checkpointed(reentrant=reentrant)
        ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2, **more))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        ctrl.attach(optimizer=optimizer)
        train_epoch(model, ctrl, optimizer)
        if not more:
            with pytest.raises(CompactPruneError, match=r"without their masks.*Switch it off.*\"shrink_every\": 1"):
                train_epoch(model, ctrl, optimizer)
            model.eval()(images(torch.float32))
        train_epoch(model, ctrl, optimizer)
        train_epoch(model, ctrl, optimizer)
        assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_batches_accumulate_across_the_cut():
    weights = []
    for early in (False, True):
        model, x = model32("plain"), images(torch.float32)
        ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.eval()  # batches leave no statistics
        ctrl.scheduler.epoch_step(2)
        model(x).square().mean().backward()
        if early:
            ctrl.attach(optimizer=optimizer)
            ctrl.strip()
        model(2 * x).square().mean().backward()
        optimizer.step()
        ctrl.strip()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_holds_no_copy_of_the_model_is_told_when_it_is_attached():
    ctrl, model = create_compressed_model(model32(), config(schedule="exponential", pruning_steps=2))
    for ema in (SimpleNamespace(shadow_params=list(model.parameters())), nn.Linear(2, 2), model):
        with pytest.raises(CompactPruneError, match=f"ema: expected a copy of .*, got {type(ema).__name__} without"):
            ctrl.attach(ema=ema)


def test_a_model_in_another_precision_than_it_came_in_is_cut():
    model = model32()
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2))
    ctrl.attach(optimizer=torch.optim.SGD(model.bfloat16().parameters(), lr=0.01))
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        model.train()(images(torch.bfloat16)).square().mean().backward()
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_layers_replaced_since_the_analysis_are_told_before_the_training():
    """The cut failed on them, epochs later, as a plan of another model."""
    model = model32()
    ctrl, _ = create_compressed_model(model, config(schedule="exponential", pruning_steps=2))
    width = model.head.in_features
    model.head = nn.Linear(width, 3)
    with pytest.raises(
        CompactPruneError, match=rf"'head.weight' was \[5, {width}\], and is \[3, {width}\] now. Replace"
    ):
        ctrl.scheduler.epoch_step()
