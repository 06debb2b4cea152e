"""BatchNorm statistics after a cut: means over the batches, whatever the module's momentum and the batch size are."""

from __future__ import annotations

import copy

import pytest
import torch
from support.data_free import randn
from torch import nn

from nncf_compactprune import prune


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [0.1, 0.0, 0.01, None])
@pytest.mark.parametrize("size", [16, 64])
def test_statistics_are_means_over_what_comes(momentum: float | None, size: int) -> None:
    model, images = network(), randn(128, 3, 8, 8) * 3 + 1
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
            module.num_batches_tracked += 1000
    loader = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(size)]
    prune(model.eval(), images[:2], budget={"macs": 0.7}, train_loader=loader)
    first = model[1]
    with torch.no_grad():
        x = model[0](images)
    assert torch.allclose(first.running_mean, x.mean([0, 2, 3]), atol=1e-4)
    assert torch.allclose(first.running_var, x.var([0, 2, 3]), rtol=0.05)
    assert first.momentum == momentum
    assert int(first.num_batches_tracked) == 1000
    again = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
