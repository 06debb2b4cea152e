"""Budgets of measured time, on a device whose time is known, and once on a real one."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from support.meters import CALLED, Counting, FakeMeter, with_fakes
from support.networks import images, model32

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.algorithms.latency.cache import MeasurementCache, cache_folder
from nncf_compactprune.algorithms.latency.model import Measured, TimeModel
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import BudgetError, ExportError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.serving import meter
from nncf_compactprune.serving.meter import LOADS, MeterOptions, in_turns, loaded_anew
from nncf_compactprune.serving.meters import OpenVinoMeter


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plugins() -> Plugins:
    found = Plugins()
    found.load_entry_points()
    return with_fakes(found)


def time_of(model) -> float:
    return Counting(model, tells_layers=True).request()


def pruned(plugins, latency, model=None, **more):
    model = model or model32("plain")
    dense = time_of(model)
    budget = {"runtime": "fake", "latency": latency, **more}
    result = prune(model, images(torch.float32), budget=budget, plugins=plugins, round_to=1)
    return result, time_of(model) / dense


@pytest.mark.parametrize("runtime", ["fake", "silent"])
@pytest.mark.parametrize("asked", [0.8, 0.5])
def test_the_measured_time_holds(plugins, asked, runtime):
    result, ratio = pruned(plugins, asked, model32("residual"), runtime=runtime)
    assert result.latency is not None
    assert result.latency.holds
    assert ratio == pytest.approx(asked, rel=0.05)
    assert result.latency.ratio == pytest.approx(ratio, rel=1e-6)
    assert result.latency.ms == pytest.approx(time_of(result.model), rel=1e-6)


def test_the_result_goes_into_reports(plugins):
    latency = pruned(plugins, 0.6)[0].latency
    header, _, dense, *others = latency.to_markdown()
    assert header.startswith("| channels kept |")
    assert dense.startswith("| 100.0% | 100.0% |")
    assert len(others) == len(latency.measured) - 1
    assert json.loads(json.dumps(asdict(latency)))["ratio"] == latency.ratio


def test_milliseconds_are_what_they_say(plugins):
    dense = time_of(model32("plain"))
    result, _ = pruned(plugins, f"{dense * 0.6:.6f} ms")
    assert result.latency.asked_ms == pytest.approx(dense * 0.6, rel=1e-3)
    assert time_of(result.model) == pytest.approx(dense * 0.6, rel=0.05)


def test_several_budgets_hold_together(plugins):
    result, ratio = pruned(plugins, 0.7, macs=0.3)
    assert result.plan.after.macs <= 0.3 * result.plan.before.macs
    assert ratio < 0.65  # here the MACs bind
    result, ratio = pruned(plugins, 0.5, macs=0.9, params=0.95)
    assert ratio == pytest.approx(0.5, rel=0.05)
    assert result.plan.after.params <= 0.95 * result.plan.before.params


def test_a_loose_budget_cuts_nothing(plugins):
    result, ratio = pruned(plugins, "1s")
    assert ratio == 1
    assert result.plan.is_identity


def test_what_cannot_be_reached_is_told_with_the_least_before_anything_changes(plugins):
    model = model32("plain")
    before = copy.deepcopy(model.state_dict())
    message = r"latency of at most .* ms \(2\.0% of .* ms\) cannot be reached.*the least is .* ms \(\d+\.\d%"
    with pytest.raises(BudgetError, match=message):
        pruned(plugins, 0.02, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_such_device(plugins):
    with pytest.raises(ExportError, match=r"no device 'NPU' here, it has \['CPU'\]"):
        pruned(plugins, 0.5, device="NPU")
    with pytest.raises(ExportError, match=r"OpenVINO has no device 'CUP' here, it has \['CPU'.*Did you mean 'CPU'"):
        pruned(plugins, 0.5, runtime="openvino", device="CUP")
    with pytest.raises(ExportError, match=r"ONNX Runtime has no device 'NPU'"):
        pruned(plugins, 0.5, runtime="onnxruntime", device="NPU")
    with pytest.raises(ExportError, match=r"budget\.precision: ONNX Runtime is measured in"):
        pruned(plugins, 0.5, runtime="onnxruntime", precision="int8")


def test_a_noisy_machine_is_told_with_its_spread(plugins, caplog):
    result, _ = pruned(plugins, 0.6, runtime="noisy")
    assert result.latency.spread > 0.05
    assert "too noisy for 5%" in caplog.text
    assert f"{result.latency.spread:.1%}" in caplog.text


def test_what_was_chosen_by_luck_is_measured_anew_and_the_search_goes_on(plugins):
    result, ratio = pruned(plugins, 0.6, model32("residual"), runtime="lucky_once")
    assert result.latency.ratio == pytest.approx(ratio, rel=1e-6)
    assert ratio == pytest.approx(0.6, rel=0.05)
    seemed = [one.ratio for one in result.latency.measured if one.ratio == pytest.approx(0.6, rel=0.03)]
    assert seemed


def test_a_network_that_does_not_hold_when_measured_anew_is_told(plugins, caplog):
    result, ratio = pruned(plugins, 0.6, model32("residual"), runtime="lucky")
    assert result.latency.ratio == pytest.approx(ratio, rel=1e-6)  # the truth, not what chose it
    assert result.latency.chosen_by == pytest.approx(0.85 * ratio, rel=1e-6)
    assert not result.latency.holds
    assert "latency: the budget does not hold within 5%" in caplog.text
    assert f"measured anew, chosen at {result.latency.chosen_by:.1%}" in caplog.text


def test_the_spread_of_a_figure_is_that_between_loads_too():
    lucks = iter([0.5, 0.6, 0.55])
    model = model32("plain")
    paired = loaded_anew(
        lambda: Counting(model, tells_layers=True), lambda: Counting(model, tells_layers=True, luck=next(lucks))
    )
    assert paired.ratio == pytest.approx(0.55)
    assert paired.spread == pytest.approx(0.05 / 0.55)


def test_a_schedule_measures_before_training_and_at_the_decision(plugins):
    model = model32("residual")
    dense = time_of(model)
    config = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": {
            "algorithm": "fbnet_pruning",
            "budget": {"latency": 0.6, "runtime": "fake"},
            "params": {"schedule": "exponential", "pruning_steps": 3, "round_to": 1},
        },
    }
    ctrl, model = create_compressed_model(model, config, plugins=plugins)
    assert len(FakeMeter.loaded) == 5  # dense, smallest, three at random
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    assert 0 < ctrl.compression_rate < 0.4
    assert len(FakeMeter.loaded) == 5
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    assert time_of(model) / dense == pytest.approx(0.6, rel=0.05)
    assert "asked" in ctrl.statistics().to_str()
    ctrl.strip()

    again, masked = create_compressed_model(model32("residual"), config, compression_state=state, plugins=plugins)
    assert len(FakeMeter.loaded) == 1  # all was measured and is kept, but for the dense network's time of today
    assert 0 < again.compression_rate < 0.4
    again.strip()
    assert time_of(masked) / dense == pytest.approx(0.6, rel=0.05)


def test_a_network_that_shrinks_while_it_trains_arrives_too(plugins):
    model = model32("residual")
    dense = time_of(model)
    params = {"schedule": "exponential", "pruning_steps": 4, "shrink_every": 1, "round_to": 1}
    entry = {"algorithm": "fbnet_pruning", "budget": {"latency": 0.6, "runtime": "fake"}, "params": params}
    config = {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}
    ctrl, model = create_compressed_model(model, config, plugins=plugins)
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    times = []
    for _ in range(6):
        ctrl.scheduler.epoch_step()
        times.append(time_of(model) / dense)
    assert times[1] < 1
    assert times[-1] == pytest.approx(0.6, rel=0.05)


def test_measurements_are_kept_and_a_torn_line_costs_one(plugins):
    first, _ = pruned(plugins, 0.6)
    assert len(FakeMeter.loaded) > 5
    second, _ = pruned(plugins, 0.6)
    assert len(FakeMeter.loaded) == 1 + 2 * LOADS  # the dense one, and the chosen one anew beside it
    assert second.plan == first.plan
    assert second.latency.ratio == first.latency.ratio
    (file,) = cache_folder().glob("*.jsonl")
    lines = file.read_text().splitlines()
    assert json.loads(lines[0])["device"] == "CPU"
    chosen = json.loads(lines[-1])["widths"]
    others = [line for line in lines if json.loads(line).get("widths") != chosen]
    file.write_text("\n".join([*others, lines[-1][:20]]))
    pruned(plugins, 0.6)
    assert len(FakeMeter.loaded) == 3 + 2 * LOADS  # and the lost one, beside the dense network once more


def test_milliseconds_are_those_of_today_though_the_ratios_were_measured_earlier(plugins, monkeypatch):
    asked = f"{time_of(model32('plain')) * 0.6:.6f} ms"
    monkeypatch.setattr(FakeMeter, "luck", 2.0)  # the machine is busy
    assert pruned(plugins, asked)[0].latency.ratio == pytest.approx(0.3, rel=0.05)
    monkeypatch.setattr(FakeMeter, "luck", 1.0)
    result = pruned(plugins, asked)[0]
    assert time_of(result.model) == pytest.approx(result.latency.asked_ms, rel=0.05)
    assert result.latency.ms == pytest.approx(time_of(result.model), rel=1e-3)


def test_other_options_devices_and_networks_are_measured_anew():
    base = MeasurementCache("device", MeterOptions(), "network")
    others = [
        MeasurementCache("other device", MeterOptions(), "network"),
        MeasurementCache("device", MeterOptions(batch=2), "network"),
        MeasurementCache("device", MeterOptions(), "another"),
    ]
    assert len({one.path for one in [base, *others]}) == 4


def test_a_cache_that_cannot_be_written_is_only_a_warning(plugins, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result, _ = pruned(plugins, 0.6)
    assert result.latency.holds
    assert "is not kept for later runs" in caplog.text


def test_the_model_finds_the_layers_and_the_vectors():
    graph = trace(model32("plain"), images(torch.float32))
    sizes = graph.sizes
    weights = [name for name, shape in graph.parameters.items() if len(shape) == 4]

    def measured(widths, called):
        model = TimeModel(graph, 1)
        model._modules = [name.removesuffix(".weight") for name in weights]
        slopes, offsets = model._dim(0)
        inner, around = model._dim(1)
        sides = np.ceil((slopes @ widths + offsets) / 8) * 8 * np.ceil((inner @ widths + around) / 8) * 8
        layers = dict(zip(model._modules, (called + sides).tolist(), strict=True))
        return Measured(tuple(widths.astype(int).tolist()), sum(layers.values()), 0.0, 1.0, layers)

    random = np.random.default_rng(1)
    samples = [
        measured(w, 50.0) for w in (sizes.astype(float), *(random.integers(1, sizes + 1.0) * 1.0 for _ in range(6)))
    ]
    samples = [Measured(s.widths, s.ratio / samples[0].ratio, 0.0, 1.0, s.layers) for s in samples]
    model = TimeModel(graph, 10**6)
    model.fit(samples)
    assert model.vector == 8
    for one in samples:
        assert model(np.array(one.widths, float)) == pytest.approx(one.ratio * 10**6, rel=0.02)
    assert model.saved(sizes.astype(float), 0, 1) > 0  # less than a vector, and on the way


def test_turns_tell_networks_apart():
    small, large = (Counting(model32(name), tells_layers=True) for name in ("depthwise", "plain"))
    paired = in_turns(small, large)
    assert paired.spread == pytest.approx(0)
    assert paired.ratio == pytest.approx(large.request() / small.request())
    assert CALLED / 1e3 < paired.first_ms < paired.second_ms


def test_openvino_and_its_layers(plugins, monkeypatch):
    """A real measurement, cut short: nothing is claimed about its time."""
    monkeypatch.setattr(meter, "SECONDS", 0.1)
    monkeypatch.setattr(meter, "PATIENCE", 0.1)
    options = MeterOptions(threads=1, batch=1)
    loaded = OpenVinoMeter(options).load(model32("residual"), images(torch.float32))
    assert in_turns(loaded, loaded).first_ms > 0
    clocks = loaded.layers()
    assert [clock.module for clock in clocks if clock.module][:2] == ["features.0.0", "features.1.conv1"]
    assert sum(clock.microseconds for clock in clocks) > 0
    loaded.close()
