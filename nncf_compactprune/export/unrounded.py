"""Quantized files and their networks without the rounding of activations, which are only cut off at the ends of their
ranges: both then compute the same to a float's precision.

Where a value lies on the border of two levels, a runtime may take the other one, and every layer behind it then meets
other borders. With few levels a right file ends as far from torch as one with two channels exchanged. Without rounding
nothing hides a wrong weight; and the ranges of the quantizers are compared one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from openvino import opset13
from torch import nn

from nncf_compactprune.export.branches import FromInputs
from nncf_compactprune.export.prepared import Array, FlatModel, ModelInputs
from nncf_compactprune.host.calls import unmarked
from nncf_compactprune.host.nncf_hooks import hooks

RANGE_TOLERANCE = 1e-3  # of the range: a zero point that is wrong by one level moves it by 4e-3


@dataclass(frozen=True)
class Range:
    """What an activation's quantizer can give.

    :param where: its name in the file or the network.
    :param low: smallest value, one for each channel or one for all.
    :param high: largest value, of the same size.
    """

    where: str
    low: Array
    high: Array

    def __str__(self) -> str:
        return f"[{self.low.min():.6g}, {self.high.max():.6g}]"

    def like(self, other: Range) -> bool:
        """Whether both give the same."""
        if self.low.size != other.low.size:
            return False
        near = RANGE_TOLERANCE * (other.high - other.low)
        return bool((abs(self.low - other.low) <= near).all() and (abs(self.high - other.high) <= near).all())


def can_do_without_rounding(model: nn.Module) -> bool:
    """Whether all quantizers of a model are this package's. Those of ``nncf.strip`` round, or do nothing.

    :param model: any.
    """
    found = [one.module for one in hooks(model) if isinstance(one.module, torch.ao.quantization.FakeQuantizeBase)]
    return bool(found) and all(hasattr(one, "levels") for one in found)


@contextmanager
def without_rounding(flat: FlatModel, inputs: ModelInputs) -> Iterator[list[Range]]:
    """A quantized network whose activations are not rounded; yields the ranges of their quantizers.

    :param flat: with quantizers of this package. What does not depend on the inputs stays rounded, as in the files.
    :param inputs: a batch, on which it runs once.
    """
    found = [(hook.key, hook.module) for hook in hooks(flat.model)]
    quantizers = [(name, one) for name, one in found if isinstance(one, torch.ao.quantization.FakeQuantizeBase)]
    computed, activations = FromInputs(inputs.tensors), set()

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given[0] in computed:
            activations.add(module)

    with ExitStack() as notes, unmarked(flat.model), torch.no_grad(), computed:
        for _, quantizer in quantizers:
            notes.callback(quantizer.register_forward_pre_hook(note).remove)
        flat(*computed.inputs)
    quantizers = [(name, one) for name, one in quantizers if one in activations]
    try:
        for _, quantizer in quantizers:
            quantizer.enable_fake_quant(False)
        yield [_range_of(name, quantizer) for name, quantizer in quantizers]
    finally:
        for _, quantizer in quantizers:
            quantizer.enable_fake_quant()


def _range_of(name: str, module: Any) -> Range:
    low, high = module.levels
    scale, zero = (one.detach().cpu().double().numpy().reshape(-1) for one in (module.scale, module.zero_point))
    return Range(name, (low - zero) * scale, (high - zero) * scale)


def onnx_without_rounding(model: onnx.ModelProto) -> list[Range]:
    """Puts a maximum and a minimum in the place of every quantizer of activations of an ONNX model, in place.

    :return: the quantizers' ranges.
    """
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    shaped = onnx.shape_inference.infer_shapes(model).graph
    dims = {one.name: len(one.type.tensor_type.shape.dim) for one in [*shaped.value_info, *shaped.input]}
    ranges, source, nodes = [], {}, []
    computed = {one.name for one in graph.input} - constants.keys()
    for node in graph.node:
        if not computed.isdisjoint(node.input):
            computed.update(node.output)
        if node.op_type == "QuantizeLinear" and node.input[0] in computed:
            scale, *given = (numpy_helper.to_array(constants[name]) for name in node.input[1:])
            zero = given[0] if given else np.zeros(1, np.uint8)
            ends = np.iinfo(zero.dtype)
            low, high = (((end - zero.astype(np.float64)) * scale).reshape(-1) for end in (ends.min, ends.max))
            ranges.append(Range(node.name or node.output[0], low, high))
            axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
            shape = [1] * dims.get(node.input[0], 4)
            if low.size > 1:
                shape[axis] = low.size
            names = [f"{node.output[0]}.{end}" for end in ("low", "high", "raised")]
            for name, end in zip(names, (low, high), strict=False):
                graph.initializer.append(numpy_helper.from_array(end.astype(np.float32).reshape(shape), name))
            nodes.append(onnx.helper.make_node("Max", [node.input[0], names[0]], [names[2]]))
            source[node.output[0]] = names[1:]
        elif node.op_type == "DequantizeLinear" and node.input[0] in source:
            high_name, raised = source[node.input[0]]
            nodes.append(onnx.helper.make_node("Min", [raised, high_name], [node.output[0]]))
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [one for one in graph.initializer if one.name in read]
    for part, new in ((graph.node, nodes), (graph.initializer, kept)):
        del part[:]
        part.extend(new)
    return ranges


def ir_without_rounding(model: Any) -> list[Range]:
    """The same for an OpenVINO model."""
    ranges, nodes = [], model.get_ordered_ops()
    computed: set[str] = set()
    for node in nodes:
        givers = {port.get_node().get_name() for port in node.input_values()}
        if node.get_type_name() == "Parameter" or not computed.isdisjoint(givers):
            computed.add(node.get_name())
    for node in [node for node in nodes if node.get_type_name() == "FakeQuantize"]:
        given, *bounds = node.input_values()
        constant = all(port.get_node().get_type_name() == "Constant" for port in bounds)
        if node.get_name() not in computed or not constant:
            continue
        taken_low, taken_high, low, high = (np.asarray(port.get_node().data, np.float64) for port in bounds)
        ranges.append(Range(node.get_friendly_name(), low.reshape(-1), high.reshape(-1)))
        cut_off = opset13.minimum(opset13.maximum(given, bounds[0]), bounds[1])
        # OpenVINO lets a quantizer multiply: it takes another range than it gives.
        width, given_width = np.broadcast_arrays(taken_high - taken_low, high - low)
        factor = np.divide(given_width, width, out=np.zeros_like(width), where=width > 0)
        if not (np.allclose(factor, 1) and np.allclose(low, taken_low)):
            scaled = opset13.multiply(cut_off, opset13.constant(factor.astype(np.float32)))
            cut_off = opset13.add(scaled, opset13.constant((low - taken_low * factor).astype(np.float32)))
        node.output(0).replace(cut_off.output(0))
    return ranges


def unlike(file: Sequence[Range], network: Sequence[Range]) -> str | None:
    """A quantizer of a file that the network does not have, in words; None where all are there.

    :param file: ranges of the file; a runtime's format may leave quantizers out that change nothing.
    :param network: ranges of the network.
    """
    for one in file:
        if not any(one.like(other) for other in network):
            return f"the quantizer '{one.where}' has the range {one}, which none of the network has"
    return None
