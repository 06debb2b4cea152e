"""``filter_pruning``: which layers lose filters, how many and which, and that the network shrinks."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.data_free import randn, with_statistics_of
from support.networks import Classifier, ResidualBlock, conv_bn, images, labelled_batches
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.filter_pruning.importance import widths_of_lowest
from nncf_compactprune.config import load_algorithm
from nncf_compactprune.errors import BudgetError, ConfigError, NothingPrunableError

INPUT = {"sample_size": [2, 3, 12, 12]}


class Net(nn.Module):
    """A stem, two plain layers, a strided one, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.middle = nn.Sequential(conv_bn(16, 40), conv_bn(40, 24))
        self.down = conv_bn(24, 32, stride=2)
        self.last = conv_bn(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.last(self.down(self.middle(self.stem(x)))).mean((2, 3)))


def entry(*, ignored_scopes=(), pruning_init=None, **params):
    extra = {} if pruning_init is None else {"pruning_init": pruning_init}
    scopes = {"ignored_scopes": list(ignored_scopes)} if ignored_scopes else {}
    return {"algorithm": "filter_pruning", "params": {"schedule": "baseline", **params}, **extra, **scopes}


def compressed(model=None, *, train_loader=None, **keys):
    config = {"input_info": INPUT, "compression": entry(**keys)}
    return create_compressed_model(model or Net(), config, train_loader, example_inputs=images(torch.float32))


def widths(model):
    return {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def plan_of(ctrl):
    return ctrl.algorithms[0].final_plan


# -- how many ---------------------------------------------------------------------------------------------------------


def test_each_layer_loses_the_same_share_and_keeps_a_multiple_of_eight():
    _, model = compressed(pruning_target=0.4)
    # ceil(0.6 * 40 / 8) * 8 = 24, of 24: 16, of 16: 16
    assert widths(model) == {
        "stem.0": 16,
        "middle.0.0": 24,
        "middle.1.0": 16,
        "down.0": 32,
        "last.0": 16,
        "head": 5,
    }


def test_half_is_the_default_target():
    _, model = compressed()
    assert widths(model)["middle.0.0"] == math.ceil(0.5 * 40 / 8) * 8
    assert widths(model)["last.0"] == 8


@pytest.mark.parametrize("target", [0.1, 0.25])
@pytest.mark.parametrize("all_weights", [False, True])
def test_a_flops_target_is_met_by_the_fewest_filters(target, all_weights):
    ctrl, _ = compressed(pruning_flops_target=target, all_weights=all_weights)
    plan = plan_of(ctrl)
    assert plan.after.macs <= (1 - target) * plan.before.macs
    assert plan.after.macs > (1 - target - 0.15) * plan.before.macs


def test_all_layers_together_lose_the_share_of_filters_exactly():
    _, model = compressed(pruning_target=0.3, all_weights=True)
    free = {"middle.0.0": 40, "middle.1.0": 24, "last.0": 16}
    left = sum(width for name, width in widths(model).items() if name in free)
    assert left == 80 - int(0.3 * 80)


def test_all_layers_together_lose_the_least_of_their_normalised_norms():
    model = Net()
    layers = [model.middle[0][0], model.middle[1][0], model.last[0]]
    norms = [layer.weight.flatten(1).norm(dim=1) / layer.weight.norm() for layer in layers]
    threshold = torch.cat(norms).sort().values[int(0.3 * 80)]
    expected = [int((norm >= threshold).sum()) for norm in norms]
    _, model = compressed(model, pruning_target=0.3, all_weights=True)
    assert [len(layer.weight) for layer in (model.middle[0][0], model.middle[1][0], model.last[0])] == expected


def test_a_layer_keeps_a_tenth_of_its_filters():
    model = Net()
    with torch.no_grad():
        model.middle[0][0].weight[1:] *= 1e-3  # all but one filter are worth nothing
    _, model = compressed(model, pruning_target=0.6, all_weights=True)
    assert widths(model)["middle.0.0"] == 4


def test_widths_of_lowest_equals_taking_one_by_one():
    rng = np.random.default_rng(0)
    scores = [rng.random(size) for size in (7, 3, 12)]
    most = [6, 0, 9]
    for removed in range(20):
        left = [7, 3, 12]
        for _, group in sorted((score, at) for at, every in enumerate(scores) for score in every):
            if sum((7, 3, 12)) - sum(left) < removed and (7, 3, 12)[group] - left[group] < most[group]:
                left[group] -= 1
        assert widths_of_lowest(scores, removed, most).tolist() == left


# -- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "measure"),
    [
        ("L1", lambda rows: rows.abs().sum(1)),
        ("L2", lambda rows: rows.norm(dim=1)),
        ("geometric_median", lambda rows: torch.cdist(rows, rows).sum(1)),
    ],
)
def test_the_least_important_filters_go(importance, measure):
    model = Net()
    dense = model.middle[0][0].weight.detach().clone()
    kept = measure(dense.flatten(1)).topk(24).indices.sort().values
    _, model = compressed(model, pruning_target=0.4, filter_importance=importance)
    assert torch.equal(model.middle[0][0].weight, dense[kept])


