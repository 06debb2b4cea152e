"""BatchNorm statistics after a cut: means over the batches, whatever the module's momentum and the batch size are."""

from __future__ import annotations

import copy

import pytest
import torch
from nncf.common.logging import nncf_logger
from support.data_free import randn
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.batch_norm import check_batch
from nncf_compactprune.errors import DataError
from nncf_compactprune.plugins import default_plugins


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


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4)), "RuntimeError"),
        ((torch.zeros(4, 3, 8, 8, dtype=torch.float64), torch.zeros(4)), "RuntimeError"),
        ({"input": torch.zeros(4, 3, 8, 8), "idx": torch.arange(4), "labels": torch.zeros(4)}, "TypeError"),
        ((torch.zeros(4, 3, 8, 8).numpy(), torch.zeros(4)), "TypeError"),
        ((torch.zeros(4, 5, 8, 8), torch.zeros(4)), "RuntimeError"),
    ],
)
@pytest.mark.parametrize("initializer", [{}, {"refit": {}}])
def test_a_loader_that_the_network_does_not_run_on_is_refused_before_the_cut(batch, reason, initializer) -> None:
    model = network().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=rf"train_loader: Sequential does not run on its first batch: {reason}: "):
        prune(model, randn(2, 3, 8, 8), budget={"macs": 0.7}, train_loader=[batch], initializer=initializer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_looking_at_the_first_batch_leaves_random_states_and_iterators_alone() -> None:
    images = randn(32, 3, 8, 8)
    data = torch.utils.data.TensorDataset(images, torch.zeros(32, dtype=torch.int64))
    torch.manual_seed(3)
    expected = torch.rand(1)
    for loader in (iter([(images, None)]), torch.utils.data.DataLoader(data, 8, shuffle=True)):
        context = Context(network(), images[:2], default_plugins(), loader)
        torch.manual_seed(3)
        check_batch(context)
        assert torch.equal(torch.rand(1), expected)
        assert len(list(context.batches())) in (1, 4)


def test_a_loader_that_gives_nothing_is_told(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(nncf_logger, "warning", said.append)
    prune(network().eval(), randn(2, 3, 8, 8), budget={"macs": 0.7}, train_loader=[])
    assert said == ["BatchNorm statistics are not adapted after pruning: train_loader gave no batch."]
