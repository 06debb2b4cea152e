"""Whether a runtime's INT8 sums saturate on this machine.

With AVX2, or AVX-512 without VNNI, x86 processors add two products of 8 bits in 16, and what does not fit is cut off.
Whether that happens depends on the processor and on what a runtime makes of it, so it is tried: one convolution whose
inputs and weights are the largest there are.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.server import Server, Serving

CHANNELS, SIDE = 16, 8
MOST = CHANNELS * 9  # what a place gets whose 3 x 3 neighbours are all 1, as all weights are
REMEDY = (
    "The INT8 sums of this runtime saturate on this processor, which lacks VNNI. Quantize with "
    '"overflow_fix": "enable", or serve elsewhere.'
)


def saturates(server: Server) -> bool:
    """Whether sums of the largest products come out too small where a file is served.

    :param server: of an ONNX or OpenVINO file; others are not tried.
    """
    return server.path.suffix in (".onnx", ".xml") and _saturates(server.path.suffix, server.serving.device)


@cache
def _saturates(suffix: str, device: str) -> bool:
    return largest_sum(suffix, device) < 0.9 * MOST


def largest_sum(suffix: str, device: str, level: int = 127) -> float:
    """What a convolution gives where all inputs and weights are 1; ``MOST`` if nothing saturates.

    :param suffix: ``.onnx`` or ``.xml``, which chooses the runtime.
    :param device: of the runtime.
    :param level: the integer that stands for a weight of 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save_model(_convolution(level), file)
        if suffix == ".xml":
            model, file = openvino.Core().read_model(file), file.with_suffix(suffix)
            openvino.save_model(model, file, compress_to_fp16=False)
        served = open_server(file, Serving(device=device))
        (sums,) = served.run([np.ones((1, CHANNELS, SIDE, SIDE), np.float32)])
        return float(sums[0, 0, 2, 2])


def _convolution(level: int) -> onnx.ModelProto:
    """A quantized one, in the way that runtimes compute in INT8."""
    shape = (1, CHANNELS, SIDE, SIDE)
    constants = {
        "weight": np.full((CHANNELS, CHANNELS, 3, 3), level, np.int8),
        "weight_scale": np.full(CHANNELS, 1 / level, np.float32),
        "weight_zero": np.zeros(CHANNELS, np.int8),
        "x_scale": np.float32(1 / 255),
        "y_scale": np.float32(1),
        "zero": np.uint8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_int"]),
        helper.make_node("DequantizeLinear", ["x_int", "x_scale", "zero"], ["x_back"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["x_back", "w"], ["sums"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["sums", "y_scale", "zero"], ["y_int"]),
        helper.make_node("DequantizeLinear", ["y_int", "y_scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    initial = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "saturation", ends[:1], ends[1:], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
