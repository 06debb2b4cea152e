"""Networks that are ``torch.fx.GraphModule``, as converters from ONNX give them, under compression."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import Classifier, ResidualBlock, conv_bn
from torch import Tensor, fx, nn

from nncf_compactprune import CompactPruneError, create_compressed_model, export_model, prune
from nncf_compactprune.host.tensors import carries_hooks

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LOADER = [(X, torch.arange(8) % 5)]
SCHEDULED = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"pruning_steps": 2, "round_to": 1}}


def network() -> fx.GraphModule:
    torch.manual_seed(0)
    plain = Classifier(nn.Sequential(conv_bn(3, 16), ResidualBlock(16, 16), conv_bn(16, 24)), 24)
    return fx.symbolic_trace(plain.eval())


def trained(model: nn.Module, *entries, attach: bool = True):
    ctrl, model = create_compressed_model(model, {"compression": list(entries)}, LOADER, example_inputs=X[:2])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    if attach:
        ctrl.attach(optimizer=optimizer)
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        loss = nn.functional.cross_entropy(model.train()(X), LOADER[0][1]) + ctrl.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ctrl, model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(X)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("attach", [False, True])
def test_a_graph_module_is_pruned_on_a_schedule_and_stays_one(attach: bool, tmp_path) -> None:
    model = network()
    dense = size(model)
    ctrl, same = trained(model, SCHEDULED, attach=attach)
    assert same is model
    assert carries_hooks(model) is not attach
    torch.testing.assert_close(outputs(copy.deepcopy(model)), outputs(model))  # its masks were lost in a copy
    ctrl.strip()
    assert isinstance(model, fx.GraphModule)
    assert size(model) < 0.75 * dense
    assert "features" in model.code
    torch.testing.assert_close(outputs(copy.deepcopy(model)), outputs(model))
    assert export_model(model, X, tmp_path / "model.xml")[0].verification is not None


@pytest.mark.parametrize(
    "entry",
    [{"algorithm": "magnitude_sparsity"}, {"algorithm": "quantization", "params": {"start_epoch": None}}],
    ids=lambda entry: entry["algorithm"],
)
def test_what_nncf_sends_elsewhere_works(entry) -> None:
    model = network()
    dense = outputs(model)
    ctrl, _ = trained(model, entry)
    ctrl.strip()
    torch.testing.assert_close(outputs(copy.deepcopy(model)), outputs(model))
    assert isinstance(model, fx.GraphModule) is (entry["algorithm"] != "quantization")  # quantizers stay, and are hooks
    assert 0 < float((outputs(model) - dense).norm() / dense.norm()) < 1


def test_at_once_and_where_it_fails() -> None:
    model = network()
    with pytest.raises(CompactPruneError, match="cannot be reached"):
        prune(model, X[:2], budget={"macs": 1e-6})
    assert isinstance(model, fx.GraphModule)
    prune(model, X[:2], budget={"macs": 0.5}, train_loader=LOADER)
    assert isinstance(model, fx.GraphModule)
