"""``initializer.refit``: a start that is nearer to the dense network, behind every pruning algorithm."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.data_free import randn, state, unchanged, with_statistics_of
from support.networks import images, trained
from torch import nn

from nncf_compactprune import create_compressed_model, plan_of, prune
from nncf_compactprune.algorithms.base import CompressionStage, Context
from nncf_compactprune.algorithms.batch_norm import adapt_batch_norm
from nncf_compactprune.algorithms.channel_pruning import algorithm as channel_pruning
from nncf_compactprune.algorithms.data_free.reconstruction import Reconstruction
from nncf_compactprune.algorithms.data_free.refit import RefitConfig
from nncf_compactprune.errors import ConfigError, DataError, DataFreeError
from nncf_compactprune.plugins import default_plugins

X = images(torch.float32)
DATA = F.avg_pool2d(randn(256, 3, 24, 24), 2) * 3
LABELS = torch.arange(256) % 4
LOADER = list(zip(DATA.split(64), LABELS.split(64), strict=True))


def network(name: str = "residual") -> nn.Module:
    return with_statistics_of(trained(name, dtype=torch.float32), DATA)


@torch.no_grad()
def distance(dense: nn.Module, model: nn.Module) -> float:
    expected = dense.eval()(DATA)
    return float((model.eval()(DATA) - expected).square().mean() / expected.var(0).mean())


@pytest.mark.parametrize("name", ["residual", "depthwise", "squeeze_excite"])
@pytest.mark.parametrize("algorithm", ["fbnet_pruning", "catro"])
def test_a_refit_is_nearer_to_the_dense_network_than_statistics_alone_bring_it(name: str, algorithm: str) -> None:
    dense = network(name)
    found = {}
    ways = {"adapted": None, "held": {"refit": {"ridge": 1e9}}, "re-fitted": {"refit": {}}}
    for way, initializer in ways.items():
        model = copy.deepcopy(dense)
        prune(model, X, algorithm, budget={"macs": 0.6}, round_to=1, train_loader=LOADER, initializer=initializer)
        found[way] = distance(dense, model)
    assert found["re-fitted"] < 0.8 * min(found["adapted"], found["held"]), found


def test_generated_images_need_no_loader() -> None:
    dense, model = network(), network()
    prune(model, X, budget={"macs": 0.6}, round_to=1, initializer={"refit": {"source": "inversion", "num_samples": 64}})
    alone = copy.deepcopy(dense)
    prune(alone, X, budget={"macs": 0.6}, round_to=1)
    assert distance(dense, model) < 0.7 * distance(dense, alone)


def test_a_config_refits_reports_and_an_ema_copy_follows() -> None:
    model = network()
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"schedule": "one_shot", "round_to": 1}}
    document = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": {**entry, "initializer": {"refit": {"num_samples": 128}}},
    }
    ctrl, _ = create_compressed_model(model, document, LOADER)
    said = ctrl.statistics().to_str()
    before, after = map(float, re.search(r"([\d.]+) -> ([\d.]+)", said).groups())  # type: ignore[union-attr]
    assert after < before
    assert "layers re-fitted" in said

    model, optimizer = network(), None
    ema = copy.deepcopy(model)
    prune(model, X, budget={"macs": 0.6}, round_to=1, train_loader=LOADER, ema=ema, optimizer=optimizer,
          initializer={"refit": {"num_samples": 128}})  # fmt: skip
    assert torch.equal(model.eval()(X), ema.eval()(X))


def test_batchnorm_adaptation_follows_a_refit_only_where_it_is_written_down() -> None:
    means = []
    for more in ({}, {"batchnorm_adaptation": {"num_bn_adaptation_samples": 64}}):
        model = network()
        initializer = {"refit": {"num_samples": 256}, **more}
        prune(model, X, budget={"macs": 0.6}, round_to=1, train_loader=LOADER, initializer=initializer)
        means.append(torch.cat([m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]))
    assert not torch.equal(*means)


def test_fewer_images_where_they_are_large() -> None:
    def images_of(size: int) -> int | None:
        context = Context(nn.Flatten(), torch.zeros(1, 3, size, size), default_plugins())
        return RefitConfig().generation(context).samples

    assert [images_of(size) for size in (32, 64, 128, 224, 640)] == [2000, 2000, 1000, 1000, 218]


@pytest.mark.parametrize(
    ("initializer", "params", "error", "says"),
    [
        ({"refit": {}}, {}, DataError, 'no train_loader was given. Give one, or use "source": "inversion"'),
        ({"refit": {}}, {"schedule": "exponential"}, ConfigError, 'a schedule leaves no dense layers: set "schedule"'),
        ({"refit": {"samples": 3}}, {}, ConfigError, "initializer.refit.samples: unknown key"),
        ({"refit": {"source": "inversions"}}, {}, ConfigError, 'expected one of "dataset", "inversion"'),
    ],
)
def test_wrong_input_is_told_before_the_cut(initializer, params, error, says) -> None:
    model = network()
    before = state(model)
    with pytest.raises(error, match=re.escape(says)):
        prune(model, X, budget={"macs": 0.6}, round_to=1, initializer=initializer, **params)
    assert unchanged(model, before)


def test_words_are_not_generated() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    before = state(model)
    with pytest.raises(DataFreeError, match=r"one floating tensor \[n, ...\], but this one takes \[2, 5\] int64"):
        prune(
            model, torch.zeros(2, 5, dtype=torch.int64), budget={"macs": 0.6},
            initializer={"refit": {"source": "inversion"}},
        )  # fmt: skip
    assert unchanged(model, before)


def contents(*networks: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for network in networks for tensor in network.state_dict().values()]


@pytest.mark.parametrize("initializer", [{"refit": {"num_samples": 64}}, None])
def test_a_refit_or_adaptation_that_fails_leaves_the_network_whole(
    initializer: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(work: Callable[..., None]) -> Callable[..., None]:
        def fails(*args: Any, **kwargs: Any) -> None:
            work(*args, **kwargs)
            msg = "no more memory"
            raise RuntimeError(msg)

        return fails

    monkeypatch.setattr(Reconstruction, "run", failing(Reconstruction.run))
    monkeypatch.setattr(channel_pruning, "adapt_batch_norm", failing(adapt_batch_norm))
    model = network()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    F.cross_entropy(model(DATA), LABELS).backward()
    optimizer.step()
    before, steps = contents(model, ema), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no more memory"):
        prune(model, X, budget={"macs": 0.6}, round_to=1, train_loader=LOADER, ema=ema, optimizer=optimizer,
              initializer=initializer)  # fmt: skip
    assert plan_of(model) is None
    assert all(map(torch.equal, contents(model, ema), before))
    assert all(
        torch.equal(state["momentum_buffer"], steps["state"][at]["momentum_buffer"])
        for at, state in optimizer.state_dict()["state"].items()
    )


def test_an_adaptation_that_fails_behind_a_schedule_leaves_the_masks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: Context, samples: int, *, asked_for: bool = False) -> None:
        msg = "no more memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(channel_pruning, "adapt_batch_norm", fails)
    model = network()
    params = {"schedule": "exponential", "pruning_steps": 2, "round_to": 1}
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": params}
    ctrl, _ = create_compressed_model(
        model, {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}, LOADER
    )
    ema = copy.deepcopy(model)
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.1), ema=ema)
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    before, outputs = contents(model, ema), [net.eval()(X) for net in (model, ema)]
    with pytest.raises(RuntimeError, match="no more memory"):
        ctrl.scheduler.epoch_step()
    assert ctrl.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    assert all(map(torch.equal, contents(model, ema), before))
    assert all(map(torch.equal, [net(X) for net in (model, ema)], outputs))
    monkeypatch.undo()
    ctrl.scheduler.epoch_step()
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
