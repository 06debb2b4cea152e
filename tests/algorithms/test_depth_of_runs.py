"""Runs that take residual branches whole: schedules, states, latency, re-fits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.depth import with_statistics
from support.meters import with_fakes
from torch.utils.data import DataLoader, TensorDataset

from nncf_compactprune import apply_plan, create_compressed_model, prune
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.networks.digits_net import digits_net


def config(**params):
    return {
        "input_info": {"sample_size": [1, 1, 16, 16]},
        "compression": {
            "algorithm": "fbnet_pruning",
            "budget": {"macs": 0.06},
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
            "params": {"pruning_steps": 4, "allocation": "greedy", "min_channels": 0, **params},
        },
    }


@pytest.mark.parametrize("shrink_every", [None, 1])
def test_a_schedule_masks_branches_and_resumes_at_any_epoch(shrink_every):
    settings = config(**({} if shrink_every is None else {"shrink_every": shrink_every}))
    x = torch.randn(4, 1, 16, 16)
    ctrl, model = create_compressed_model(digits_net(), settings)
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), copy.deepcopy(model)
    ctrl.attach(optimizer=optimizer, ema=ema)
    removed = []
    for _ in range(5):
        ctrl.scheduler.epoch_step()
        ctrl.scheduler.step()
        optimizer.zero_grad()
        model.train()(torch.randn(8, 1, 16, 16)).square().mean().backward()
        optimizer.step()
        removed.append(len(ctrl.algorithms[0].plan.removed) if ctrl.algorithms[0].plan else 0)
        state = json.loads(json.dumps(ctrl.get_compression_state()))
        _, resumed = create_compressed_model(digits_net(), settings, compression_state=state)
        resumed.load_state_dict(model.state_dict())
        assert torch.equal(resumed.eval()(x), model.eval()(x))
    assert removed[-1] > 0
    assert any(removed[:-1]), "a branch is masked before it is cut"
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (ema, ctrl.strip())]
    assert shapes[0] == shapes[1]


def test_masks_alone_bring_a_state_dict_back():
    """The weights of a masked model say which branches go, without the plan."""
    settings = config()
    ctrl, model = create_compressed_model(digits_net(), settings)
    ctrl.disable_scheduler()
    ctrl.compression_rate = ctrl.maximal_compression_rate
    plan = ctrl.algorithms[0].plan
    assert plan.removed
    fresh, _ = create_compressed_model(digits_net(), settings)
    fresh.algorithms[0].adopt_masks(model.state_dict())
    assert fresh.algorithms[0].plan.removed == plan.removed
    assert fresh.algorithms[0].plan.kept == plan.kept


def test_a_budget_of_latency_takes_branches(tmp_path, monkeypatch):
    """What widths alone cannot hold, as every layer takes time for being called."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plugins = Plugins()
    plugins.load_entry_points()
    plugins, x = with_fakes(plugins), torch.randn(1, 1, 16, 16)
    budget = {"runtime": "fake", "latency": 0.03}
    settings = {"allocation": "greedy", "round_to": 1, "plugins": plugins}
    with pytest.raises(BudgetError, match="the least is"):
        prune(digits_net(), x, budget=budget, **settings)
    result = prune(digits_net(), x, budget=budget, min_channels=0, **settings)
    assert result.plan.removed
    assert result.latency.holds


def test_a_refit_makes_up_for_a_branch():
    model = with_statistics(digits_net())
    images = torch.randn(64, 1, 16, 16)
    loader = DataLoader(TensorDataset(images, torch.zeros(64, dtype=torch.long)), batch_size=32)
    settings = config(schedule="one_shot", max_ratio=0.5)
    settings["compression"] |= {"budget": {"macs": 0.25}, "initializer": {"refit": {}}}
    with torch.no_grad():
        dense = model(images)
        plain = copy.deepcopy(model)
        ctrl, model = create_compressed_model(model, settings, loader)
        plan = ctrl.algorithms[0].plan
        assert plan.removed
        apply_plan(plain, plan)
        errors = [(one.eval()(images) - dense).square().mean() for one in (model, plain)]
    assert errors[0] < 0.8 * errors[1]
