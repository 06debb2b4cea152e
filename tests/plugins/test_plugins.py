"""Plugins: what registers, what is refused, and that a refusal leaves no trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import trained
from support.places import TESTS
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.config import AlgorithmConfig, load_config
from nncf_compactprune.decide.criteria import CriterionContext
from nncf_compactprune.errors import PluginError
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.plugins import registry as plugins_module
from nncf_compactprune.plugins.hookspecs import Event, hookimpl


class Catro:
    name = "catro"
    summary = "a stand-in"
    Config = AlgorithmConfig


def fake_plugin(name: str = "fake", **hooks: Callable[..., Any]) -> ModuleType:
    """Returns a module with the given functions as marked hooks."""
    module = ModuleType(name)
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    return module


def snapshot(plugins: Plugins) -> tuple[Any, ...]:
    manager = plugins._manager
    hooks = {name: len(caller.get_hookimpls()) for name, caller in vars(manager.hook).items() if name[0] != "_"}
    registries = [dict(getattr(plugins, name)) for name in plugins_module._NOUNS]
    return registries, dict(plugins._owners), sorted(name for name, _ in manager.list_name_plugin()), hooks


def test_each_registry_holds_what_its_hook_returns() -> None:
    rule: Any = len
    algorithm: Any = Catro

    plugins = Plugins()
    name = plugins.register(
        fake_plugin(
            compactprune_algorithms=lambda: [algorithm],
            compactprune_importance=lambda: {"l1": rule},
            compactprune_allocations=lambda: {"half": rule},
            compactprune_schedules=lambda: {"linear": rule},
            compactprune_op_rules=lambda: {"aten.add": rule},
            compactprune_module_facts=lambda: {nn.Conv2d: rule},
            compactprune_models=lambda: {"timm": rule},
            compactprune_datasets=lambda: {"digits": rule},
            compactprune_latency_meters=lambda: {"phone": rule},
        )
    )
    assert name == "fake"
    assert plugins.algorithms == {"catro": algorithm}
    assert plugins.importance == {"l1": rule}
    assert plugins.allocations == {"half": rule}
    assert plugins.schedules == {"linear": rule}
    assert plugins.resolve("schedules", "linear") is plugins.resolve("importance", rule) is rule
    with pytest.raises(PluginError, match=r"unknown schedule 'liner'\. Did you mean 'linear'"):
        plugins.resolve("schedules", "liner")
    assert plugins.op_rules == {"aten.add": rule}
    assert plugins.module_facts == {nn.Conv2d: rule}
    assert plugins.models == {"timm": rule}
    assert plugins.datasets == {"digits": rule}
    assert plugins.latency_meters == {"phone": rule}


def test_objects_and_generators_are_plugins_too() -> None:
    class Plugin:
        @hookimpl
        def compactprune_algorithms(self) -> Iterator[type]:
            yield Catro

    plugins = Plugins()
    plugins.register(Plugin(), "object")
    assert plugins.algorithms["catro"].__name__ == "Catro"


def unmarked() -> ModuleType:
    module = fake_plugin(compactprune_importance=lambda: {"l9": len})
    module.compactprune_algorithms = lambda: [Catro]  # type: ignore[attr-defined]
    return module


def raising() -> Any:
    msg = "no data"
    raise KeyError(msg)


class Nameless:
    summary = "x"
    Config = AlgorithmConfig


class Configless:
    name = "x"
    summary = "x"
    Config = dict


class Unpublishable:
    name = "x"
    summary = "x"

    class Config(AlgorithmConfig):
        callback: Callable[[], None]


REFUSED = {
    "misspelt": (
        fake_plugin(compactprune_algoritms=lambda: [Catro]),
        r"plugin 'fake': unknown hook 'compactprune_algoritms'. Did you mean 'compactprune_algorithms'\?",
    ),
    "misspelt beside a good one": (
        fake_plugin(compactprune_importance=lambda: {"l9": len}, compactprune_evnt=lambda event: None),
        r"'compactprune_evnt'. Did you mean 'compactprune_event'\?",
    ),
    "unmarked": (unmarked(), r"compactprune_algorithms\(\) is not marked. Put @hookimpl above it\."),
    "no hook": (ModuleType("empty"), "implements no hook. Expected some of compactprune_algorithms"),
    "unknown argument": (fake_plugin(compactprune_event=lambda evnt: None), "evnt"),
    "raises": (fake_plugin(compactprune_models=raising), r"compactprune_models\(\) raised KeyError: 'no data'\."),
    "nothing returned": (fake_plugin(compactprune_models=lambda: None), "must return a mapping, got NoneType"),
    "one class": (fake_plugin(compactprune_algorithms=lambda: Catro), "must return a list of classes, got type"),
    "an instance": (fake_plugin(compactprune_algorithms=lambda: [Catro()]), "must return classes, got <"),
    "a mapping": (fake_plugin(compactprune_algorithms=lambda: {"a": Catro}), "list of classes, got dict"),
    "nameless": (fake_plugin(compactprune_algorithms=lambda: [Nameless]), "Nameless.name must be a non-empty string"),
    "configless": (fake_plugin(compactprune_algorithms=lambda: [Configless]), "Configless.Config must be a subclass"),
    "no schema": (fake_plugin(compactprune_algorithms=lambda: [Unpublishable]), "Config has no JSON schema"),
    "not callable": (fake_plugin(compactprune_models=lambda: {"a": 3}), "map names to callables, got 'a': 3"),
    "string for class": (fake_plugin(compactprune_module_facts=lambda: {"a": len}), "map classes to callables"),
    "class for string": (fake_plugin(compactprune_op_rules=lambda: {nn.ReLU: len}), "map names to callables"),
    "twice in one": (fake_plugin(compactprune_algorithms=lambda: [Catro, Catro]), "'catro' is offered by 'fake' twice"),
    "owned": (
        fake_plugin(compactprune_datasets=lambda: {"new": len}, compactprune_importance=lambda: {"l1": len}),
        "importance criterion 'l1' is offered by 'first' and 'fake'. Rename or remove one.",
    ),
    "owned class": (
        fake_plugin(compactprune_module_facts=lambda: {nn.Conv2d: len}),
        "facts function for the module class Conv2d is offered by 'first' and 'fake'",
    ),
}


@pytest.mark.parametrize(("plugin", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_plugin_leaves_no_trace(plugin: ModuleType, message: str) -> None:
    plugins = Plugins()
    good = {"compactprune_importance": lambda: {"l1": len}, "compactprune_module_facts": lambda: {nn.Conv2d: len}}
    plugins.register(fake_plugin("first", **good))
    before = snapshot(plugins)
    with pytest.raises(PluginError, match=message):
        plugins.register(plugin)
    assert snapshot(plugins) == before
    plugins.emit("still works")


def test_a_plugin_registers_once() -> None:
    plugins = Plugins()
    plugin = fake_plugin(compactprune_importance=lambda: {"l1": len})
    plugins.register(plugin, "a")
    before = snapshot(plugins)
    with pytest.raises(PluginError, match="plugin 'a': is registered already"):
        plugins.register(fake_plugin(compactprune_importance=lambda: {"l2": len}), "a")
    with pytest.raises(PluginError, match="plugin 'b': is registered already as 'a'"):
        plugins.register(plugin, "b")
    assert snapshot(plugins) == before


def test_unknown_algorithm_is_told_with_the_nearest_name() -> None:
    plugins = Plugins()
    with pytest.raises(
        PluginError, match=r"unknown algorithm 'catro'. No algorithm is registered\. Install the package"
    ):
        plugins.get_algorithm("catro")
    plugins.register(fake_plugin(compactprune_algorithms=lambda: [Catro]))
    with pytest.raises(PluginError, match=r"unknown algorithm 'catroo'. Did you mean 'catro'\?"):
        plugins.get_algorithm("catroo")
    with pytest.raises(PluginError, match=r"unknown algorithm 'x'. Known here: 'catro'"):
        plugins.get_algorithm("x")


def test_events_reach_every_listener() -> None:
    seen: list[Event] = []
    plugins = Plugins()
    plugins.register(fake_plugin("a", compactprune_event=lambda event: seen.append(event)))
    plugins.register(fake_plugin("b", compactprune_event=lambda event: seen.append(event)))
    plugins.emit("pruned", kind="conv", macs=3)
    assert [(event.kind, dict(event.payload)) for event in seen] == [("pruned", {"kind": "conv", "macs": 3})] * 2
    with pytest.raises(TypeError):
        seen[0].payload["macs"] = 4  # type: ignore[index]


def test_default_plugins_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def no_entry_points(group: str) -> list[metadata.EntryPoint]:
        calls.append(group)
        return []

    monkeypatch.setattr(plugins_module, "entry_points", no_entry_points)
    default_plugins.cache_clear()
    try:
        assert default_plugins() is default_plugins()
        assert calls == ["nncf_compactprune"]
    finally:
        default_plugins.cache_clear()


def test_a_broken_entry_point_names_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("l3", "no_such_module_at_all", "nncf_compactprune")
    broken = broken._for(SimpleNamespace(name="acme-pruning"))  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins_module, "entry_points", lambda group: [broken])
    plugins = Plugins()
    message = r"plugin 'acme-pruning:l3': entry point 'no_such_module_at_all' does not load: ModuleNotFoundError: .*"
    with pytest.raises(PluginError, match=message + r"pip uninstall acme-pruning"):
        plugins.load_entry_points()


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the example plugin, as pip does, into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(TESTS / "support" / "third_party_plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", target, source], check=True)
    return target


def test_an_installed_third_party_plugin_is_found(third_party: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(third_party)
    (distribution,) = metadata.distributions(path=[str(third_party)])
    monkeypatch.setattr(plugins_module, "entry_points", lambda group: distribution.entry_points.select(group=group))
    plugins = Plugins()
    plugins.load_entry_points()
    assert plugins._owners["algorithms", "every_other"] == "compactprune-example-plugin:l3"
    entry = {"algorithm": "every_other", "budget": {"macs": 0.5}, "params": {"offset": 1}}
    config = load_config({"compression": entry}, plugins)
    assert config.compression[0].params.offset == 1  # type: ignore[attr-defined]

    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    member = SimpleNamespace(parameter="w", dim=0, indices=np.array([[0], [1]]))
    group: Any = SimpleNamespace(size=2, with_role=lambda role: [member] * (role == "producer"))
    nothing: Any = None
    context = CriterionContext(group, nothing, nothing, {"w": weight}, tuple, dict)
    scores = plugins.importance["l3"](context)
    assert scores.tolist() == [9.0, 27.0]

    shares = [plugins.schedules["linear"](epoch, initial=0.1, target=0.5, steps=4) for epoch in range(6)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


def test_an_installed_allocation_and_schedule_run_from_a_configuration(
    third_party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch masks more; the widest group loses its channels first; then the network is cut."""
    monkeypatch.syspath_prepend(third_party)
    plugins = Plugins()
    plugins.load_entry_points()
    entry = {
        "algorithm": "fbnet_pruning",
        "budget": {"params": 0.6},
        "params": {"allocation": "widest_first", "schedule": "linear", "pruning_steps": 4, "round_to": 1},
    }
    config = {"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": entry}
    ctrl, _ = create_compressed_model(trained("plain", dtype=torch.float32), config, plugins=plugins)
    rates = []
    for _ in range(5):
        ctrl.scheduler.epoch_step()
        rates.append(ctrl.compression_rate)
    assert rates == sorted(rates)
    assert rates[0] < rates[2] < rates[4]
    plan = ctrl.algorithms[0].plan  # type: ignore[attr-defined]
    assert plan.after.params <= 0.6 * plan.before.params


def test_a_third_party_algorithm_runs_from_a_configuration(third_party: Path, tmp_path: Path) -> None:
    """As a user meets it: pip put the plugin beside the package, a config names it, nothing else was said."""
    config = tmp_path / "config.json"
    config.write_text(
        '{"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": {"algorithm": "every_other",'
        ' "budget": {"params": 0.6}, "params": {"schedule": "one_shot", "round_to": 1, "offset": 1}}}'
    )
    program = (
        "import sys; from support.networks import trained; import torch\n"
        "from nncf_compactprune import create_compressed_model\n"
        "ctrl, model = create_compressed_model(trained('plain', dtype=torch.float32), sys.argv[1])\n"
        "print(ctrl.algorithms[0].plan.kept['features.0.0.weight'][0])"
    )
    paths = os.pathsep.join([str(third_party), str(TESTS)])
    result = subprocess.run(
        [sys.executable, "-c", program, config],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kept = [int(n) for n in result.stdout.strip().strip("()").split(",")]
    assert [n for n in range(1, 16, 2) if n in kept] == list(range(1, 16, 2))[: len(kept)]
    assert 0 < len(kept) < 16
