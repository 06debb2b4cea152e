"""Algorithms run networks many times while they change them: what a network remembers of it never survives."""

from __future__ import annotations

import pytest
import torch
from support.forgetful import InAttribute, InBuffer, InCachedMethod, Merged, UntilItTrains, built
from torch import nn

from nncf_compactprune import analyse, create_compressed_model
from nncf_compactprune.controller import prune


class Scores(nn.Module):
    """A classifier around a network that remembers."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.net, self.head = built(kind, dtype=torch.float32), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.net(x).relu().mean((2, 3)))


def classifier(kind) -> Scores:
    torch.manual_seed(1)
    return Scores(kind)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 3) for _ in range(2)]


def remembers_nothing_stale(model: Scores, kind) -> None:
    """What it computes now is what the same weights compute in a network that never ran."""
    fresh = classifier(kind)
    for name, parameter in model.named_parameters():
        fresh.get_parameter(name).data = parameter.data
    x = batches()[0][0]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fresh.eval()(x))


@pytest.mark.parametrize("kind", [InAttribute, InBuffer, InCachedMethod], ids=lambda kind: kind.__name__)
def test_gradients(kind):
    model = classifier(kind)
    prune(model, batches()[0][0], budget={"macs": 0.6}, round_to=1, importance="taylor", train_loader=batches())
    remembers_nothing_stale(model, kind)


@pytest.mark.parametrize("algorithm", ["catro", "data_free_layerwise", "data_free_sparsity"])
@pytest.mark.parametrize("kind", [InAttribute, InBuffer, InCachedMethod], ids=lambda kind: kind.__name__)
def test_algorithms(kind, algorithm):
    model = classifier(kind)
    params = {"catro": {"params": {"round_to": 1}, "budget": {"macs": 0.6}}}
    params["data_free_layerwise"] = {"budget": {"macs": 0.6}, "params": {"round_to": 1}}
    params["data_free_sparsity"] = {"params": {"sparsity": 0.3}}
    config = {
        "input_info": {"sample_size": [2, 3, 8, 8]},
        "compression": {"algorithm": algorithm, **params[algorithm]},
    }
    ctrl, model = create_compressed_model(model, config, train_loader=batches())
    model = ctrl.strip()
    remembers_nothing_stale(model, kind)


def test_a_table_that_an_evaluation_left_hides_no_parameter():
    model, x = classifier(UntilItTrains).eval(), batches()[0][0]
    fresh = analyse(model, x)
    with torch.no_grad():
        model(x)
    again = analyse(model, x)
    assert [g.name for g in again.groups] == [g.name for g in fresh.groups]
    assert len(again.pinned) == len(fresh.pinned)
    assert not any(module.training for module in model.modules())
    prune(model, x, budget={"macs": 0.6}, round_to=1)
    assert model.net.first.out_channels < 8
    remembers_nothing_stale(model, UntilItTrains)


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_are_merged_in_eval_mode_stay_right(training):
    torch.manual_seed(0)
    model, x = Merged().train(training), batches()[0][0]
    with torch.no_grad():
        before = model(x)
        analyse(model, x)
        torch.testing.assert_close(model(x), before)
        prune(model, x, budget={"macs": 0.7}, round_to=1)
        after = model(x)
        assert model.training == training
        torch.testing.assert_close(model.train()(x), after)
        torch.testing.assert_close(model.eval()(x), after)
    assert model.conv.out_channels < 8
