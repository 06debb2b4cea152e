"""OpenVINO IR files, straight from torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import openvino
from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.prepared import Prepared, prepared, reason_of, refuse_hooks, refuse_other_dtypes
from nncf_compactprune.host.torch_internals import TracerWarning
from nncf_compactprune.storage.writing import whole_files


def export_openvino(
    model: nn.Module,
    example_inputs: Any,
    path: str | PathLike[str],
    *,
    fp16: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
) -> Path:
    """Writes a model as OpenVINO IR: the ``.xml`` at ``path`` and a ``.bin`` beside it, both or neither.

    Nothing is verified here: see :func:`verify_export` and :func:`export_model`. The model is left as it was.

    :param model: a float32 model without NNCF hooks, or a quantized one after ``nncf.strip``. It is exported in
        evaluation mode.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments; those that are no tensors are
        built into the file.
    :param path: the ``.xml`` file to write.
    :param fp16: store weights in float16. Without it they stay float32, unlike OpenVINO's own default.
    :param input_names: default: the keywords, or the parameter names of ``forward``.
    :param output_names: default: the keys of a dict output, ``output`` or ``output_0``, ``output_1``, ...
    :param dynamic_batch: leave dim 0 of every input open; all other dims are those of the example.
    :return: the path written.
    :raises StorageError: when the path cannot be written.
    :raises ExportError: when the model cannot be run or converted.
    """
    target = Path(path)
    if target.suffix != ".xml":
        msg = f"{target}: expected a file name that ends in .xml, got '{target.name}'."
        raise ExportError(msg)
    refuse_for_openvino(model)
    with (
        whole_files(target.parent, [part.name for part in ir_parts(target)]) as stage,
        prepared(
            model, example_inputs, dynamic_batch=dynamic_batch, input_names=input_names, output_names=output_names
        ) as ready,
    ):
        write_openvino(convert_openvino(ready), stage / target.name, fp16=fp16)
    return target


def ir_parts(path: Path) -> list[Path]:
    """The files of an IR; the weights come first, so that no new ``.xml`` is ever without them."""
    return [path.with_suffix(".bin"), path]


def refuse_for_openvino(model: nn.Module) -> None:
    """Refuses what would fail only after the long work.

    :raises ExportError: for NNCF hooks that strip removes, and other dtypes than float32.
    """
    refuse_hooks(model, stripped_quantizers=True)
    refuse_other_dtypes(model)


def convert_openvino(ready: Prepared) -> Any:
    """Traces the model into an ``openvino.Model`` with our names and only the batch dim open."""
    try:
        with warnings.catch_warnings():
            # "might not generalize to other inputs": whether it does is what the verification finds out.
            warnings.simplefilter("ignore", TracerWarning)
            # torch's advice to OpenVINO, whose converter traces.
            warnings.filterwarnings("ignore", "`torch.jit.[a-z_]+` is deprecated", DeprecationWarning)
            converted = openvino.convert_model(ready.flat, example_input=ready.trace_inputs.tensors)
    except Exception as error:
        msg = f"OpenVINO could not convert the model: {reason_of(error)}."
        raise ExportError(msg) from error
    if len(converted.inputs) != len(ready.input_names) or len(converted.outputs) != len(ready.output_names):
        msg = (
            f"OpenVINO converted the model to {len(converted.inputs)} inputs and {len(converted.outputs)} outputs, "
            f"expected {len(ready.input_names)} and {len(ready.output_names)}."
        )
        raise ExportError(msg)
    shapes = {}
    for port, name, tensor in zip(converted.inputs, ready.input_names, ready.trace_inputs.tensors, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        batch = [-1] if ready.dynamic_batch and tensor.dim() else list(tensor.shape[:1])
        shapes[port] = openvino.PartialShape([*batch, *tensor.shape[1:]])
    converted.reshape(shapes)
    taken = {_tensor_of(port) for port in converted.inputs}
    for port, name in zip(converted.outputs, ready.output_names, strict=True):
        source = port.get_node().input_value(0)
        # A tensor that is several outputs, or an input too, goes by all its names; a result that does not repeat the
        # input's would take it from the saved file.
        others = source.get_names() if _tensor_of(source) in taken else set()
        port.get_tensor().set_names({*others, name})
        taken.add(_tensor_of(source))
    for node in converted.get_ops():
        friendly = node.get_friendly_name()
        # Layers keep the names they have in the model, for NNCF's ignored scopes.
        node.set_friendly_name(friendly.replace("__module.model.", "__module.", 1).replace("self.model.", "self.", 1))
    return converted


def _tensor_of(port: Any) -> tuple[str, int]:
    """What tells tensors apart: Python's handles of one port differ."""
    return port.get_node().get_name(), port.get_index()


def write_openvino(converted: Any, path: Path, *, fp16: bool) -> None:
    """Saves an ``openvino.Model``; the precision is always said, because OpenVINO's default is float16.

    :param converted: what :func:`convert_openvino` returned.
    :param path: the ``.xml`` file.
    :param fp16: whether weights are stored in float16.
    :raises OSError: when there is no room.
    :raises ExportError: when OpenVINO cannot write it for another reason.
    """
    try:
        openvino.save_model(converted, path, compress_to_fp16=fp16)
    except RuntimeError as error:
        for part in ir_parts(path):  # OpenVINO says "iostream error"; the system says why, when asked to write on
            with open(part, "ab") as file:
                file.write(bytes(2**16))
        msg = f"OpenVINO could not save the model: {reason_of(error)}."
        raise ExportError(msg) from error