def test_a_residual_stage_sums_the_importances_of_its_layers():
    torch.manual_seed(3)
    model = Classifier(nn.Sequential(conv_bn(3, 16), ResidualBlock(16, 24), ResidualBlock(24, 24)), 24)
    blocks = [model.features[1], model.features[2]]
    stage = [blocks[0].conv2, blocks[0].shortcut, blocks[1].conv2]
    kept = sum(layer.weight.flatten(1).norm(dim=1) for layer in stage).topk(16).indices.sort().values
    dense = blocks[1].conv2.weight.detach().clone()
    _, model = compressed(model, pruning_target=0.4)
    assert widths(model)["features.2.conv2"] == 16
    inner = blocks[1].conv2.weight.shape[1]  # its inputs lose channels too
    assert model.features[2].conv2.weight.shape == (16, inner, 3, 3)
    assert {tuple(row.flatten()[:9].tolist()) for row in model.features[2].conv2.weight} <= {
        tuple(row[at].flatten().tolist()) for row in dense[kept] for at in range(24)
    }


# -- where ------------------------------------------------------------------------------------------------------------


def test_first_and_downsampling_convolutions_stay_unless_asked_for():
    dense = widths(Net())
    assert widths(compressed()[1])["stem.0"] == dense["stem.0"]
    assert widths(compressed(prune_first_conv=True)[1])["stem.0"] == 8
    assert widths(compressed()[1])["down.0"] == dense["down.0"]
    assert widths(compressed(prune_downsample_convs=True)[1])["down.0"] == 16


def test_a_group_stays_with_its_downsampling_convolution():
    model = Classifier(nn.Sequential(conv_bn(3, 16), ResidualBlock(16, 32, 2), ResidualBlock(32, 32)), 32)
    _, pruned = compressed(copy.deepcopy(model))
    assert widths(pruned)["features.2.conv2"] == 32  # its stage begins with a strided shortcut
    assert widths(pruned)["features.2.conv1"] == 16
    _, pruned = compressed(model, prune_downsample_convs=True)
    assert widths(pruned)["features.2.conv2"] == 16


def test_the_last_convolution_goes_as_in_nncf_2_and_stays_as_in_nncf_1():
    assert widths(compressed()[1])["last.0"] == 8
    assert widths(compressed(prune_last_conv=False)[1])["last.0"] == 16


def test_a_bare_sequential_is_pruned_before_training():
    model = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    _, model = compressed(model)
    assert len(model[1][0].weight) == 16
    assert len(model[0][0].weight) == 16


def test_if_all_layers_are_left_out_the_error_says_by_what():
    model = Classifier(conv_bn(3, 16), 16)
    with pytest.raises(NothingPrunableError, match="left out by the scopes, prune_first_conv"):
        compressed(model)


def test_a_target_that_no_width_meets_is_told(caplog):
    compressed(pruning_target=0.1)
    assert "no layer loses a filter, as widths stay multiples of 8" in caplog.text


def test_an_impossible_flops_target_is_told_with_what_is_possible():
    with pytest.raises(BudgetError, match=r"pruning_flops_target 0.95 cannot be reached.*the least is"):
        compressed(pruning_flops_target=0.95)


def test_without_input_info_the_loader_gives_the_example(tmp_path):
    path = tmp_path / "entries_alone.json"
    path.write_text('[{"algorithm": "filter_pruning", "params": {"schedule": "baseline"}}]')
    ctrl, model = create_compressed_model(Net(), path, labelled_batches())
    assert widths(model)["last.0"] == 8
    assert ctrl.algorithms[0].context.example_inputs.shape == (2, 3, 12, 12)
    with pytest.raises(ConfigError, match="input_info: missing"):
        create_compressed_model(Net(), path)


# -- when -------------------------------------------------------------------------------------------------------------


def trained(ctrl, model, epochs, *, attach=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if attach:
        ctrl.attach(optimizer=optimizer)
    shapes = []
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for inputs, labels in labelled_batches():
            ctrl.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + ctrl.loss()).backward()
            optimizer.step()
        shapes.append(widths(model)["middle.0.0"])
    return shapes


