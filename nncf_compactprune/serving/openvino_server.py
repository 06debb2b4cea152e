"""OpenVINO IR as OpenVINO serves it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.options import Pixels
from nncf_compactprune.export.prepared import Array
from nncf_compactprune.serving.server import LayerTime, Server, Serving, Tap, Weight

_TYPES = {"f32": "f32", "bf16": "bf16", "bfloat16": "bf16", "f16": "f16", "float16": "f16", "float32": "f32"}
_PRODUCTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
_MODULE = "__module."
# Between a stored weight and the layer that uses it: conversion from int8 or float16, dequantization, layout.
_ON_THE_WAY = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "FakeQuantize", "FakeConvert")


class OpenVinoServer(Server):
    """Compiles for the device as :class:`Serving` says; everything it does not say is OpenVINO's default."""

    def __init__(self, path: Path, serving: Serving, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(path, serving)
        self.runtime = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        self._core = openvino.Core()
        device = serving.device.split(":")[0].split(".")[0]
        known = {"AUTO", *(one.split(".")[0] for one in self._core.available_devices)}
        if device not in known:
            hint = nearest(device.upper(), known)
            msg = f"{path}: OpenVINO has no device '{serving.device}' here, it has {sorted(known)}.{hint}"
            raise ExportError(msg)
        self._model = self._core.read_model(path)
        types = {node.get_type_name() for node in self._model.get_ops()}
        constants = [node for node in self._model.get_ops() if node.get_type_name() == "Constant"]
        self.quantized = "FakeQuantize" in types
        self.half_weights = any(node.get_output_element_type(0) == openvino.Type.f16 for node in constants)
        self.input_names = tuple(_name(port) for port in self._model.inputs)
        self.input_shapes = tuple(_shape(port) for port in self._model.inputs)
        self.input_types = tuple(np.dtype(port.get_element_type().to_dtype()).name for port in self._model.inputs)
        self.pixels = _pixels(self._model)
        if shapes is not None:
            # Served for single requests, a model has its shape fixed: an open one costs time of its own.
            self._model.reshape(
                {port: openvino.PartialShape(list(s)) for port, s in zip(self._model.inputs, shapes, strict=True)}
            )
        self._compiled = self._core.compile_model(self._model, serving.device, self._properties())
        self.precision = self._served_precision()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        results = self._compiled(list(arrays))
        return [np.array(results[position]) for position in range(len(self._compiled.outputs))]

    def request(self, arrays: Sequence[Array]) -> Callable[[], object]:
        request, given = self._compiled.create_infer_request(), list(arrays)
        return lambda: request.infer(given, share_inputs=True, share_outputs=True)

    def flood(self, arrays: Sequence[Array], seconds: float) -> tuple[int, float]:
        queue = openvino.AsyncInferQueue(self._compiled)  # as many requests as OpenVINO calls best
        for _ in range(len(queue)):
            queue.start_async(list(arrays))
        queue.wait_all()
        start, served = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            queue.start_async(list(arrays), share_inputs=True)
            served += 1
        queue.wait_all()
        return served, time.perf_counter() - start

    def taps(self, arrays: Sequence[Array]) -> list[Tap]:
        model = self._core.read_model(self.path)
        # Constants' own chains are folded when the model is compiled, and results are outputs already.
        computed, results = _computed(model), [port.get_node().input_value(0) for port in model.outputs]
        there = {(port.get_node().get_friendly_name(), port.get_index()): n for n, port in enumerate(results)}
        ports = [
            port
            for node in model.get_ordered_ops()
            if node.get_friendly_name() in computed
            for port in node.outputs()
            if port.get_element_type().is_real()
        ]
        keys = [(port.get_node().get_friendly_name(), port.get_index()) for port in ports]
        model.add_outputs([port for key, port in zip(keys, ports, strict=True) if key not in there])
        compiled = self._core.compile_model(model, self.serving.device, self._properties())
        values, added = compiled(list(arrays)), iter(range(len(results), len(compiled.outputs)))
        positions = [there[key] if key in there else next(added) for key in keys]
        return [
            Tap(key[0], port.get_node().get_type_name(), np.array(values[position], np.float32))
            for key, port, position in zip(keys, ports, positions, strict=True)
        ]

    def weights(self) -> Iterator[Weight]:
        for node in self._model.get_ordered_ops():
            if node.get_type_name() not in _PRODUCTS:
                continue
            for port in node.input_values()[1:] if node.get_type_name() != "MatMul" else node.input_values():
                constant = _constant(port.get_node())
                if constant is not None and port.get_partial_shape().is_static:
                    shape = _torch_shape(node, tuple(port.get_shape()))
                    names = (node.get_friendly_name(), constant.get_friendly_name())
                    macs, moved, side = _work_of(node, shape)
                    yield Weight(*names, shape, macs, moved, side, _module(node))

    def layer_times(self, arrays: Sequence[Array], runs: int, quantile: float = 0.5) -> list[LayerTime]:
        profiled = self._core.compile_model(
            self._model, self.serving.device, {**self._properties(), "PERF_COUNT": True}
        )
        request, given = profiled.create_infer_request(), list(arrays)
        taken: dict[str, list[float]] = {}
        kinds: dict[str, tuple[str, str]] = {}
        for run in range(runs + 2):
            request.infer(given)
            for info in request.profiling_info if run >= 2 else ():  # the first ones fill caches
                if str(info.status).endswith("EXECUTED"):
                    taken.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e6)
                    kinds[info.node_name] = (info.node_type, _executed_in(info.exec_type))
        return [LayerTime(name, *kinds[name], float(np.quantile(times, quantile))) for name, times in taken.items()]

    def _properties(self) -> dict[str, Any]:
        serving = self.serving
        properties: dict[str, Any] = {"PERFORMANCE_HINT": serving.hint.upper()}
        if serving.precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = serving.precision
        if serving.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = serving.threads
        if serving.streams is not None:
            properties["NUM_STREAMS"] = str(serving.streams)
        return properties

    def _served_precision(self) -> str:
        try:
            hint = str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        except RuntimeError:  # AUTO, and devices that do not say
            return self.serving.precision or "f32"
        return _TYPES.get(hint, "f32")


