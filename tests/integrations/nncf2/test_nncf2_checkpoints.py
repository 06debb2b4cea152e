"""Checkpoints of NNCF 2.19 (``tools/nncf2_checkpoints.py``) give here what they gave there, and small networks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import images, labelled_batches, model32
from support.quantizers import ranges
from torch import Tensor, nn

from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_quantization import not_compiled
from nncf_compactprune.integrations.nncf2 import (
    NNCFConfig,
    create_compressed_model,
    load_state,
    register_default_init_args,
)

FOLDER = Path(__file__).parent / "checkpoints"
FILTERS = ["filters", "filters_at_once", "flops"]


def read(name: str) -> dict[str, Any]:
    return torch.load(FOLDER / f"{name}.pth")  # type: ignore[no-any-return]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(torch.float32))  # type: ignore[no-any-return]


def computes(model: nn.Module, expected: Tensor) -> None:
    """Outputs near one, as another processor rounds them."""
    torch.testing.assert_close(output(model), expected, rtol=0, atol=1e-6)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resumed(checkpoint: dict[str, Any], state: Any = "the checkpoint's") -> tuple[Any, nn.Module]:
    config = register_default_init_args(NNCFConfig.from_dict(checkpoint["config"]), labelled_batches())
    state = checkpoint["compression_state"] if state == "the checkpoint's" else state
    ctrl, model = create_compressed_model(model32(checkpoint["network"]), config, state, dump_graphs=False)
    load_state(model, checkpoint["state_dict"], is_resume=True)
    return ctrl, model


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("nncf")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "nncf"):
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", [*FILTERS, "filters_on_the_way", "magnitude", "learned", "three"])
def test_the_network_computes_what_it_computed_there(name: str) -> None:
    checkpoint = read(name)
    ctrl, model = resumed(checkpoint)
    computes(model, checkpoint["output"])
    assert not torch.allclose(output(model), output(model32(checkpoint["network"])), atol=1e-3)
    there = checkpoint["compression_state"]["ctrl_state"]
    (epoch,) = {part["scheduler_state"]["current_epoch"] for part in there.values()}
    assert ctrl.scheduler.current_epoch == epoch
    assert ctrl.child_ctrls[0].compression_stage() == min(part["compression_stage"] for part in there.values())


@pytest.mark.parametrize("name", FILTERS)
def test_the_small_network_computes_the_same(name: str) -> None:
    checkpoint = read(name)
    ctrl, model = resumed(checkpoint)
    small = ctrl.strip()
    computes(small, checkpoint["output"])
    assert size(small) < 0.75 * size(model32(checkpoint["network"]))
    computes(model, checkpoint["output"])  # strip took a copy


@pytest.mark.parametrize("name", FILTERS)
def test_training_goes_on_with_the_same_filters(name: str) -> None:
    ctrl, model = resumed(read(name))
    before = output(model)
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    ctrl.scheduler.epoch_step()
    assert ctrl.compression_stage() == CompressionStage.FULLY_COMPRESSED
    assert size(model) < 0.75 * size(model32(read(name)["network"]))
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-6)


def test_a_schedule_goes_on_where_it_was() -> None:
    ctrl, _ = resumed(read("filters_on_the_way"))
    assert ctrl.compression_rate == pytest.approx(0.25, abs=0.02)
    rates = []
    for _ in range(2):
        ctrl.scheduler.epoch_step()
        rates.append(ctrl.compression_rate)
    assert rates == pytest.approx([0.392, 0.5], abs=1e-3)


@pytest.mark.parametrize("name", ["magnitude", "learned"])
def test_sparsity_goes_on_where_it_was(name: str) -> None:
    ctrl, _ = resumed(read(name))
    before = ctrl.child_ctrls[0].algorithm.sparsity
    assert before > 0.1
    for _ in range(2):
        ctrl.scheduler.epoch_step()
    assert ctrl.compression_stage() == CompressionStage.FULLY_COMPRESSED
    masked = [p for name, p in ctrl.strip().named_parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in masked) / sum(p.numel() for p in masked)
    assert zeros == pytest.approx(ctrl.compression_rate if name == "magnitude" else before, abs=1e-3)


@pytest.mark.parametrize("name", [*FILTERS, "magnitude", "three"])
def test_a_plain_network_gets_the_zeros(name: str) -> None:
    checkpoint = read(name)
    model = model32(checkpoint["network"])
    load_state(model, checkpoint["state_dict"])
    computes(model, checkpoint["output"])


@pytest.mark.parametrize("name", ["filters", "flops"])
def test_weights_without_a_compression_state(name: str) -> None:
    checkpoint = read(name)
    ctrl, _ = resumed(checkpoint, None)
    assert ctrl.compression_stage() == CompressionStage.FULLY_COMPRESSED
    computes(ctrl.strip(), checkpoint["output"])


@pytest.mark.parametrize("name", ["shares", "shares_by_default"])
def test_a_share_of_the_filters_is_as_many_of_the_same_layers(name: str) -> None:
    """Fresh runs of one configuration there and here."""
    checkpoint = read(name)
    config = NNCFConfig.from_dict(checkpoint["config"])
    ctrl, _ = create_compressed_model(model32(checkpoint["network"]), config, dump_graphs=False)
    ctrl.disable_scheduler()
    ctrl.compression_rate = 0.5
    here = {n: p.shape[0] for n, p in ctrl.strip().named_parameters() if p.dim() == 4}
    there = {n: p.shape[0] for n, p in checkpoint["state_dict"].items() if n in here}
    dense = dict(there)
    for key, mask in checkpoint["state_dict"].items():
        layer, _, kind = key.partition(".pre_ops.")
        if kind.endswith("filter_pruning_mask") and f"{layer}.weight" in here:
            there[f"{layer}.weight"] = int(mask.sum())
    assert here == there != dense


def test_names_of_nncf_1() -> None:
    checkpoint = read("filters")
    renamed = {f"nncf_module.{k.replace('.op._', '.op.')}": v for k, v in checkpoint["state_dict"].items()}
    assert any(key.endswith("op.binary_filter_pruning_mask") for key in renamed)
    ctrl, model = resumed({**checkpoint, "state_dict": renamed})
    computes(model, checkpoint["output"])
    assert size(ctrl.strip()) < size(model)


def test_quantizers_begin_anew(log: pytest.LogCaptureFixture) -> None:
    ctrl, _ = resumed(read("three"))
    assert "Their ranges are measured anew" in log.text
    assert "NNCF 2.x's own quantizers are passed over" in log.text
    expected = read("three")["output"]
    with not_compiled():
        found = output(ctrl.strip())
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.05  # of eight bits


@pytest.mark.parametrize(
    ("format_", "suffix"), [(None, ".onnx"), pytest.param("openvino", ".xml", marks=pytest.mark.slow)]
)
def test_a_quantized_network_is_exported_where_it_was_asked_for(
    tmp_path: Path, format_: str | None, suffix: str
) -> None:
    pytest.importorskip("onnx")
    checkpoint = read("quantization")
    config = register_default_init_args(NNCFConfig.from_dict(checkpoint["config"]), labelled_batches())
    ctrl, _ = create_compressed_model(model32(checkpoint["network"]), config, dump_graphs=False)
    with not_compiled():
        (file,) = ctrl.export_model(tmp_path / "model", format_)
    assert file.path == tmp_path / f"model{suffix}"
    assert file.precision == "int8"


def test_quantizers_of_a_state_of_quantization_alone_are_measured_on_its_weights(log: pytest.LogCaptureFixture) -> None:
    checkpoint = read("quantization")
    with not_compiled():
        _, model = resumed(checkpoint)
        found = output(model)
    assert "Their ranges are measured anew" in log.text
    error = float((found - checkpoint["output"]).abs().max() / checkpoint["output"].abs().max())
    assert 0 < error < 0.05
    model = model32(checkpoint["network"])
    load_state(model, checkpoint["state_dict"])
    computes(model, checkpoint["output"])


@pytest.mark.parametrize("strict", [True, False])
def test_quantizers_beside_sparsity_are_measured_on_the_weights_that_are_loaded(strict: bool) -> None:
    checkpoint = read("magnitude")
    sparsity, quantization = checkpoint["config"]["compression"], {"algorithm": "quantization"}

    def compressed(model: nn.Module, *entries: dict[str, Any]) -> Any:
        config = NNCFConfig.from_dict({**checkpoint["config"], "compression": list(entries)})
        config = register_default_init_args(config, labelled_batches())
        return create_compressed_model(model, config, dump_graphs=False)[0]

    with not_compiled():
        ctrl = compressed(model32(checkpoint["network"]), *sparsity, quantization)
        before = ranges(ctrl.model)
        load_state(ctrl.model, checkpoint["state_dict"], is_resume=strict)
        loaded = model32(checkpoint["network"])
        load_state(loaded, checkpoint["state_dict"])
        expected = ranges(compressed(loaded, quantization).model)
        assert len(before) == len(expected)
        for key, value in ranges(ctrl.model).items():
            torch.testing.assert_close(value, expected[key])
        assert any(not torch.allclose(before[key], expected[key]) for key in before)
        found, stripped = output(ctrl.model), output(ctrl.strip())
    for result in (found, stripped):
        error = float((result - checkpoint["output"]).abs().max() / checkpoint["output"].abs().max())
        assert 0 < error < 0.05


def test_a_state_of_other_algorithms_is_refused() -> None:
    state = read("magnitude")["compression_state"]
    with pytest.raises(CompactPruneError, match=r"made it by \['magnitude_sparsity'\].*has \['filter_pruning'\]"):
        resumed(read("filters"), state)