def test_masks_while_the_schedule_rises_then_the_cut():
    ctrl, model = compressed(schedule="exponential", pruning_target=0.5, pruning_steps=3, num_init_steps=1)
    assert ctrl.compression_rate == 0
    assert trained(ctrl, model, 5) == [40, 40, 40, 24, 24]
    assert ctrl.compression_rate == pytest.approx(0.5)
    assert ctrl.compression_stage().name == "FULLY_COMPRESSED"


def test_the_level_of_the_start_is_there_from_the_start():
    ctrl, model = compressed(schedule="exponential", pruning_init=0.3, pruning_target=0.5, pruning_steps=3)
    assert ctrl.compression_rate == pytest.approx(0.3)
    assert ctrl.compression_stage().name == "PARTIALLY_COMPRESSED"
    masked = model.eval()(images(torch.float32))
    ctrl.strip()
    assert not torch.equal(model.eval()(images(torch.float32)), masked)  # the target is more than the start


def test_masked_and_cut_compute_the_same():
    ctrl, model = compressed(schedule="exponential", pruning_target=0.5, pruning_steps=2)
    trained(ctrl, model, 3, attach=False)
    with torch.no_grad():
        masked = model.eval()(images(torch.float32))
        ctrl.strip()
        torch.testing.assert_close(model.eval()(images(torch.float32)), masked, atol=1e-5, rtol=1e-5)
    assert widths(model)["middle.0.0"] == 24


def test_a_run_goes_on_from_its_state():
    keys = {"schedule": "exponential", "pruning_target": 0.5, "pruning_steps": 4, "pruning_init": 0.1}
    ctrl, model = compressed(**keys)
    trained(ctrl, model, 2)
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    config = {"input_info": INPUT, "compression": entry(**keys)}
    again, copy_of = create_compressed_model(Net(), config, None, state, example_inputs=images(torch.float32))
    assert again.compression_rate == pytest.approx(ctrl.compression_rate)
    assert trained(again, copy_of, 2)[-1] == 24


def test_statistics_count_filters_of_the_layers_that_may_lose_some():
    ctrl, _ = compressed(pruning_target=0.4)
    figures = ctrl.statistics().algorithms["filter_pruning"]
    assert figures["filters"] == "56 of 80 in layers that may lose some"
    assert figures["pruning level"] == "0.400 of 0.400"


# -- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pruning_target": 7}, "params.pruning_target: expected a number in [0, 1) or null, got 7"),
        ({"pruning_target": 0.4, "pruning_flops_target": 0.3}, "expected one of them"),
        ({"interlayer_ranking_type": "learned_ranking", "all_weights": False}, "ranks all layers together"),
        ({"schedule": "exponentiall"}, "Did you mean 'exponential'?"),
        ({"filter_importence": "L2"}, "unknown key. Did you mean 'filter_importance'?"),
        ({"legr_params": {"generation": 3}}, "legr_params.generation: unknown key. Did you mean 'generations'?"),
        ({"legr_params": {"max_pruning": 2}}, "legr_params.max_pruning"),
        ({"pruning_steps": 1.5}, "pruning_steps"),
        ({"filter_importance": "L3"}, "filter_importance"),
    ],
)
def test_mistakes(params, message):
    with pytest.raises(ConfigError) as caught:
        compressed(**params)
    assert message in str(caught.value)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as caught:
        compressed(pruning_target=7, schedule="none", legr_params={"sigma": 1}, prune_first_convs=True)
    assert len(caught.value.problems) == 4


def test_layers_are_refitted_where_the_entry_asks_for_it():
    data, found = randn(64, 3, 12, 12), {}
    network = with_statistics_of(Net(), data)
    for initializer in ({}, {"initializer": {"refit": {}}}):
        config = {"input_info": INPUT, "compression": {**entry(pruning_target=0.5), **initializer}}
        ctrl, model = create_compressed_model(copy.deepcopy(network), config, [(data, None)])
        assert ("layers re-fitted" in ctrl.statistics().to_str()) == bool(initializer)
        with torch.no_grad():
            found[bool(initializer)] = float((model.eval()(data) - network(data)).square().mean())
    assert found[True] < 0.7 * found[False]
    with pytest.raises(ConfigError, match=r'initializer.refit .*: set "schedule": "baseline" and "num_init_steps": 0'):
        load_algorithm({"algorithm": "filter_pruning", "initializer": {"refit": {}}})


def test_a_start_without_a_curve_is_a_mistake():
    with pytest.raises(ConfigError, match="less than three quarters of the target"):
        compressed(schedule="exponential_with_bias", pruning_init=0.45, pruning_target=0.5)


def test_numbers_may_be_written_with_a_point():
    ctrl, _ = compressed(schedule="exponential", pruning_steps=15.0)
    assert ctrl.algorithms[0].config.params.pruning_steps == 15
