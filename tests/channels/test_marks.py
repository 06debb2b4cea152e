"""Deciding never changes a model: nothing that a network keeps of a run survives an analysis, a trial or a check."""

from __future__ import annotations

import functools
import random
import sys

import numpy as np
import pytest
import torch
from support.cuts import random_plan
from support.forgetful import EMPTIED, MEMOS, WRITERS, InCachedMethod, InCachedProperty, WritesInput, built, cached_gate
from torch import nn

from nncf_compactprune import analyse, apply_plan, prune
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.diagnosis import find_culprit
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.plan import make_plan

LRU = type(functools.cache(lambda: None))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def state(value, level: int = 0):
    """A comparable picture of all that a model keeps, containers and helpers included."""
    if isinstance(value, torch.Tensor):
        notes = sorted(vars(value)) if type(value) is torch.Tensor else []
        return (id(value), tuple(value.shape), value.detach().flatten().tolist(), value.requires_grad, notes)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return str(value.get_state())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, dict):
        return [(key, state(entry, level + 1)) for key, entry in value.items()]
    if isinstance(value, (list, tuple, set)) or type(value).__name__ == "deque":
        return [state(entry, level + 1) for entry in value]
    if isinstance(value, LRU):
        return value.cache_info().currsize
    if isinstance(value, nn.Module) or type(value).__name__ == "Drawer":
        kept = state(vars(value), level + 1)
        return kept if level else (kept, state({n: v for n, v in vars(type(value)).items() if n[:2] != "__"}, 1))
    return id(value) if callable(value) else value


def around() -> tuple:
    legacy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist(), legacy[2], cached_gate.cache_info()[3]


def _culprit(model, x):
    graph = trace(model, x)
    keep = [np.arange(group.size) % 2 == 0 for group in graph.groups]
    find_culprit(model, make_plan(graph, keep), graph, x)


def _trial(model, x):
    prune_in_place(model, random_plan(model, x), x, dry_run=True)


LOOKS = {"trace": trace, "analyse": analyse, "diagnosis": _culprit, "trial cut": _trial}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("kind", [*MEMOS, *WRITERS], ids=lambda kind: kind.__name__)
def test_looking_at_a_network_leaves_no_mark(kind, look):
    model, x = built(kind), images()
    model.last.train()
    before, others, seen = state(model), around(), x.clone()
    LOOKS[look](model, x)
    assert state(model) == before
    assert around() == others
    assert torch.equal(x, seen)


@pytest.mark.parametrize("kind", MEMOS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("look", LOOKS)
def test_a_network_computes_afterwards_what_it_would_have_computed(kind, look):
    model, fresh = built(kind), built(kind)
    LOOKS[look](model, images())
    with torch.no_grad():
        assert torch.equal(model(images()), fresh(images()))


@pytest.mark.parametrize("warm", [InCachedProperty, InCachedMethod, None])
@pytest.mark.parametrize("kind", [*MEMOS, *WRITERS], ids=lambda kind: kind.__name__)
def test_a_pruned_network_computes_what_a_fresh_one_cut_alike_computes(kind, warm):
    if warm not in (kind, None):
        pytest.skip("only memos that torch or Python own are told from constants")
    model, fresh = built(kind), built(kind)
    if warm:
        model(images())  # the dense gate is remembered now
    result = prune(model, images(), budget={"macs": 0.6}, round_to=1)
    assert model.first.out_channels < 8
    assert result.self_check.error <= 1e-5
    apply_plan(fresh, result.plan)
    with torch.no_grad():
        assert torch.equal(model(images()), fresh(images()))


@pytest.mark.parametrize("kind", MEMOS, ids=lambda kind: kind.__name__)
def test_a_memo_of_the_user_s_own_run_is_still_there(kind):
    model = built(kind)
    with torch.no_grad():
        expected = model(images())
        before = state(model)
        analyse(model, images())
        if kind not in EMPTIED:
            assert state(model) == before
        assert torch.equal(model(images()), expected)


def test_a_failing_run_leaves_no_mark_either():
    class Fails(WritesInput):
        def gate(self):
            self.memo = 1
            msg = "no"
            raise ValueError(msg)

    model, x = built(Fails), images()
    before, seen = state(model), x.clone()
    with pytest.raises(ValueError, match="no"), evaluating(model, x):
        model(x)
    assert state(model) == before
    assert torch.equal(x, seen)


def test_deliberate_changes_stay_where_they_are_announced():
    model = built(InCachedProperty)
    with evaluating(model, changes=True):
        model.first.weight.fill_(1.0)
        model.note = "mine"
    assert bool((model.first.weight == 1).all())
    assert model.note == "mine"


def test_gradients_are_untouched():
    model, x = built(InCachedProperty), images()
    model(x).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    analyse(model, x)
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())


class NotInstalled:
    """What a package puts in the place of an optional one that is not there."""

    def __getattr__(self, name):
        raise ImportError(name)


def test_what_stands_in_for_a_missing_package_is_not_asked(monkeypatch):
    module = sys.modules[InCachedMethod.__module__]
    monkeypatch.setattr(module, "optional", NotInstalled(), raising=False)
    assert analyse(built(InCachedMethod), images()).groups
