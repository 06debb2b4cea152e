"""ONNX files by torch's dynamo exporter; FP16 ones are converted from the FP32 file, not exported again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.prepared import Prepared, prepared, reason_of, refuse_hooks, refuse_other_dtypes
from nncf_compactprune.storage.writing import whole_file

# A protobuf message ends at 2 GiB; leave room for the graph.
_MAX_WEIGHT_BYTES = 2**31 - 2**26


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | PathLike[str],
    *,
    fp16: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
) -> Path:
    """Writes a model as one ONNX file. Nothing is verified here: see :func:`verify_export` and :func:`export_model`.

    The model is left as it was. An existing file is replaced only when the new one is complete.

    :param model: a float32 model without NNCF hooks; it is exported in evaluation mode.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments; those that are no tensors are
        built into the file.
    :param path: the file to write.
    :param fp16: store weights and compute in float16; inputs and outputs stay float32.
    :param input_names: default: the keywords, or the parameter names of ``forward``.
    :param output_names: default: the keys of a dict output, ``output`` or ``output_0``, ``output_1``, ...
    :param dynamic_batch: leave dim 0 of every input open.
    :return: the path written.
    :raises StorageError: when the path cannot be written.
    :raises ExportError: when the model cannot be run or exported.
    """
    target = Path(path)
    refuse_for_onnx(model)
    with (
        whole_file(target) as written,
        prepared(
            model, example_inputs, dynamic_batch=dynamic_batch, input_names=input_names, output_names=output_names
        ) as ready,
    ):
        write_onnx(ready, written)
        if fp16:
            convert_to_fp16(written, written)
    return target


def refuse_for_onnx(model: nn.Module) -> None:
    """Refuses what would fail only after the long work.

    :raises ExportError: for NNCF hooks, other dtypes than float32, or a model too large for one file.
    """
    refuse_hooks(model, stripped_quantizers=False)
    refuse_other_dtypes(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _MAX_WEIGHT_BYTES:
        msg = f"the model holds {size} bytes of weights; one ONNX file holds 2 GiB. Export it to OpenVINO instead."
        raise ExportError(msg)


def write_onnx(ready: Prepared, path: Path) -> None:
    """Traces the model and writes it in float32."""
    shapes = tuple({0: "batch"} if ready.dynamic_batch and t.dim() else {} for t in ready.trace_inputs.tensors)
    try:
        with warnings.catch_warnings():
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
    except Exception as error:
        msg = f"torch's ONNX exporter failed: {reason_of(error)}."
        raise ExportError(msg) from error
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


def convert_to_fp16(source: Path, path: Path) -> None:
    """Converts an FP32 file; inputs and outputs keep their types."""
    with warnings.catch_warnings():
        # The converter warns for each weight that is rounded to zero or cut to the float16 range. Whether that matters
        # is what the verification measures.
        warnings.filterwarnings("ignore", "the float32 number .* will be truncated", UserWarning)
        converted = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    onnx.save(converted, path)
