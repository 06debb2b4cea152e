"""``initializer.search``: what it chooses, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from support.networks import labelled_batches, model32, trained
from torch import nn

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.algorithms.channel_pruning import algorithm as channel_pruning
from nncf_compactprune.decide.criteria.magnitude import batch_norm_scale, l2
from nncf_compactprune.errors import ConfigError, DataError
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.plugins.hookspecs import hookimpl

BATCH = 8


def dense_network():
    """A network that tells five classes apart: without the shift its random weights know only one. Every other channel
    does next to nothing."""
    network = trained("plain", dtype=torch.float32).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data[::2] *= 0.01
            norm.bias.data[::2] *= 0.01
    images = torch.randn(200, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        network.head.bias -= network(images).mean(0)
    return network


def batches(count=8):
    """Images with the classes that the network gives them."""
    network, generator = dense_network(), torch.Generator().manual_seed(3)
    images = [torch.randn(BATCH, 3, 12, 12, generator=generator) for _ in range(count)]
    with torch.no_grad():
        return [(x, network(x).argmax(1)) for x in images]


def worst(context):
    """Keeps what should go."""
    return -batch_norm_scale(context)


def config(search, *, algorithm="fbnet_pruning", budget=0.5, **params):
    entry = {
        "algorithm": algorithm,
        "budget": {"macs": budget},
        "params": {"round_to": 1, **params},
        "initializer": {"search": search},
    }
    return {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}


def settings_of(ctrl):
    (figures,) = ctrl.statistics().algorithms.values()
    return figures["search"]


def rows_of(ctrl):
    return ctrl.get_compression_state()["algorithms"][0]["state"]["search"]["rows"]


def test_the_better_settings_are_found_and_the_result_is_that_of_giving_them():
    dense, loader = dense_network(), batches()
    searched, given = copy.deepcopy(dense), copy.deepcopy(dense)
    grid = {"importance": [worst, "batch_norm_scale"]}
    common = {"budget": {"macs": 0.7}, "train_loader": loader, "round_to": 1}
    prune(searched, loader[0][0], initializer={"search": {"grid": grid, "num_samples": 24, "steps": 0}}, **common)
    prune(given, loader[0][0], importance="batch_norm_scale", **common)
    for (name, left), (_, right) in zip(searched.state_dict().items(), given.state_dict().items(), strict=True):
        assert torch.equal(left, right), name


def test_trials_leave_model_random_states_and_listeners_alone(monkeypatch):
    seen = []
    plugins = default_plugins()

    class Listener:
        @hookimpl
        def compactprune_event(self, event):
            seen.append(event.kind)

    listening = copy.copy(plugins).silent()
    listening.register(Listener(), "listener")
    dense = dense_network()
    before = copy.deepcopy(dense.state_dict())
    real = channel_pruning.search

    def watched(context, *rest):
        state = torch.get_rng_state()
        found = real(context, *rest)
        assert torch.equal(torch.get_rng_state(), state)
        assert seen == []
        assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())
        assert not any(p.grad is not None for p in context.model.parameters())
        return found

    monkeypatch.setattr(channel_pruning, "search", watched)
    create_compressed_model(
        dense, config({"num_samples": 16, "steps": 1}, schedule="one_shot"), batches(), plugins=listening
    )
    assert seen == ["traced", "pruned"]


def test_rounds_halve_and_say_what_each_trial_had():
    ctrl, _ = create_compressed_model(
        model32(),
        config({"grid": {"max_ratio": [0.6, 0.7, 0.8, 0.9, 0.95]}, "num_samples": 16, "steps": 1}, schedule="one_shot"),
        batches(12),
    )
    rows = rows_of(ctrl)
    assert [row["steps"] for row in rows] == [3, 3, 2, 1, 1]  # 5, 3 and 2 trials
    assert {row["settings"]["max_ratio"] for row in rows} == {0.6, 0.7, 0.8, 0.9, 0.95}
    assert rows[0]["loss"] <= rows[1]["loss"]
    assert settings_of(ctrl).startswith(f"max_ratio {rows[0]['settings']['max_ratio']}: the best of 5, ")


def test_a_loader_that_ends_gives_no_further_round():
    ctrl, _ = create_compressed_model(
        model32(),
        config({"grid": {"max_ratio": [0.6, 0.7, 0.8, 0.9]}, "num_samples": 16, "steps": 4}, schedule="one_shot"),
        batches(2 + 6),
    )
    rows = rows_of(ctrl)
    assert [row["steps"] for row in rows] == [6, 6, 4, 4]


def test_images_that_judge_are_not_what_trials_look_at():
    seen = []

    def looking(context):
        seen.extend(x for x, _ in context.batches())
        return l2(context)

    loader = batches(6)
    search = {"grid": {"importance": [looking]}, "num_samples": 2 * BATCH, "steps": 0}
    ctrl, _ = create_compressed_model(model32(), config(search, schedule="exponential"), loader)
    assert seen
    assert not any(torch.equal(x, judge) for x in seen for judge, _ in loader[:2])
    assert any(torch.equal(x, loader[2][0]) for x in seen)
    assert ctrl.compression_rate == 0  # the schedule has not begun


def test_a_resumed_run_has_the_settings_without_a_search(monkeypatch):
    document = config({"num_samples": 16, "steps": 1}, pruning_steps=2)
    ctrl, _ = create_compressed_model(model32(), document, batches())
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    monkeypatch.setattr(channel_pruning, "search", lambda *_: pytest.fail("searched again"))
    again, model = create_compressed_model(model32(), document, batches(), compression_state=state)
    chosen = state["algorithms"][0]["state"]["params"]
    assert again.get_compression_state()["algorithms"][0]["state"]["params"] == chosen
    assert rows_of(ctrl)[0]["settings"].items() <= chosen.items()
    assert settings_of(again) == settings_of(ctrl)
    again.strip()
    assert model(torch.zeros(1, 3, 12, 12)).shape == (1, 5)


def test_catro_searches_what_it_has():
    search = {"num_samples": 16, "steps": 1}
    ctrl, _ = create_compressed_model(
        model32(), config(search, algorithm="catro", schedule="one_shot", samples_per_class=2), batches(8)
    )
    rows = rows_of(ctrl)
    assert len(rows) == 4
    assert set(rows[0]["settings"]) == {"allocation", "damping"}


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"grid": {"schedule": ["one_shot"]}}, "'schedule' cannot be searched: every trial cuts at once"),
        ({"grid": {"allocation": []}}, "'allocation' has no value to try"),
        ({"grid": {}}, "nothing to try. Name keys of params"),
        ({"grid": {"importance": ["l2", "l3"]}}, r"importance l3: importance: .*unknown importance criterion 'l3'"),
        ({"grid": {"max_ratio": [0.5, 7]}}, "max_ratio 7: max_ratio: "),
        ({"grid": {"colour": ["red"]}}, "colour red: colour: "),
        (
            {"grid": {"min_channels": list(range(1, 10)), "max_ratio": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 0.4]}},
            "72 comb",
        ),
    ],
)
def test_grids_that_make_no_sense_are_refused_with_the_config(search, message):
    with pytest.raises(ConfigError, match=message):
        create_compressed_model(model32(), config(search), batches())


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = model32()

    def forward(self, x):
        return self.net.features(x)


@pytest.mark.parametrize(
    ("model", "loader", "error", "message"),
    [
        (model32, lambda: batches(2), DataError, "ends within the 16 images that judge"),
        (model32, list, DataError, "ends within the 16 images"),
        (model32, lambda: [(x, None) for x, _ in batches()], DataError, "batches hold no labels"),
        (Boxes, batches, DataError, r"initializer.search: labels are compared with class scores .* but Boxes gives \["),
    ],
)
def test_data_and_networks_that_it_cannot_judge_by(model, loader, error, message):
    net = model()
    before = copy.deepcopy(net.state_dict())
    search = {"grid": {"allocation": ["balanced", "uniform"]}, "num_samples": 16, "steps": 1}
    with pytest.raises(error, match=message):
        create_compressed_model(net, config(search, schedule="one_shot"), loader())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_frozen_weights_stay_frozen_in_trials():
    net = model32()
    next(net.parameters()).requires_grad_(False)
    search = {"grid": {"allocation": ["balanced", "uniform"]}, "num_samples": 4, "steps": 1}
    create_compressed_model(net, config(search, schedule="one_shot"), labelled_batches())
    assert not next(net.parameters()).requires_grad
