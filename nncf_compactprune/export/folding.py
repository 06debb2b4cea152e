"""Quantized weights in an ONNX file: stored as INT8, with the BatchNorm behind them folded in.

torch's exporter leaves weights in float with a pair of operations behind them. Runtimes compute in INT8 where a
convolution's weight is a constant behind one DequantizeLinear, and where nothing stands between the convolution and the
next quantizer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from nncf_compactprune.export.prepared import Array

EXTREMES = {"ReduceMax", "ReduceMin", "GlobalMaxPool"}


class _Graph:
    """A graph with its constants and the nodes that make its values."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.constants = {one.name: one for one in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.readers = Counter(name for node in self.graph.node for name in node.input)
        self.readers.update(port.name for port in self.graph.output)

    def value(self, name: str) -> Array | None:
        """A constant's value, None for what is computed."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def add(self, name: str, value: Array) -> str:
        """A new constant."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def remove(self, node: NodeProto) -> None:
        """A node that nothing reads any more."""
        self.graph.node.remove(node)

    def drop_unread(self) -> None:
        """Constants that nothing reads any more go."""
        read = {name for node in self.graph.node for name in node.input}
        kept = [one for one in self.graph.initializer if one.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def folded(model: ModelProto) -> ModelProto:
    """Stores quantized weights as INT8 and folds BatchNorms into them, in place; the same function is computed.

    :param model: with ``QuantizeLinear`` and ``DequantizeLinear`` on its weights.
    :return: the model.
    """
    graph = _Graph(model)
    for node in [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]:
        _store(graph, node)
    for node in [node for node in graph.graph.node if node.op_type == "BatchNormalization"]:
        _fold(graph, node)
    for node in [node for node in graph.graph.node if node.op_type in EXTREMES]:
        _keep_quantizer_behind(graph, node)
    graph.drop_unread()
    return model


def _keep_quantizer_behind(graph: _Graph, node: NodeProto) -> None:
    """Puts a maximum with the lowest number behind one over axes, which changes nothing: OpenVINO (2026.4, on CPUs)
    computes that wrongly in one with the quantizer behind."""
    name = node.output[0]
    node.output[0] = f"{name}.extreme"
    lowest = graph.add(f"{name}.lowest", np.array(np.finfo(np.float32).min, np.float32))
    guard = helper.make_node("Max", [node.output[0], lowest], [name])
    graph.graph.node.insert(list(graph.graph.node).index(node) + 1, guard)


def _store(graph: _Graph, node: NodeProto) -> None:
    """Rounds a constant that a QuantizeLinear reads."""
    weight, scale, zero = (graph.value(name) for name in node.input)
    if weight is None or scale is None or zero is None:
        return
    axis = _attribute(node, "axis", 1)
    shape = [1] * weight.ndim
    if scale.ndim and scale.size > 1:
        shape[axis] = scale.size
    low, high = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
    levels = np.rint(weight / scale.reshape(shape)) + zero.astype(np.int32).reshape(shape)
    name = graph.add(f"{node.input[0]}.int8", np.clip(levels, low, high).astype(zero.dtype))
    for reader in graph.graph.node:
        for at, used in enumerate(reader.input):
            if used == node.output[0]:
                reader.input[at] = name
    graph.remove(node)


def _fold(graph: _Graph, norm: NodeProto) -> None:
    """Folds a BatchNorm into the convolution in front of it, whose weight is INT8 around zero: steps take its factors,
    levels their signs."""
    convolution = graph.producers.get(norm.input[0])
    if convolution is None or convolution.op_type != "Conv" or graph.readers[norm.input[0]] > 1:
        return
    dequantize = graph.producers.get(convolution.input[1])
    statistics = [graph.value(name) for name in norm.input[1:]]
    bias = graph.value(convolution.input[2]) if len(convolution.input) > 2 else np.float32(0)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or bias is None:
        return
    levels, scale, zero = (graph.value(name) for name in dequantize.input)
    if levels is None or scale is None or zero is None or zero.any() or any(one is None for one in statistics):
        return
    if levels.dtype != np.int8 or (levels == -128).any():  # -128 has no opposite
        return
    gamma, beta, mean, variance = (np.asarray(one, np.float64) for one in statistics)
    factor = gamma / np.sqrt(variance + _attribute(norm, "epsilon", 1e-5))
    name = norm.output[0]
    signs = np.where(factor < 0, -1, 1).astype(np.int8).reshape(-1, *[1] * (levels.ndim - 1))
    step = np.broadcast_to(scale, factor.shape) * np.abs(factor)
    # A channel that the BatchNorm switches off has no step; its levels are 0 then.
    step, dead = np.where(step > 0, step, 1), (step <= 0).reshape(signs.shape)
    inputs = [
        graph.add(f"{name}.levels", np.where(dead, np.int8(0), levels * signs)),
        graph.add(f"{name}.scale", step.astype(np.float32)),
        graph.add(f"{name}.zero", np.zeros(factor.shape, np.int8)),
    ]
    graph.add(f"{name}.bias", (beta + (np.asarray(bias, np.float64) - mean) * factor).astype(np.float32))
    weight = helper.make_node("DequantizeLinear", inputs, [f"{name}.weight"], axis=0)
    new = helper.make_node("Conv", [convolution.input[0], f"{name}.weight", f"{name}.bias"], [name])
    new.attribute.extend(convolution.attribute)
    at = list(graph.graph.node).index(norm)
    graph.graph.node.insert(at, new)
    graph.graph.node.insert(at, weight)
    graph.producers[name] = new
    graph.remove(norm)
    graph.remove(convolution)
    if graph.readers[convolution.input[1]] == 1:
        graph.remove(dequantize)


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = [helper.get_attribute_value(one) for one in node.attribute if one.name == name]
    return found[0] if found else default
