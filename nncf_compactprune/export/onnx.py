"""ONNX files by torch's dynamo exporter; FP16 ones are converted from the FP32 file, not exported again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.folding import folded
from nncf_compactprune.export.foreign import exporting
from nncf_compactprune.export.formats import ExportFormat, Session, in_file_order, of_batch
from nncf_compactprune.export.left_out import hooks_left_out, hooks_that_run
from nncf_compactprune.export.options import OLDEST_QUANTIZED_OPSET, OpsetError
from nncf_compactprune.export.prepared import Array, Prepared, is_quantized
from nncf_compactprune.export.unrounded import Range, onnx_without_rounding
from nncf_compactprune.plugins.hookspecs import hookimpl

_PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}
# Who writes float16, and what to do where it does not.
_FP16 = ("ONNX Runtime's converter to float16", 'Export precision "fp32", or "fp16" to OpenVINO.')
# A protobuf message ends at 2 GiB; leave room for the graph.
_MAX_WEIGHT_BYTES = 2**31 - 2**26


class OnnxFormat(ExportFormat):
    """ONNX files, opened in ONNX Runtime."""

    name = "onnx"
    title = "ONNX"
    runtime = "ONNX Runtime"
    suffix = ".onnx"
    precisions = ("fp32", "fp16", "int8")

    def parts(self, path: Path) -> list[Path]:
        return [path.with_name(f"{path.name}.data"), path]  # weights of their own come first, where there are any

    def refuse(self, model: nn.Module) -> None:
        super().refuse(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        if size > _MAX_WEIGHT_BYTES:
            msg = f"the model holds {size} bytes of weights; one ONNX file holds 2 GiB. Export it to OpenVINO instead."
            raise ExportError(msg)

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        traced = _traced(ready)
        for precision, path in paths.items():
            model = onnx.ModelProto()
            model.CopyFrom(traced)
            whose, remedy = "torch's ONNX exporter", ""
            if precision == "fp16":
                whose, remedy = _FP16
                with exporting(f"{whose} failed", ready, remedy):
                    model = _converted_to_fp16(model)
            elif precision == "int8":
                model = folded(model)
            onnx.helper.set_model_props(model, ready.options.properties())
            _save(model, path, external=ready.options.external_data)
            with exporting(f"{whose} gave an invalid file", ready, remedy):
                onnx.checker.check_model(path, full_check=True)

    def open(self, path: Path) -> Session:
        return self._session(path, onnx.load(path, load_external_data=False).graph)

    def open_unrounded(self, path: Path) -> tuple[Session, list[Range]]:
        model = onnx.load(path)
        ranges = onnx_without_rounding(model)
        return self._session(model.SerializeToString(), model.graph), ranges

    def _session(self, source: Path | bytes, graph: onnx.GraphProto) -> Session:
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        ports = session.get_inputs()
        names = tuple(port.name for port in ports)
        half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
        quantized = any(node.op_type == "DequantizeLinear" for node in graph.node)
        return Session(
            self.runtime,
            names,
            any(port.shape and not isinstance(port.shape[0], int) for port in ports),
            "int8" if quantized else "fp16" if half else "fp32",
            lambda arrays: [np.asarray(one) for one in session.run(None, dict(zip(names, arrays, strict=True)))],
        )

    def open_timed(self, path: Path, inputs: Mapping[str, Array], device: str) -> Callable[[], object]:
        provider = _PROVIDERS.get(device.upper())
        available = onnxruntime.get_available_providers()
        if provider not in available:
            names = [name for name, one in _PROVIDERS.items() if one in available]
            msg = f"{path}: ONNX Runtime has no device '{device}' here, it has {names}.{nearest(device.upper(), names)}"
            raise ExportError(msg)
        options = onnxruntime.SessionOptions()
        # Its worker threads would spin on between two requests, in the time of whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
        ports = session.get_inputs()
        names = [one.name for one in ports]
        arrays = [
            of_batch(array, port.shape[0] if port.shape and isinstance(port.shape[0], int) else None)
            for port, array in zip(ports, in_file_order(path, names, inputs), strict=True)
        ]
        feed = dict(zip(names, arrays, strict=True))
        return lambda: session.run(None, feed)


def _traced(ready: Prepared) -> onnx.ModelProto:
    """Traces the model in float32.

    :raises ExportError: it cannot be traced, or not in the opset asked for.
    """
    shapes = tuple(ready.open_dims(tensor) for tensor in ready.trace_inputs.tensors)
    opset = ready.options.opset
    if opset is not None and opset < OLDEST_QUANTIZED_OPSET and is_quantized(ready.flat.model):
        msg = f"opset: a quantized model needs {OLDEST_QUANTIZED_OPSET} or more, got {opset}."
        raise OpsetError(msg)
    whose = "torch's ONNX exporter failed"
    with exporting(whose, ready), ready.after_a_run(), hooks_that_run(ready) as exported, warnings.catch_warnings():
        # That the inputs share one batch is what is wanted.
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used", UserWarning)
        program = torch.onnx.export(
            ready.flat,
            ready.trace_inputs.tensors,
            dynamo=True,
            verbose=False,
            input_names=ready.input_names,
            output_names=ready.output_names,
            dynamic_shapes=(shapes,) if any(shapes) else None,
            opset_version=opset,
        )
    if left_out := hooks_left_out(ready, exported):
        msg = (
            f"torch's ONNX exporter leaves {left_out} of the network's quantizers out. Export it to OpenVINO, or "
            'quantize it without "model_type": "transformer".'
        )
        raise ExportError(msg)
    if program is None:
        msg = "torch's ONNX exporter returned no program."
        raise ExportError(msg)
    graph = program.model.graph
    # Stack traces with the paths of this machine, and names; together they would outweigh a small network.
    program.model.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    for value in list(graph.initializers.values()):
        # Weights keep the names they have in the state dict.
        if value.name is not None:
            value.name = value.name.removeprefix("model.")
    proto: onnx.ModelProto = program.model_proto
    got = next(one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if opset is not None and got != opset:
        msg = f"opset: the model cannot be written in opset {opset}; torch's exporter gave {got}. Ask for {got}."
        raise OpsetError(msg)
    return proto


def _converted_to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float16; inputs and outputs keep their types."""
    # By an entry here the converter takes a constant for float16, also what it leaves in float32 (scales of Resize).
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.value_info if value.name in constants]:
        model.graph.value_info.remove(value)
    with warnings.catch_warnings():
        # The converter warns for each weight that is rounded to zero or cut to the float16 range. Whether that matters
        # is what the verification measures.
        warnings.filterwarnings("ignore", "the float32 number .* will be truncated", UserWarning)
        converted = convert_float_to_float16(model, keep_io_types=True)
    # It casts a value for each node that reads it in float32, under one name, and does so at the end; ONNX wants a name
    # once, and a node behind those that it reads.
    nodes = {tuple(node.output): node for node in converted.graph.node}
    del converted.graph.node[:]
    converted.graph.node.extend(nodes.values())
    ordered = onnx_ir.from_proto(converted)
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def _save(model: onnx.ModelProto, path: Path, *, external: bool) -> None:
    if external:
        name = f"{path.name}.data"
        onnx.save(model, path, save_as_external_data=True, location=name)
    else:
        onnx.save(model, path)


@hookimpl
def compactprune_export_formats() -> list[type[ExportFormat]]:
    """The format of this module."""
    return [OnnxFormat]
