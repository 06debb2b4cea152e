"""Weights that a hook makes from others before each forward: ``weight_norm`` and ``spectral_norm`` as they were before
parametrizations, and ``torch.nn.utils.prune``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from nncf_compactprune import create_compressed_model, load_pruned, prune, save_pruned

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def masked(module: nn.Module) -> nn.Module:
    return torch_prune.l1_unstructured(module, "weight", 0.3)


class Network(nn.Module):
    def __init__(self, made: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = made(nn.Conv2d(3, 16, 3)), made(nn.Conv2d(16, 16, 3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(params=[nn.utils.weight_norm, nn.utils.spectral_norm, masked], ids=["weight", "spectral", "prune"])
def dense(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return Network(request.param).eval()

    return make


@pytest.fixture
def net(dense: Callable[[], nn.Module]) -> nn.Module:
    return dense()


def test_they_are_cut_and_train_on(net: nn.Module) -> None:
    result = prune(net, X, budget={"params": 0.5})
    assert result.self_check is not None
    assert result.self_check.error < 1e-5
    net.train()
    net(X).sum().backward()
    assert net.first.weight.shape[0] == net.second.weight.shape[1] < 16
    assert net.first.out_channels == net.first.weight.shape[0]


def test_they_are_saved_and_loaded(net: nn.Module, dense: Callable[[], nn.Module], tmp_path: Path) -> None:
    prune(net, X, budget={"params": 0.5})
    save_pruned(net, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(dense(), tmp_path)(X), net.eval()(X), rtol=0, atol=0)


def test_behind_a_schedule_too(net: nn.Module) -> None:
    entry = {"algorithm": "fbnet_pruning", "budget": {"params": 0.5}, "params": {"schedule": "exponential"}}
    config = {"input_info": {"sample_size": list(X.shape)}, "compression": {**entry, "params": {"pruning_steps": 1}}}
    ctrl, model = create_compressed_model(net, config)
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    with torch.no_grad():
        expected = model.eval()(X)
        torch.testing.assert_close(ctrl.strip().eval()(X), expected, rtol=1e-4, atol=1e-5)
