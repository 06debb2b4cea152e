"""The public API: which names there are, and that each is described."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import pytest

import nncf_compactprune
from nncf_compactprune.errors import CompactPruneError

NAMES = """
    BudgetError ChannelGraph ChannelGroup ClassSubset CompactPruneError CompressionConfig CompressionController
    CompressionStage ConfigError DataError DataFreeError DistillationError ExportError ExportedFile FixedAttributeError
    NothingPrunableError PlanError PluginError Plugins PruningPlan PruningResult QuantizationError Rotation
    ResolveError RestoreError ScopeError
    SelfCheckError StorageError UntrainedError
    TraceError __version__ analyse apply_plan create_compressed_model export_model hookimpl load_config load_pruned
    plan_of prune rotate save_pruned
"""
ROOMS = ("", ".algorithms", ".config", ".export", ".plan", ".plugins", ".report")
SAVING_AND_LOADING = {
    ".integrations.timm": ("save_pruned_timm", "load_pruned_timm"),
    ".integrations.pretrained": ("save_pruned_hf", "load_pruned_hf"),
}


def public() -> Iterator[tuple[str, Any]]:
    """Every public object by its full name, methods of classes included."""
    places = {room: importlib.import_module(f"nncf_compactprune{room}").__all__ for room in ROOMS}
    for place, names in {**places, **SAVING_AND_LOADING}.items():
        module = importlib.import_module(f"nncf_compactprune{place}")
        for name in names:
            value = getattr(module, name)
            yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    function = getattr(member, "__func__", member)
                    if not key.startswith("_") and (inspect.isfunction(function) or isinstance(member, property)):
                        yield f"{module.__name__}.{name}.{key}", function


OWN = [
    (name, value)
    for name, value in public()
    if (getattr(value, "__module__", None) or "nncf_compactprune").startswith("nncf_compactprune")
    and not isinstance(value, str)
]


def parameters(value: Callable[..., Any]) -> list[str]:
    """Those that a caller gives; a config section's keys are described in its schema."""
    called = not inspect.isclass(value) or not (issubclass(value, (Exception, Enum)) or hasattr(value, "model_fields"))
    if isinstance(value, property) or not called or getattr(value, "_is_protocol", False):
        return []
    return [
        name for name in inspect.signature(value).parameters if name not in ("self", "cls") and not name.startswith("_")
    ]


def test_the_names_are_these():
    assert sorted(nncf_compactprune.__all__) == sorted(NAMES.split())
    assert all(hasattr(nncf_compactprune, name) for name in nncf_compactprune.__all__)


def test_every_error_a_user_can_meet_is_exported():
    known = {value for value in vars(nncf_compactprune).values() if inspect.isclass(value)}
    errors = importlib.import_module("nncf_compactprune.errors")
    defined = {v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, CompactPruneError)}
    assert defined <= known


def test_every_name_is_described():
    findings = []
    for name, value in OWN:
        text, names = inspect.getdoc(value) or "", parameters(value)
        if not text:
            findings.append(f"{name} has no docstring")
        if len(names) >= 2:
            findings += [f"{name} does not say what {one} is" for one in names if f":param {one}:" not in text]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("place", ["", *SAVING_AND_LOADING])
def test_saving_and_loading_take_the_same_arguments(place):
    module = importlib.import_module(f"nncf_compactprune{place}")
    save, load = (getattr(module, name) for name in SAVING_AND_LOADING.get(place, ("save_pruned", "load_pruned")))
    kinds = {name: p.kind for name, p in inspect.signature(save).parameters.items()}
    assert list(kinds)[:2] == ["model", "directory"]
    assert inspect.signature(save).return_annotation == "Path"
    assert inspect.signature(load).return_annotation == "nn.Module"
    positional = [n for n, p in inspect.signature(load).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[-1] == "directory"
