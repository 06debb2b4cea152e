"""A model that is cut several times while it trains: the same run as with masks to the end, resumed at any epoch."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nncf.common.logging import nncf_logger
from support.networks import STRUCTURES, images, labelled_batches, model32, trained
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nncf_compactprune import create_compressed_model, load_pruned, plan_of, save_pruned
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.surgery import apply_plan
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.errors import CompactPruneError, ConfigError
from nncf_compactprune.plan import graph_after, kept_channels, make_plan


def settings(algorithm="fbnet_pruning", **params):
    entry = {
        "algorithm": algorithm,
        "budget": {"macs": 0.35},
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
        "params": {"round_to": 1, "schedule": "exponential", "pruning_steps": 4, **params},
    }
    return {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}


def batches():
    return [(x.double(), y) for x, y in labelled_batches()]


def train_epoch(model, ctrl, optimizer, ema=None):
    ctrl.scheduler.epoch_step()
    model.train()
    for x, y in batches():
        ctrl.scheduler.step()
        optimizer.zero_grad()
        (F.cross_entropy(class_scores(model(x)), y) + ctrl.loss()).backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)


def start(config, name="residual", state=None, **optimizer):
    model = trained(name)
    ctrl, _ = create_compressed_model(
        model, config, train_loader=batches(), compression_state=state, example_inputs=images(torch.float64)
    )
    steps = torch.optim.SGD(model.parameters(), **{"lr": 0.05, **optimizer})
    ctrl.attach(optimizer=steps)
    return model, ctrl, steps


def random_keep(graph, seed, share):
    generator = np.random.default_rng(seed)
    keep = []
    for group in graph.groups:
        mask = np.zeros(group.size, bool)
        mask[generator.permutation(group.size)[: max(round(share * group.size), 1)]] = True
        keep.append(mask)
    return keep


def never_grows(graph, plans):
    """Whether every plan keeps only what the one before it kept."""
    kept = [kept_channels(graph, plan) for plan in plans if plan is not None]
    pairs = [pair for a, b in itertools.pairwise(kept) for pair in zip(a, b, strict=True)]
    return all((after <= before).all() for before, after in pairs)


@pytest.mark.parametrize("name", STRUCTURES)
def test_two_cuts_are_one(name):
    """The channels after a cut are derived, not traced: a plan made of them cuts as one made before both cuts."""
    x = images(torch.float64)
    dense = trace(trained(name), x, allow_approximate=True)
    first = make_plan(dense, random_keep(dense, 0, 0.7))
    between = graph_after(dense, first)
    second = make_plan(between, random_keep(between, 1, 0.6))

    twice = trained(name)
    apply_plan(twice, first)
    found = trace(twice, x, allow_approximate=True)
    assert (between.macs, between.params, between.parameters) == (found.macs, found.params, found.parameters)
    apply_plan(twice, second)

    keep = kept_channels(dense, first)
    for whole, now in zip(keep, kept_channels(between, second), strict=True):
        whole[whole] = now
    at_once = make_plan(dense, keep)
    once = trained(name)
    apply_plan(once, at_once)
    composed = plan_of(twice)
    assert composed.kept == at_once.kept
    assert composed.attributes == at_once.attributes
    assert (composed.before, composed.after) == (at_once.before, at_once.after)
    assert torch.equal(once.eval()(x), twice.eval()(x))


@pytest.mark.parametrize(
    ("allocation", "every"),
    [*((name, 1) for name in ("uniform", "global", "greedy", "balanced", "least_loss")), ("greedy", 2)],
)
def test_the_end_is_that_of_masks_throughout(allocation, every):
    """Without momentum and decay nothing moves under a mask, so both runs see the same scores, and with small steps no
    mask comes back. In double precision. (A norm of filters also counts weights behind masked inputs.)"""
    ramp = {"allocation": allocation, "pruning_steps": 3, "importance": "batch_norm_scale"}
    masks, shrinks = settings(**ramp), settings(**ramp, shrink_every=every)
    one, by_masks, its_own = start(masks, lr=1e-4)
    other, by_cuts, its_steps = start(shrinks, lr=1e-4)
    sizes, masked = [], []
    for _ in range(5):
        train_epoch(one, by_masks, its_own)
        train_epoch(other, by_cuts, its_steps)
        sizes.append(sum(p.numel() for name, p in other.named_parameters() if "nncf" not in name))
        masked.append(by_masks.algorithms[0].plan)
        assert by_cuts.compression_rate == by_masks.compression_rate
    assert never_grows(by_masks.algorithms[0].graph, masked)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == {1: 4, 2: 3}[every]  # nothing goes in epoch 0
    one, other = by_masks.strip(), by_cuts.strip()
    assert by_cuts.algorithms[0].final_plan == by_masks.algorithms[0].final_plan == plan_of(one)
    assert plan_of(other).kept == plan_of(one).kept
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)


def test_what_is_cut_stays_away_and_the_budget_is_used():
    """With momentum and decay, scores move: a masked channel may come back, a cut one may not."""
    model, ctrl, steps = start(settings(allocation="global", shrink_every=1), lr=0.3, momentum=0.9, weight_decay=0.05)
    plans = []
    for _ in range(6):
        train_epoch(model, ctrl, steps)
        plans.append(plan_of(model))
    pruning = ctrl.algorithms[0]
    assert never_grows(pruning.graph, plans)
    assert 0.3 < plan_of(model).after.macs / plan_of(model).before.macs <= 0.35
    assert all(steps.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())


@pytest.mark.parametrize(
    ("algorithm", "epochs"), [("catro", 3), *(("fbnet_pruning", epochs) for epochs in (1, 2, 3, 4, 5))]
)
def test_a_run_goes_on_from_any_epoch(algorithm, epochs):
    extra = {"allocation": "greedy"} if algorithm == "catro" else {"allocation": "global"}
    config = settings(algorithm, shrink_every=2, **extra)
    whole, ctrl, steps = start(config, momentum=0.9, weight_decay=1e-3)
    for epoch in range(6):
        if epoch == epochs:
            state = json.loads(json.dumps(ctrl.get_compression_state()))
            weights, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(steps.state_dict())
        train_epoch(whole, ctrl, steps)
    resumed, again, its_steps = start(config, state=state, momentum=0.9, weight_decay=1e-3)
    resumed.load_state_dict(weights)
    its_steps.load_state_dict(moments)
    for _ in range(epochs, 6):
        train_epoch(resumed, again, its_steps)
    assert again.algorithms[0].final_plan == ctrl.algorithms[0].final_plan
    assert all(torch.equal(p, resumed.state_dict()[name]) for name, p in whole.state_dict().items())


def test_the_end_is_saved_in_the_dense_models_channels(tmp_path):
    model, ctrl, steps = start(settings(shrink_every=1), momentum=0.9)
    for _ in range(5):
        train_epoch(model, ctrl, steps)
    save_pruned(ctrl.strip(), tmp_path)
    again = load_pruned(trained("residual"), tmp_path, example_inputs=images(torch.float64))
    assert torch.equal(again(images(torch.float64)), model.eval()(images(torch.float64)))
    assert plan_of(again).before.macs == trace(trained("residual"), images(torch.float64)).macs


def test_a_last_cut_of_nothing_leaves_the_check_of_the_one_before():
    def nearly_there_at_once(epoch, *, initial, target, steps):
        return target if epoch else target * (1 - 1e-9)

    model, ctrl, steps = start(settings(schedule=nearly_there_at_once, shrink_every=1))
    train_epoch(model, ctrl, steps)
    (pruning,) = ctrl.algorithms
    check = pruning.self_check
    assert check.compared
    train_epoch(model, ctrl, steps)
    assert pruning.settled
    assert pruning.self_check is check


def test_a_shadow_copy_shrinks_along():
    model, ctrl, steps = start(settings(shrink_every=2), momentum=0.9)
    shadow = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    ctrl.attach(ema=shadow)
    for _ in range(5):
        train_epoch(model, ctrl, steps, shadow)
        assert [p.shape for p in shadow.module.parameters()] == [p.shape for p in model.parameters()]
    shadow.module.eval()(images(torch.float64))
    assert "__nncf_hooks" not in shadow.module._modules


def test_without_an_optimizer_nothing_is_cut_on_the_way():
    model = model32()
    ctrl, _ = create_compressed_model(model, settings(shrink_every=1))
    dense = sum(p.numel() for p in model.parameters())
    for _ in range(5):
        ctrl.scheduler.epoch_step()
    assert sum(p.numel() for name, p in model.named_parameters() if "nncf" not in name) == dense
    assert sum(p.numel() for p in ctrl.strip().parameters()) < dense


def test_a_failed_cut_on_the_way_leaves_the_masks(monkeypatch):
    model, ctrl, steps = start(settings(shrink_every=2))
    for _ in range(3):
        train_epoch(model, ctrl, steps)
    x = images(torch.float64)
    monkeypatch.setattr("nncf_compactprune.cut.self_check.SELF_CHECK_TOLERANCE", -1.0)
    before = model.eval()(x)
    with pytest.raises(CompactPruneError, match="restored"):
        ctrl.strip()
    assert torch.equal(before, model.eval()(x))


def test_a_model_that_has_shrunk_does_not_go_back():
    model, ctrl, steps = start(settings(shrink_every=1))
    train_epoch(model, ctrl, steps)
    train_epoch(model, ctrl, steps)
    earlier = ctrl.get_compression_state()
    train_epoch(model, ctrl, steps)
    with pytest.raises(CompactPruneError, match=r"keeps channels that were cut already.*shrink_every"):
        ctrl.load_state(earlier)


def test_one_shot_has_nothing_to_shrink_on_the_way():
    with pytest.raises(ConfigError, match=r"shrink_every: cuts on the way of a schedule"):
        create_compressed_model(model32(), settings(schedule="one_shot", shrink_every=1))


@pytest.mark.parametrize("called", ["whole", "parts", "compiled"])
def test_masks_that_nothing_passes_are_told(called, monkeypatch):
    said = []
    monkeypatch.setattr(nncf_logger, "warning", said.append)
    model = model32("residual")
    ctrl, _ = create_compressed_model(model, settings(pruning_init=0.3), example_inputs=images(torch.float32))
    run = {
        "whole": model,
        "parts": lambda x: type(model).forward(model, x),
        "compiled": torch.compile(copy.deepcopy(model), backend="eager"),
    }[called]
    for _ in range(2):
        ctrl.scheduler.epoch_step()
        ctrl.scheduler.step()
        run(images(torch.float32))
    assert len([words for words in said if "not under its masks" in words]) == (0 if called == "whole" else 1)
    said.clear()
    ctrl.strip()
    assert any("not under its masks" in words for words in said) == (called != "whole")


def test_a_run_that_goes_on_has_masks_that_nothing_passed_yet(monkeypatch):
    """The next epoch begins before the network is called; it was told that it trained without masks."""
    said = []
    monkeypatch.setattr(nncf_logger, "warning", said.append)
    model, ctrl, steps = start(settings(pruning_init=0.3))
    train_epoch(model, ctrl, steps)
    again, _ = create_compressed_model(
        model32("residual"),
        settings(pruning_init=0.3),
        compression_state=ctrl.get_compression_state(),
        example_inputs=images(torch.float32),
    )
    again.scheduler.epoch_step()
    assert not [words for words in said if "not under its masks" in words]
