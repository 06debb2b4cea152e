"""Masked = compact for every structure, and nothing is lost when a cut fails."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cuts import HardCoded, assert_facts_are_true, random_plan, same, snapshot
from support.networks import STRUCTURES, images, trained

from nncf_compactprune import PruningPlan, apply_plan
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.masks import Masks
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import PlanError, SelfCheckError
from nncf_compactprune.host.tensors import model_tensors


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STRUCTURES)
def test_masked_equals_compact_in_float64(name, seed):
    model, x = trained(name), images()
    plan = random_plan(model, x, seed=seed)
    check = prune_in_place(model, plan, x)
    assert check.error <= 1e-13
    graph = trace(model, x)
    assert (graph.macs, graph.params) == (plan.after.macs, plan.after.params)
    assert model_tensors(model).shapes() == plan.shapes(model_tensors(trained(name)).shapes())
    assert_facts_are_true(model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_nncf_masks_equal_compact(name):
    """The masks that train are the function that is cut, through NNCF's hooks and not the self-check's own zeroing."""
    model, x = trained(name), images()
    plan = random_plan(model, x)
    masks = Masks(model, trace(copy.deepcopy(model), x))
    masks.update(plan)
    with torch.no_grad():
        masked = model(x)
        masks.remove()
        dense = model(x)
        apply_plan(model, plan)
        compact = model(x)
    assert not torch.allclose(dense, masked), "the plan removes nothing that matters"
    torch.testing.assert_close(compact, masked, rtol=1e-12, atol=1e-12)
    assert "__nncf_hooks" not in dict(model.named_children())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruned_models_train(name):
    model, x = trained(name), images()
    prune_in_place(model, random_plan(model, x), x)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruning_twice_composes(name):
    model, x = trained(name), images()
    prune_in_place(model, random_plan(model, x, ratio=0.3), x)
    assert prune_in_place(model, random_plan(model, x, seed=5, ratio=0.3), x).error <= 1e-13
    at_once = trained(name)
    apply_plan(at_once, plan_of(model))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in at_once.state_dict().items())


def test_approximate_channels_are_cut_by_consent_and_checked():
    model, x = trained("layer_norm"), images()
    plan = random_plan(model, x, allow_approximate=True)
    assert plan.approximate
    assert prune_in_place(model, plan, x).error <= 1e-13
    assert model.features[1].norm.normalized_shape == (model.features[1].norm.weight.shape[0],)
    assert model.features[2].num_channels < 16


def test_identity_is_kept_and_optimizer_and_ema_follow():
    model, x = trained("residual", dtype=torch.float32), images(torch.float32)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    identity = {n: id(p) for n, p in model.named_parameters()}
    model.eval()
    plan = random_plan(model, x)
    prune_in_place(model, plan, x, optimizer=optimizer, ema=ema)
    assert identity == {n: id(p) for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = moments[name]
        for dim, positions in plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(positions))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    assert {n: p.shape for n, p in ema.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    model.train()
    model(x).square().sum().backward()
    optimizer.step()  # the references hold


def test_an_old_graph_that_is_alive_does_not_hold_the_old_shape():
    """A loss still in scope keeps autograd's accumulators of the parameters alive."""
    model, x = trained("residual", dtype=torch.float32), images(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(x).square().sum()
    loss.backward()
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(loss)


def test_state_of_another_shape_starts_anew():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    model(x).sum().backward()
    optimizer.step()
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    model(x).sum().backward()
    optimizer.step()


def test_channels_last_stays_channels_last():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    model.to(memory_format=torch.channels_last)
    prune_in_place(model, random_plan(model, x), x)
    weight = model.features[2][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_models_are_checked_in_double():
    model, x = trained("plain", dtype=torch.float32).bfloat16(), images(torch.float32).bfloat16()
    check = prune_in_place(model, random_plan(model, x), x)
    assert check.error <= 1e-5
    assert model.head.weight.dtype == torch.bfloat16


def test_failed_cut_leaves_everything_bit_for_bit():
    model, x = HardCoded(), torch.randn(1, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = copy.deepcopy(model)
    model(x).sum().backward()
    optimizer.step()
    before, shadow = snapshot(model), snapshot(ema)
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.train()
    with pytest.raises(SelfCheckError, match=r"HardCoded does not run after the cut.*restored"):
        prune_in_place(model, random_plan(model, x), x, optimizer=optimizer, ema=ema)
    assert same(before, snapshot(model))
    assert same(shadow, snapshot(ema))
    assert all(torch.equal(momentum[n], optimizer.state[p]["momentum_buffer"]) for n, p in model.named_parameters())
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters())
    assert model.training


def test_wrong_cut_is_noticed(monkeypatch):
    """The check can fail: cut the wrong half of one consumer, and it says so."""
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    plan = random_plan(model, x)
    kept = {name: dict(dims) for name, dims in plan.kept.items()}
    positions = kept["features.2.0.weight"][1]
    others = [p for p in range(16) if p not in positions]
    kept["features.2.0.weight"][1] = tuple(sorted((*positions[1:], others[0])))
    wrong = PruningPlan(kept, plan.fingerprint, plan.before, plan.after)
    before = snapshot(model)
    with pytest.raises(SelfCheckError, match="differs from the masked one"):
        prune_in_place(model, wrong, x)
    assert same(before, snapshot(model))


def test_outputs_that_are_not_finite_are_refused():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    plan = random_plan(model, x)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(SelfCheckError, match="not finite"):
        prune_in_place(model, plan, x)


def test_plan_of_another_model_changes_nothing():
    plan = random_plan(trained("plain"), images())
    model = trained("residual")
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"does not exist|another model"):
        apply_plan(model, plan)
    assert same(before, snapshot(model))
