"""NNCF 2.x's three kinds of sparsity: levels, schedules, masks on hooks, and zeros in the weights at the end."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, plain
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.sparsity.config import RBParams, SparsityParams
from nncf_compactprune.algorithms.sparsity.schedules import Adaptive, level
from nncf_compactprune.errors import CompactPruneError, ConfigError, ScopeError

INPUT = {"sample_size": [2, 3, 12, 12]}
X = images(torch.float32)


def compressed(entries, model=None, state=None, **top):
    config = {"input_info": INPUT, "compression": entries, **top}
    return create_compressed_model(model or plain(), config, labelled_batches(), state, example_inputs=X)


def magnitude(init=0.0, **params):
    keys = {k: params.pop(k) for k in ("ignored_scopes", "validate_scopes", "initializer") if k in params}
    return {"algorithm": "magnitude_sparsity", "sparsity_init": init, "params": params, **keys}


def trained(ctrl, model, epochs, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    rates = []
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for inputs, labels in labelled_batches():
            ctrl.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + ctrl.loss()).backward()
            optimizer.step()
        rates.append(ctrl.compression_rate)
    return rates


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def zeros(model):
    return sum(int((w == 0).sum()) for w in weights(model)) / sum(w.numel() for w in weights(model))


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "levels"),
    [
        ({"power": 1.0}, [0.2, 0.4, 0.6, 0.6]),
        ({"power": 2.0, "concave": False}, [0.2, 0.3, 0.6, 0.6]),
        ({"power": 2.0, "concave": True}, [0.2, 0.5, 0.6, 0.6]),
        ({"schedule": "exponential"}, [0.2, 1 - 0.8 * (0.4 / 0.8) ** 0.5, 0.6, 0.6]),
        ({"sparsity_target_epoch": 0}, [0.6, 0.6, 0.6, 0.6]),
        ({"schedule": "multistep", "multistep_steps": [1, 3], "multistep_sparsity_levels": [0.1, 0.2, 0.5]},
         [0.1, 0.2, 0.2, 0.5]),
    ],
)  # fmt: skip
def test_levels(params, levels):
    keys = SparsityParams(**{"sparsity_target": 0.6, "sparsity_target_epoch": 2, **params})
    assert [level(keys, 0.2, epoch) for epoch in range(4)] == pytest.approx(levels)


def test_adaptive_waits_until_a_level_is_nearly_reached():
    adaptive = Adaptive(RBParams(sparsity_target=0.12, patience=2), 0.05)
    assert [adaptive(0.0), adaptive(0.03), adaptive(0.03)] == pytest.approx([0.05, 0.05, 0.1])
    assert [adaptive(0.1), adaptive(0.1)] == pytest.approx([0.1, 0.12])


# -- magnitude --------------------------------------------------------------------------------------------------------


def test_the_level_rises_with_the_epochs_and_ends_as_zeros_in_the_weights():
    levels = [0.1, 0.3, 0.6]
    entry = magnitude(0.1, schedule="multistep", multistep_steps=[1, 2], multistep_sparsity_levels=levels)
    ctrl, model = compressed(entry)
    assert ctrl.compression_rate == pytest.approx(0.1, abs=0.002)
    assert trained(ctrl, model, 4) == pytest.approx([0.1, 0.3, 0.6, 0.6], abs=0.002)
    assert ctrl.compression_stage().name == "FULLY_COMPRESSED"
    with torch.no_grad():
        masked = model.eval()(X)
        ctrl.strip()
        torch.testing.assert_close(model.eval()(X), masked)
    assert zeros(model) == pytest.approx(0.6, abs=0.002)
    assert "0 hooks" not in str(ctrl.statistics().to_str())


@pytest.mark.parametrize("importance", ["abs", "normed_abs"])
def test_the_smallest_of_all_weights_go(importance):
    model = plain()
    with torch.no_grad():
        weights(model)[0].mul_(50)
    scale = [w.detach().norm() if importance == "normed_abs" else torch.tensor(1.0) for w in weights(model)]
    every = torch.cat([(w.detach().abs() / s).flatten() for w, s in zip(weights(model), scale, strict=True)])
    threshold = every.sort().values[int((len(every) - 1) * 0.4)]
    expected = [(w.detach().abs() / s > threshold) for w, s in zip(weights(model), scale, strict=True)]
    ctrl, model = compressed(magnitude(0.4, weight_importance=importance), model)
    ctrl.strip()
    assert all(torch.equal(w != 0, e) for w, e in zip(weights(model), expected, strict=True))


def test_local_takes_the_share_of_each_layer():
    ctrl, model = compressed(magnitude(0.5, sparsity_level_setting_mode="local"))
    ctrl.strip()
    assert [float((w == 0).float().mean()) for w in weights(model)] == pytest.approx([0.5] * 4, abs=0.02)


def test_masks_freeze():
    entry = magnitude(0.2, schedule="polynomial", sparsity_target=0.5, sparsity_target_epoch=1, sparsity_freeze_epoch=1)
    ctrl, model = compressed(entry)
    trained(ctrl, model, 2)
    before = {name: mask.clone() for name, mask in ctrl.algorithms[0]._sparsity.masks().items()}
    trained(ctrl, model, 3, lr=0.5)
    after = ctrl.algorithms[0]._sparsity.masks()
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())


def test_the_level_rises_within_an_epoch_too():
    entry = magnitude(sparsity_target=0.6, sparsity_target_epoch=2, power=1.0, update_per_optimizer_step=True)
    ctrl, _ = compressed(entry)
    rates = []
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        for _ in range(2):
            ctrl.scheduler.step()
            rates.append(ctrl.compression_rate)
    # the first epoch counts the steps
    assert rates == pytest.approx([0, 0, 0.3, 0.45, 0.6, 0.6], abs=0.002)


def test_scopes_of_nncf_2_leave_layers_out():
    ctrl, model = compressed(magnitude(0.5, ignored_scopes=["{re}Classifier/NNCFLinear\\[head\\]"]))
    ctrl.strip()
    assert (model.head.weight != 0).all()
    assert zeros(model) > 0.4
    with pytest.raises(ScopeError, match="matches no operation and no module"):
        compressed(magnitude(0.5, ignored_scopes=["Classifier/Conv2d[none]"]))
    compressed(magnitude(0.5, ignored_scopes=["Classifier/Conv2d[none]"], validate_scopes=False))


def test_a_run_goes_on_from_its_state():
    entry = magnitude(0.1, schedule="exponential", sparsity_target=0.5, sparsity_target_epoch=3)
    ctrl, model = compressed(entry)
    trained(ctrl, model, 2)
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    again, copied = compressed(entry, state=state)
    copied.load_state_dict(model.state_dict())
    assert again.compression_rate == ctrl.compression_rate
    assert trained(again, copied, 2)[-1] == pytest.approx(0.5, abs=0.002)


def test_an_ema_gets_the_same_zeros():
    ctrl, model = compressed(magnitude(0.5))
    ema = copy.deepcopy(model)
    ctrl.attach(ema=ema)
    ctrl.strip()
    assert zeros(ema) == zeros(model) > 0.4
    torch.testing.assert_close(ema.eval()(X), model.eval()(X))


def test_a_bare_sequential_is_refused():
    with pytest.raises(CompactPruneError, match=r"bare nn.Sequential"):
        compressed(magnitude(0.5), nn.Sequential(nn.Conv2d(3, 4, 3)))


# -- regularised ------------------------------------------------------------------------------------------------------


def test_masks_are_learned_to_the_level():
    entry = {
        "algorithm": "rb_sparsity",
        "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 1, "sparsity_freeze_epoch": 12},
    }
    ctrl, model = compressed(entry, compression_lr_multiplier=2000.0)
    assert float(torch.as_tensor(ctrl.loss()).detach()) == pytest.approx(0.0)
    trained(ctrl, model, 12, lr=0.02)
    assert ctrl.algorithms[0].sparsity == pytest.approx(0.6, abs=0.1)
    ctrl.scheduler.epoch_step()  # frozen: no loss, no noise
    assert ctrl.loss() == 0.0
    assert not any("mask" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model.train(False)(X), model(X))
    found = ctrl.algorithms[0].sparsity
    ctrl.strip()
    assert zeros(model) == pytest.approx(found)


def test_masks_join_a_group_that_schedulers_of_the_learning_rate_know():
    torch.manual_seed(0)
    ctrl, model = compressed({"algorithm": "rb_sparsity", "sparsity_init": 0.5})
    masks = {p for name, p in model.named_parameters() if name.endswith("mask")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p not in masks], 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 4)
    ctrl.attach(optimizer=optimizer)
    assert masks <= set(optimizer.param_groups[0]["params"])
    for _ in range(2):
        ctrl.loss().backward()
        optimizer.step()
        schedule.step()


def test_gradients_of_masks_are_multiplied():
    def gradient(**top):
        torch.manual_seed(0)
        ctrl, model = compressed({"algorithm": "rb_sparsity", "sparsity_init": 0.5}, **top)
        ctrl.loss().backward()
        return next(p.grad for name, p in model.named_parameters() if name.endswith("mask"))

    torch.testing.assert_close(gradient(compression_lr_multiplier=3.0), 3 * gradient())


# -- constant ---------------------------------------------------------------------------------------------------------


def test_zeros_stay_zero():
    model = plain()
    with torch.no_grad():
        for weight in weights(model):
            weight.mul_(torch.rand_like(weight) > 0.3)
    before = [weight == 0 for weight in weights(model)]
    ctrl, model = compressed({"algorithm": "const_sparsity"}, model)
    trained(ctrl, model, 2, lr=0.1)
    ctrl.strip()
    assert all(bool((weight[zero] == 0).all()) for weight, zero in zip(weights(model), before, strict=True))
    assert zeros(model) > 0.25


# -- lists and grammar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_lists_in_any_order(order):
    entries = [
        {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "pruning_steps": 2}},
        magnitude(0.3, sparsity_target=0.5, sparsity_target_epoch=2),
        {"algorithm": "knowledge_distillation", "type": "softmax"},
    ]
    ctrl, model = compressed([entries[at] for at in order])
    taught = float(torch.as_tensor(ctrl.loss()).detach())
    trained(ctrl, model, 1)
    assert float(torch.as_tensor(ctrl.loss()).detach()) > taught == 0  # distilled from the first epoch on
    trained(ctrl, model, 3)
    ctrl.strip()
    assert len(model.features[2][0].weight) == 16  # of 24
    assert zeros(model) == pytest.approx(0.5, abs=0.02)
    assert [algorithm.name for algorithm in ctrl.algorithms] == [
        "knowledge_distillation",
        "filter_pruning",
        "magnitude_sparsity",
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (magnitude(schedule="adaptive"), 'it belongs to "rb_sparsity"'),
        (magnitude(schedule="multistep", multistep_steps=[1]), None),
        (magnitude(schedule="multistep", multistep_steps=[1, 2]), "must be one more than"),
        (magnitude(1.0), "sparsity_init: expected a number in [0, 1)"),
        (magnitude(sparsity_tarqet=0.5), "Did you mean 'sparsity_target'?"),
        ({"algorithm": "rb_sparsity", "params": {"sparsity_level_setting_mode": "local"}}, "learns masks for a level"),
    ],
)
def test_mistakes(entry, message):
    if message is None:
        compressed(entry)
        return
    with pytest.raises(ConfigError) as caught:
        compressed(entry)
    assert message in str(caught.value)


def test_keys_of_another_schedule_are_told(caplog):
    compressed(magnitude(schedule="exponential", multistep_steps=[1], patience=2))
    assert 'the schedule "exponential" does not read multistep_steps, patience' in caplog.text
