"""ONNX files by torch's dynamo exporter; FP16 ones are converted from the FP32 file, not exported again."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.folding import folded
from nncf_compactprune.export.foreign import exporting
from nncf_compactprune.export.formats import ExportFormat, Session, in_file_order
from nncf_compactprune.export.prepared import Array, Prepared
from nncf_compactprune.plugins.hookspecs import hookimpl

_PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}
# A protobuf message ends at 2 GiB; leave room for the graph.
_MAX_WEIGHT_BYTES = 2**31 - 2**26


class OnnxFormat(ExportFormat):
    """ONNX files, opened in ONNX Runtime."""

    name = "onnx"
    title = "ONNX"
    runtime = "ONNX Runtime"
    suffix = ".onnx"
    precisions = ("fp32", "fp16", "int8")

    def refuse(self, model: nn.Module) -> None:
        super().refuse(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        if size > _MAX_WEIGHT_BYTES:
            msg = f"the model holds {size} bytes of weights; one ONNX file holds 2 GiB. Export it to OpenVINO instead."
            raise ExportError(msg)

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        traced = next(iter(paths.values())).with_suffix(".traced")
        _write_fp32(ready, traced)
        for precision, path in paths.items():
            if precision == "fp16":
                _convert_to_fp16(traced, path)
            elif precision == "int8":
                onnx.save(folded(onnx.load(traced)), path)
            else:
                shutil.copyfile(traced, path)
        traced.unlink()

    def open(self, path: Path) -> Session:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        ports = session.get_inputs()
        names = tuple(port.name for port in ports)
        graph = onnx.load(path).graph
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
        names = [one.name for one in session.get_inputs()]
        feed = dict(zip(names, in_file_order(path, names, inputs), strict=True))
        return lambda: session.run(None, feed)


def _write_fp32(ready: Prepared, path: Path) -> None:
    """Traces the model and writes it in float32."""
    shapes = tuple({0: "batch"} if ready.dynamic_batch and t.dim() else {} for t in ready.trace_inputs.tensors)
    with exporting("torch's ONNX exporter failed", ready), warnings.catch_warnings():
        # torch's own deprecation, raised while its exporter copies its own tree specs.
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)
        # That the inputs share one batch is what is wanted.
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used", UserWarning)
        program = torch.onnx.export(
            ready.flat,
            ready.trace_inputs.tensors,
            dynamo=True,
            verbose=False,
            input_names=ready.input_names,
            output_names=ready.output_names,
            dynamic_shapes=(shapes,) if ready.dynamic_batch else None,
        )
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
    program.save(path, external_data=False)


def _convert_to_fp16(source: Path, path: Path) -> None:
    """Converts an FP32 file; inputs and outputs keep their types."""
    with warnings.catch_warnings():
        # The converter warns for each weight that is rounded to zero or cut to the float16 range. Whether that matters
        # is what the verification measures.
        warnings.filterwarnings("ignore", "the float32 number .* will be truncated", UserWarning)
        converted = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    onnx.save(converted, path)


@hookimpl
def compactprune_export_formats() -> list[type[ExportFormat]]:
    """The format of this module."""
    return [OnnxFormat]
