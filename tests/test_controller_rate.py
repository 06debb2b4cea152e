"""The compression rate as a search moves it: up, down, beyond the budget, back to an earlier state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, model32
from torch import nn

from nncf_compactprune import CompressionStage, create_compressed_model
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import BudgetError, CompactPruneError


def config(budget=None, **params):
    entry = {"algorithm": "fbnet_pruning", "budget": budget or {"macs": 0.5}, "params": {"round_to": 1, **params}}
    return {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}


def macs(ctrl):
    return ctrl.algorithms[0].plan.after.macs


def output(model):
    with torch.no_grad():
        return model.eval()(images(torch.float32))


def train_step(ctrl, model):
    ctrl.scheduler.step()
    inputs, labels = labelled_batches()[0]
    F.cross_entropy(model.train()(inputs), labels).backward()
    torch.optim.SGD(model.parameters(), 0.01).step()


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"macs": 0.7, "params": 0.6}, {"macs": 1.0}])
def test_a_rate_beyond_the_budget_can_be_set_up_to_the_maximum(budget):
    ctrl, model = create_compressed_model(model32(), config(budget))
    dense = trace(copy.deepcopy(model), images(torch.float32)).macs
    ctrl.disable_scheduler()
    most = ctrl.maximal_compression_rate
    assert 0.5 < most < 1
    left = []
    for rate in (0.2, 0.6 * most + 0.2, most):
        ctrl.compression_rate = rate
        left.append(macs(ctrl))
        assert ctrl.compression_rate == rate
        assert left[-1] <= dense or "params" in budget
    assert left == sorted(left, reverse=True)
    with pytest.raises(BudgetError, match="cannot be reached"):
        ctrl.compression_rate = most + 0.01
    assert ctrl.compression_rate == most


def test_without_its_schedule_the_rate_that_was_set_is_the_target():
    ctrl, model = create_compressed_model(model32(), config(pruning_steps=2))
    ctrl.scheduler.epoch_step()
    ctrl.disable_scheduler()
    ctrl.compression_rate = 0.3
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    for _ in range(4):
        ctrl.scheduler.epoch_step()
    assert ctrl.compression_rate == 0.3
    masked, left = output(model), macs(ctrl)
    assert trace(ctrl.strip(), images(torch.float32)).macs == left
    torch.testing.assert_close(masked, output(model), rtol=1e-5, atol=1e-6)


def test_a_controller_goes_back_to_an_earlier_state_with_its_weights():
    ctrl, model = create_compressed_model(model32(), config())
    ctrl.disable_scheduler()
    ctrl.compression_rate = 0.4
    train_step(ctrl, model)
    state, weights, before = ctrl.get_compression_state(), copy.deepcopy(model.state_dict()), output(model)
    ctrl.compression_rate = 0.6
    train_step(ctrl, model)
    assert not torch.equal(before, output(model))
    ctrl.load_state(state)
    model.load_state_dict(weights)
    assert ctrl.compression_rate == 0.4
    assert torch.equal(before, output(model))
    ctrl.strip()
    with pytest.raises(CompactPruneError, match="is cut, and cannot go back"):
        ctrl.load_state(state)


def test_what_was_trained_under_its_masks_is_cut_without_a_change():
    entry = config(pruning_steps=1)
    statistics = []
    for trained in (True, False):
        ctrl, model = create_compressed_model(model32(), entry, labelled_batches())
        ctrl.scheduler.epoch_step(1)
        if trained:
            train_step(ctrl, model)
        masked = output(model)
        ctrl.strip()
        statistics.append(torch.allclose(masked, output(model), rtol=1e-4, atol=1e-5))
    assert statistics == [True, False]  # freshly masked channels call for BatchNorm adaptation


def test_masks_are_held_where_a_search_needs_them():
    _, model = create_compressed_model(model32(), config(schedule="one_shot"))
    parameters = sum(p.numel() for p in model.parameters())
    held, search = create_compressed_model(
        model32(), {**config(schedule="one_shot"), "accuracy_aware_training": ADAPTIVE}
    )
    held.attach(optimizer=torch.optim.SGD(search.parameters(), 0.01))
    held.scheduler.epoch_step()
    assert held.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert sum(p.numel() for p in search.parameters()) > parameters
    assert isinstance(held.strip(), nn.Module)
    assert sum(p.numel() for p in search.parameters()) == parameters


ADAPTIVE = {
    "mode": "adaptive_compression_level",
    "params": {
        "maximal_relative_accuracy_degradation": 1.0,
        "initial_training_phase_epochs": 1,
        "patience_epochs": 1,
    },
}
