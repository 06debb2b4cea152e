"""Exported files opened in the runtimes that will serve them: ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.prepared import Array, reason_of

RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}

_ORT_PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Session:
    """An opened file.

    :param runtime: the runtime's name, for messages.
    :param input_names: in the file's order.
    :param dynamic_batch: whether dim 0 of an input is open.
    :param arithmetic: ``fp32``, ``fp16``, or ``int8`` when the file holds fake quantizers.
    :param run: arrays in the file's order to output arrays in the file's order.
    """

    runtime: str
    input_names: tuple[str, ...]
    dynamic_batch: bool
    arithmetic: str
    run: Callable[[Sequence[Array]], list[Array]]


def runtime_of(path: Path) -> str:
    """The suffix of a file that a runtime reads.

    :raises ExportError: when the file is missing, or no runtime reads it.
    """
    if path.suffix not in RUNTIMES:
        msg = f"{path}: expected an .onnx or .xml file, got '{path.name}'.{nearest(path.suffix, RUNTIMES)}"
        raise ExportError(msg)
    if not path.is_file():
        msg = f"{path}: no such file."
        raise ExportError(msg)
    return path.suffix


def open_exact(path: Path) -> Session:
    """Opens a file on the CPU to compare values: OpenVINO would otherwise compute in bfloat16 where the CPU has it.

    :raises ExportError: when the runtime does not load the file.
    """
    suffix = runtime_of(path)
    try:
        return _open_onnx(path) if suffix == ".onnx" else _open_openvino(path)
    except Exception as error:
        raise _not_loaded(path, error) from error


def open_timed(path: Path, inputs: dict[str, Array], device: str) -> Callable[[], object]:
    """Opens a file as it is deployed for single requests, and returns one request on fixed inputs.

    :param inputs: arrays by name, in call order; used by position when the file has other names.
    :raises ExportError: when the device is not there, or the runtime does not load the file.
    """
    suffix = runtime_of(path)
    arrays = list(inputs.values())
    if suffix == ".onnx":
        provider = _ORT_PROVIDERS.get(device.upper())
        available = onnxruntime.get_available_providers()
        if provider not in available:
            names = [name for name, one in _ORT_PROVIDERS.items() if one in available]
            msg = f"{path}: ONNX Runtime has no device '{device}' here, it has {names}.{nearest(device.upper(), names)}"
            raise ExportError(msg)
        options = onnxruntime.SessionOptions()
        # Its worker threads would spin on between two requests, in the time of whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:
            raise _not_loaded(path, error) from error
        names = [one.name for one in session.get_inputs()]
        feed = dict(zip(names, in_file_order(path, names, inputs), strict=True))
        return lambda: session.run(None, feed)
    core = openvino.Core()
    if device.split(":")[0].split(".")[0] not in {"AUTO", *(one.split(".")[0] for one in core.available_devices)}:
        msg = f"{path}: OpenVINO has no device '{device}' here, it has {core.available_devices}."
        raise ExportError(msg)
    try:
        model = core.read_model(path)
        arrays = in_file_order(path, [port_name(port) for port in model.inputs], inputs)
        # Served models have their shape fixed: an open batch costs time that has nothing to do with the network.
        model.reshape({port: openvino.PartialShape(a.shape) for port, a in zip(model.inputs, arrays, strict=True)})
        compiled = core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY"})
    except ExportError:
        raise
    except Exception as error:
        raise _not_loaded(path, error) from error
    return request_of(compiled, arrays)


def request_of(compiled: Any, arrays: Sequence[Array]) -> Callable[[], object]:
    """One request of an ``openvino.CompiledModel`` on fixed inputs, without copies in and out."""
    request = compiled.create_infer_request()
    return lambda: request.infer(list(arrays), share_inputs=True, share_outputs=True)


def port_name(port: Any) -> str:
    """An OpenVINO input's name. One that is an output too has that name as well, and then the node's is the input's."""
    node = str(port.get_node().get_friendly_name())
    return node if node in port.get_names() else str(port.get_any_name())


def in_file_order(path: Path, names: Sequence[str], inputs: dict[str, Array]) -> list[Array]:
    """Arrays in the file's order: by name where the names agree, else by position.

    :raises ExportError: when the numbers differ.
    """
    if len(names) != len(inputs):
        msg = f"{path}: takes {len(names)} inputs {list(names)}, got {len(inputs)}: {list(inputs)}."
        raise ExportError(msg)
    return [inputs[name] for name in names] if set(names) == set(inputs) else list(inputs.values())


def _open_onnx(path: Path) -> Session:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ports = session.get_inputs()
    names = tuple(port.name for port in ports)
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in onnx.load(path).graph.initializer)
    return Session(
        RUNTIMES[".onnx"],
        names,
        any(port.shape and not isinstance(port.shape[0], int) for port in ports),
        "fp16" if half else "fp32",
        lambda arrays: [np.asarray(one) for one in session.run(None, dict(zip(names, arrays, strict=True)))],
    )


def _open_openvino(path: Path) -> Session:
    core = openvino.Core()
    model = core.read_model(path)
    nodes = model.get_ops()
    half = any(
        node.get_type_name() == "Constant" and node.get_output_element_type(0) == openvino.Type.f16 for node in nodes
    )
    quantized = any(node.get_type_name() == "FakeQuantize" for node in nodes)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(arrays: Sequence[Array]) -> list[Array]:
        results = compiled(list(arrays))
        return [np.array(results[position]) for position in range(len(compiled.outputs))]

    return Session(
        RUNTIMES[".xml"],
        tuple(port_name(port) for port in model.inputs),
        any(port.partial_shape.rank.get_length() and port.partial_shape[0].is_dynamic for port in model.inputs),
        "int8" if quantized else "fp16" if half else "fp32",
        run,
    )


def _not_loaded(path: Path, error: Exception) -> ExportError:
    msg = f"{path}: {RUNTIMES[path.suffix]} cannot load it: {reason_of(error)}."
    return ExportError(msg)
