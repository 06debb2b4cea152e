"""NNCF 2.19's own config and ``create_compressed_model`` with the algorithms of this package.

Runs in an environment with NNCF 2.19 and ``NNCF_TORCH_LEGACY_TRACING=1``: ``make test-nncf219``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nncf_compactprune
from nncf_compactprune import CompactPruneError, ConfigError, plan_of
from nncf_compactprune.host.nncf_versions import IS_NNCF_2

if not IS_NNCF_2 or not os.environ.get("NNCF_TORCH_LEGACY_TRACING"):
    pytest.skip("needs NNCF 2.19 and NNCF_TORCH_LEGACY_TRACING=1: make test-nncf219", allow_module_level=True)

from nncf import NNCFConfig
from nncf.torch import create_compressed_model, load_state, register_default_init_args
from support.networks import IMAGE, depthwise, model32, residual

from nncf_compactprune.host.nncf_hooks import hook_parameter, unwrap_if_empty
from nncf_compactprune.host.nncf_quantization import not_compiled
from nncf_compactprune.integrations.nncf219 import CompactPruneController

LEGACY_TRACING = "NNCF_TORCH_LEGACY_TRACING"
HALF = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}
ONE_SHOT = {**HALF, "params": {"schedule": "one_shot", "round_to": 1}}
SOFT = {**HALF, "params": {"schedule": "exponential", "pruning_steps": 1, "round_to": 1}}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """NNCF's quantizers in torch's operations: its compiled extension takes a minute to build."""
    with not_compiled():
        yield


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader([(torch.randn(IMAGE[1:], generator=generator), i % 5) for i in range(20)], batch_size=10)


def config(*entries: dict[str, Any]) -> Any:
    document = {"input_info": {"sample_size": list(IMAGE)}, "compression": list(entries)}
    return register_default_init_args(NNCFConfig.from_dict(document), loader())


def compressed(model: nn.Module, *entries: dict[str, Any], state: Any = None) -> tuple[Any, Any]:
    return create_compressed_model(model, config(*entries), compression_state=state, dump_graphs=False)


def train(ctrl: Any, model: nn.Module, epochs: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    for child in getattr(ctrl, "child_ctrls", [ctrl]):
        if isinstance(child, CompactPruneController) and epochs > 2:
            child.attach(optimizer=optimizer)
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for images, labels in loader():
            ctrl.scheduler.step()
            loss = nn.functional.cross_entropy(model(images), labels) + ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return optimizer


def weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "_nncf" not in name and "pre_ops" not in name)


def probe() -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))


def close(left: Tensor, right: Tensor) -> bool:
    left, right = left.detach(), right.detach()
    return float((left - right).abs().max() / right.abs().max()) < 1e-5


def test_a_config_file_is_taken_and_the_network_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"input_info": {"sample_size": list(IMAGE)}, "compression": SOFT}))
    model = model32()
    dense, names = weights(model), set(model.state_dict())
    ctrl, model = create_compressed_model(
        model, register_default_init_args(NNCFConfig.from_json(str(path)), loader()), dump_graphs=False
    )
    train(ctrl, model)
    assert ctrl.compression_stage().name == "FULLY_COMPRESSED"
    assert weights(model) == dense  # masked as yet
    masked = model(probe())
    assert not close(masked, model32()(probe()))
    assert "fbnet_pruning" in ctrl.statistics().to_str()
    small = ctrl.strip()
    assert weights(small) < 0.7 * dense
    assert close(small.eval()(probe()), masked)
    assert names <= set(small.state_dict())
    assert not any("hooks" in name for name in small.state_dict())
    ctrl.export_model(str(tmp_path / "small.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: probe()[:1].numpy()})
    assert close(torch.from_numpy(found), masked[:1])


@pytest.mark.parametrize(
    ("build", "order"), [(residual, (SOFT, QUANTIZATION)), (depthwise, (QUANTIZATION, SOFT))], ids=["first", "last"]
)
def test_scales_of_nncfs_quantizers_follow(build: Any, order: tuple[dict[str, Any], ...]) -> None:
    torch.manual_seed(0)
    ctrl, model = compressed(build().float(), *order)
    train(ctrl, model)
    masked, dense = model(probe()), weights(model)
    small = ctrl.strip()
    assert weights(small) < dense
    assert close(small(probe()), masked)
    layers = [(m, op.op) for m in model.modules() if hasattr(m, "pre_ops") for op in m.pre_ops.values()]
    assert len(layers) > 3
    assert all(quantizer.scale.shape[0] == layer.weight.shape[0] for layer, quantizer in layers)
    assert all(tuple(quantizer.scale_shape) == tuple(quantizer.scale.shape) for _, quantizer in layers)


def test_cut_at_once_beside_quantization() -> None:
    ctrl, model = compressed(model32(), ONE_SHOT, QUANTIZATION)
    assert plan_of(model) is not None
    train(ctrl, model)
    before = model(probe())
    assert close(ctrl.strip()(probe()), before)


def test_it_shrinks_while_it_trains() -> None:
    ctrl, model = compressed(model32(), SOFT)
    dense = weights(model)
    optimizer = train(ctrl, model, epochs=3)
    assert weights(model) < 0.7 * dense
    states = [(p, optimizer.state[p]["momentum_buffer"]) for p in model.parameters() if p in optimizer.state]
    assert all(parameter.shape == momentum.shape for parameter, momentum in states)


def test_several_entries_are_one_list() -> None:
    factors = {"algorithm": "linear_overparameterization", "params": {"form": "factors", "expansion": 2}}
    ctrl, model = compressed(model32(), ONE_SHOT, factors)
    assert len(ctrl.child_ctrls) == 2
    train(ctrl, model)
    before = model(probe())
    small = ctrl.strip()
    assert close(small(probe()), before)
    assert weights(small) < weights(model32())
    assert {"fbnet_pruning", "linear_overparameterization"} <= {name for name, _ in ctrl.statistics()}


def test_catro_works() -> None:
    params = {"schedule": "one_shot", "samples_per_class": 2}
    ctrl, model = compressed(model32(), {"algorithm": "catro", "budget": {"macs": 0.5}, "params": params})
    before = model.eval()(probe())
    assert weights(model) < weights(model32())
    assert close(ctrl.strip()(probe()), before)


def test_a_run_resumes() -> None:
    ctrl, model = compressed(model32(), SOFT, QUANTIZATION)
    train(ctrl, model, epochs=3)
    state, weights_then, then = ctrl.get_compression_state(), model.state_dict(), model(probe())
    again_ctrl, again = compressed(model32(), SOFT, QUANTIZATION, state=state)
    load_state(again, weights_then, is_resume=True)
    assert close(again.eval()(probe()), then)
    assert again_ctrl.scheduler.get_state() == ctrl.scheduler.get_state()


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match=r"budgt.*Did you mean 'budget'"):
        compressed(model32(), {"algorithm": "fbnet_pruning", "budgt": {"macs": 0.5}})
    for name in ("data_free_quantization", "data_free_sparsity"):
        with pytest.raises(CompactPruneError, match=f"{name} does not go with"):
            compressed(model32(), {"algorithm": name})
    filters = {"algorithm": "filter_pruning", "params": {"pruning_target": 0.3}}
    for entries in ((HALF, filters), (filters, HALF)):
        with pytest.raises(CompactPruneError, match="fbnet_pruning does not go beside NNCF 2's filter_pruning"):
            compressed(model32(), *entries)


def test_data_free_pruning_goes_first_and_nncfs_quantization_after_it() -> None:
    entry = {"algorithm": "data_free_layerwise", "budget": {"macs": 0.6}, "params": {"round_to": 1}}
    document = {"input_info": {"sample_size": list(IMAGE)}, "compression": entry}
    ctrl, model = nncf_compactprune.create_compressed_model(model32(), document)
    small = ctrl.strip().eval()
    assert weights(small) < 0.8 * weights(model32())
    before = small(probe())
    _, model = compressed(small, QUANTIZATION)
    error = float((model.eval()(probe()) - before).abs().max() / before.abs().max())
    assert 0 < error < 0.2


@pytest.mark.parametrize("first", [True, False])
def test_nncfs_knowledge_distillation_beside(first: bool) -> None:
    """NNCF keeps the teacher inside the network, and the last loss, of which no copy can be taken."""
    taught = {"algorithm": "knowledge_distillation", "type": "softmax"}
    ctrl, model = compressed(model32(), *((taught, SOFT) if first else (SOFT, taught)))
    train(ctrl, model)
    small = ctrl.strip()
    assert weights(small) < 0.7 * weights(model32())
    assert small(probe()).shape == (len(probe()), 5)


def test_nncfs_own_algorithm_stays_nncfs() -> None:
    ctrl, _ = compressed(model32(), {"algorithm": "filter_pruning", "pruning_init": 0.5})
    assert type(ctrl).__module__.startswith("nncf.")


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_hooked_parameter_is_another_only_while_the_network_runs() -> None:
    wanted = model32("plain")
    _, network = compressed(model32("plain"), SOFT)
    name = "features.2.0.weight"
    with torch.no_grad():
        wanted.get_parameter(name).div_(2)
    parameter, before = network.get_parameter(name), network.eval()(probe())
    handle = hook_parameter(network, name, Half())
    assert close(network(probe()), wanted(probe()))
    assert network.get_parameter(name) is parameter
    assert "weight" not in vars(network.features[2][0])
    with pytest.raises(RuntimeError, match="expected input"):
        network(torch.randn(1, 5, 9, 9))
    assert "weight" not in vars(network.features[2][0])
    handle.remove()
    unwrap_if_empty(network)
    assert torch.equal(network(probe()), before)
    assert not network._forward_hooks


def test_without_legacy_tracing_the_remedy_is_told() -> None:
    environment = {key: value for key, value in os.environ.items() if key != LEGACY_TRACING}
    code = (
        "import nncf_compactprune, nncf.torch, torch; from nncf import NNCFConfig; "
        "entry = {'algorithm': 'fbnet_pruning', 'budget': {'macs': 0.5}}; "
        "config = NNCFConfig.from_dict({'input_info': {'sample_size': [1, 3, 8, 8]}, 'compression': entry}); "
        "nncf.torch.create_compressed_model(torch.nn.Conv2d(3, 8, 3), config)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert f"set {LEGACY_TRACING}=1 environment variable" in result.stderr.strip().splitlines()[-1]
