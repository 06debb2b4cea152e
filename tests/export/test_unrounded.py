"""Quantized files are compared without rounding activations: wrong ones are found, right ones of few bits pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import numpy_helper
from openvino.utils import replace_node
from support.networks import labelled_batches, model32
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import export_model, verify_export
from nncf_compactprune.serving.reference import TorchSide
from nncf_compactprune.serving.verify import verify_served

ENTRIES = {
    "W8A8": {"algorithm": "quantization", "preset": "mixed", "params": {"start_epoch": None}},
    "W4A4": {
        "algorithm": "data_free_quantization",
        "params": {"weight_bits": 4, "activation_bits": 4},
        "generation": {"source": "dataset", "samples": 32},
    },
}


@pytest.fixture(scope="module", params=ENTRIES)
def quantized(request, tmp_path_factory) -> tuple[nn.Module, torch.Tensor, Path]:
    torch.manual_seed(0)
    model, batches = model32("residual"), labelled_batches()
    example = batches[0][0][:2]
    config = {"input_info": {"sample_size": list(example.shape)}, "compression": ENTRIES[request.param]}
    controller, model = create_compressed_model(model, config, batches)
    model, folder = controller.strip().eval(), tmp_path_factory.mktemp(request.param)
    export_model(model, example, folder)
    return model, batches[0][0], folder


def exchanged_onnx(path: Path, target: Path) -> None:
    """Two inputs of the third convolution."""
    proto = onnx.load(path)
    convolution = [node for node in proto.graph.node if node.op_type == "Conv"][2]
    dequantize = next(node for node in proto.graph.node if node.output[0] == convolution.input[1])
    levels = next(one for one in proto.graph.initializer if one.name == dequantize.input[0])
    value = numpy_helper.to_array(levels).copy()
    value[:, [0, 1]] = value[:, [1, 0]]
    levels.CopyFrom(numpy_helper.from_array(value, levels.name))
    onnx.save(proto, target)


def other_zero_onnx(path: Path, target: Path) -> None:
    """The zero point of one activation, by one level."""
    proto = onnx.load(path)
    constants = {one.name: one for one in proto.graph.initializer}
    pairs = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    zero = numpy_helper.to_array(constants[pairs[1].input[2]])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(zero + 1, zero.dtype), "other"))
    for node in proto.graph.node:
        if node is pairs[1] or node.input[0] == pairs[1].output[0]:
            node.input[2] = "other"
    onnx.save(proto, target)


def exchanged_ir(path: Path, target: Path) -> None:
    model = openvino.Core().read_model(path)
    constant = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"][2].input_value(1)
    while constant.get_node().get_type_name() != "Constant":
        constant = constant.get_node().input_value(0)
    value = constant.get_node().data.copy()
    value[:, [0, 1]] = value[:, [1, 0]]
    replace_node(constant.get_node(), openvino.op.Constant(value))
    openvino.save_model(model, target, compress_to_fp16=False)


def other_zero_ir(path: Path, target: Path) -> None:
    model = openvino.Core().read_model(path)
    node = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"][1]
    ends = [node.input_value(at).get_node() for at in range(1, 5)]
    step = (ends[1].data - ends[0].data) / 255
    for end in {id(one): one for one in ends}.values():
        replace_node(end, openvino.op.Constant((end.data - step).astype(np.float32)))
    openvino.save_model(model, target, compress_to_fp16=False)


BREAKS = [
    ("model_int8.onnx", exchanged_onnx, "without the rounding of activations"),
    ("model_int8.onnx", other_zero_onnx, "which none of the network has"),
    ("model_int8.xml", exchanged_ir, "without the rounding of activations"),
    ("model_int8.xml", other_zero_ir, "which none of the network has"),
]


@pytest.mark.parametrize("name", ["model_int8.onnx", "model_int8.xml"])
def test_a_right_file_passes_and_the_network_rounds_on(name: str, quantized) -> None:
    model, images, folder = quantized
    with torch.no_grad():
        before = model(images)
        assert verify_export(model, folder / name, images[:2]).runtime
        check = verify_served(folder / name, TorchSide(model, images[:2]))
        assert check.passed, check.problems
        assert check.tolerance is None
        assert torch.equal(model(images), before)


@pytest.mark.parametrize(("name", "damage", "message"), BREAKS, ids=[one[1].__name__ for one in BREAKS])
def test_a_wrong_file_is_found(
    name: str, damage: Callable[[Path, Path], None], message: str, quantized, tmp_path: Path
) -> None:
    model, images, folder = quantized
    damage(folder / name, tmp_path / name)
    with pytest.raises(ExportError, match=message):
        verify_export(model, tmp_path / name, images[:2])
    labels = copy.deepcopy(model)(images).argmax(1)
    for side in (TorchSide(model, images[:2]), TorchSide(model, images[:2], images, labels, batch_size=8)):
        check = verify_served(tmp_path / name, side, max_drop=1.0)
        assert message in " ".join(check.problems)


class WithTable(nn.Module):
    """Multiplies by a table that is a buffer, as of cosines; NNCF quantizes it as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        table = torch.randn(16, 16)
        table[0] = 100  # coarse levels, while what is multiplied by it is 0
        self.register_buffer("table", table)
        for parameter in self.first.parameters():
            parameter.data[0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(torch.relu(self.first(x)) @ self.table))


@pytest.fixture(scope="module")
def with_table() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 6), torch.zeros(8, dtype=torch.long)) for _ in range(4)]
    config = {"input_info": {"sample_size": [8, 6]}, "compression": {"algorithm": "quantization"}}
    controller, _ = create_compressed_model(WithTable(), config, batches)
    return controller.strip().eval(), batches[0][0]


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_buffers_that_are_quantized_stay_rounded_in_both(
    name: str, with_table: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    model, images = with_table
    export_model(model, images, tmp_path / name)
    check = verify_served(tmp_path / name, TorchSide(model, images))
    assert not check.problems


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_a_quantized_file_that_does_not_run_is_told_not_raised(
    name: str, with_table: tuple[nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    export_model(*with_table, tmp_path / name)
    wider = copy.deepcopy(with_table[0])
    wider.first = nn.Linear(7, 16)
    problems = verify_served(tmp_path / name, TorchSide(wider, torch.randn(2, 7))).problems
    assert any("fails on inputs [[" in one for one in problems)