def _pixels(model: Any) -> Pixels | None:
    """What embedded preprocessing does: such a file of this package takes u8 images, and says mean and std."""
    ports, said = model.inputs, [["compactprune", key] for key in ("mean", "std")]
    pictures = len(ports) == 1 and ports[0].get_element_type() == openvino.Type.u8
    if not pictures or ports[0].get_node().layout != openvino.Layout("NHWC") or not all(map(model.has_rt_info, said)):
        return None
    mean, std = (tuple(map(float, model.get_rt_info(path).astype(str).split())) for path in said)
    return Pixels(mean, std)


def _executed_in(exec_type: str) -> str:
    """``brgemm_avx512_amx_I8`` says ``i8``."""
    said = exec_type.rpartition("_")[2].lower()
    return {"u8": "i8"}.get(said, said) if said in ("i8", "u8", "f32", "bf16", "f16") else ""


def _name(port: Any) -> str:
    node = str(port.get_node().get_friendly_name())
    return node if node in port.get_names() else str(port.get_any_name())


def _shape(port: Any) -> tuple[int | None, ...]:
    shape = port.get_partial_shape()
    return tuple(side.get_length() if side.is_static else None for side in shape) if shape.rank.is_static else (None,)


def _computed(model: Any) -> set[str]:
    """Names of the operations that depend on an input."""
    found: set[str] = set()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        depends = any(port.get_node().get_friendly_name() in found for port in node.input_values())
        if kind == "Parameter" or (depends and kind != "Result"):
            found.add(node.get_friendly_name())
    return found - {node.get_friendly_name() for node in model.get_parameters()}


def _work_of(node: Any, weight: tuple[int, ...]) -> tuple[int | None, int | None, int]:
    """Multiply-accumulates, numbers read and written, and height of the input."""
    ports = (node.input_value(0), node.output(0))
    if not all(port.get_partial_shape().is_static for port in ports):
        return None, None, 0
    given, result = (math.prod(port.get_shape()) for port in ports)
    places = given if node.get_type_name() == "ConvolutionBackpropData" else result
    shape = ports[0].get_shape()
    side = int(shape[2]) if len(shape) == 4 and node.get_type_name() == "Convolution" else 0
    return places * math.prod(weight[1:]), given + result + math.prod(weight), side


def _module(node: Any) -> str:
    """The torch module by which an operation is named, or one that reads its result."""
    readers = [port.get_node() for port in node.output(0).get_target_inputs()]
    names = [one.get_friendly_name() for one in (node, *readers)]
    modules = (name.removeprefix(_MODULE).partition("/")[0] for name in names if name.startswith(_MODULE))
    return next((name for name in modules if not name.startswith("__nncf_hooks")), "")


def _constant(node: Any) -> Any:
    while node.get_type_name() in _ON_THE_WAY:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _torch_shape(node: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    kind = node.get_type_name()
    if kind == "GroupConvolution":  # [groups, out, in, k, k]
        return (shape[0] * shape[1], *shape[2:])
    if kind == "MatMul" and not node.get_attributes().get("transpose_b", False):
        return shape[::-1]
    return shape
