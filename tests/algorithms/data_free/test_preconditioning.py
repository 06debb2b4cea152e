"""Preconditioning keeps what a network computes, and does what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import images
from torch import nn

from nncf_compactprune.algorithms.data_free import preconditioning
from nncf_compactprune.algorithms.data_free.preconditioning import (
    ChannelClip,
    absorb_biases,
    equalise,
    find_pairs,
    fold_batch_norms,
    precondition,
)
from nncf_compactprune.cut.transaction import Transaction

X = images()


class Chain(nn.Module):
    """Convolution, depthwise, pointwise and a linear layer, with one kind of activation."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), activation(),
            nn.Conv2d(8, 12, 1), activation(),
            nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), activation(),
        )  # fmt: skip
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.avg_pool2d(self.features(x), 10).flatten(1))


def chain(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    model = Chain(activation).double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, dtype=torch.float64) + 0.5
        elif tensor.dim() > 1:  # unlike ranges of channels, which is what this is about
            tensor.data *= torch.logspace(-1, 1, len(tensor), dtype=torch.float64).view(-1, *[1] * (tensor.dim() - 1))
    return model


def ranges(layer: nn.Module) -> float:
    rows = layer.weight.flatten(1).abs().amax(1)
    return (rows.max() / rows.min()).item()


PAIRS = [("features.0", "features.3"), ("features.3", "features.6"), ("features.6", "features.8")]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_folding_and_equalising_change_no_output(activation) -> None:
    model = chain(activation)
    dense, log = copy.deepcopy(model), Transaction()
    pairs = find_pairs(model, X)
    assert [(p.first, p.second) for p in pairs] == PAIRS
    assert [bool(p.clip) for p in pairs] == [activation is nn.ReLU6] * 3
    with torch.no_grad():
        expected = dense(X)
        fold_batch_norms(log, model, pairs)
        assert torch.allclose(model(X), expected, rtol=1e-9)
        assert bool((model.features[1].weight == 1).all())
        before = ranges(model.features[0])
        equalise(log, model, pairs)
        assert torch.allclose(model(X), expected, rtol=1e-9)
    assert ranges(model.features[0]) < 0.5 * before
    assert sum(isinstance(m, ChannelClip) for m in model.modules()) == (3 if activation is nn.ReLU6 else 0)
    for first, second in PAIRS:
        layer, consumer = model.get_submodule(first), model.get_submodule(second)
        depthwise = consumer.weight.shape[1] == 1
        weight = consumer.weight.abs()
        consumed = weight.flatten(1).amax(1) if depthwise else weight.amax((0, 2, 3))
        assert torch.allclose(layer.weight.abs().flatten(1).amax(1), consumed, rtol=0.1)
    log.rollback()
    assert torch.equal(model(X), dense(X))
    assert not any(isinstance(m, ChannelClip) for m in model.modules())


def test_negative_scales_fold_too() -> None:
    model = chain()
    model.features[1].weight.data[::2] *= -1
    dense = copy.deepcopy(model)
    with torch.no_grad():
        fold_batch_norms(Transaction(), model, find_pairs(model, X))
        assert torch.allclose(model(X), dense(X), rtol=1e-9)


def test_absorbing_biases_is_exact_where_relu_lets_everything_pass(monkeypatch) -> None:
    monkeypatch.setattr(preconditioning, "ABSORBED_SIGMAS", 10.0)  # no value of this batch lies that far off
    model = chain()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    model.features[4].bias.data += 100  # its consumer is a 1 x 1 convolution with a bias
    model.train()(X)
    dense = copy.deepcopy(model.eval())
    with torch.no_grad():
        absorb_biases(Transaction(), model, find_pairs(model, X))
        assert bool((model.features[4].bias < 20).all())
        assert torch.allclose(model(X), dense(X), rtol=1e-6)
    assert torch.equal(model.features[1].bias, dense.features[1].bias)  # its consumer pads


def test_precondition_does_all_and_leaves_no_wrapper() -> None:
    model = chain(nn.ReLU6)
    expected = model(X)
    precondition(Transaction(), model, X)
    assert torch.allclose(model(X), expected, rtol=1e-6)
    assert not hasattr(model, "__nncf_hooks")


@pytest.mark.parametrize("break_", ["branch", "functional", "twice"])
def test_what_cannot_be_scaled_is_left_out(break_: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            if break_ == "branch":
                return self.b(F.relu(y)) + y
            if break_ == "functional":
                return self.b(F.relu6(y))
            return self.b(F.relu(self.b(F.relu(y))))

    assert find_pairs(Net().double(), X) == []
