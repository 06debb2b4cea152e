"""OpenVINO IR files, straight from torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from nncf.common.logging import nncf_logger
from openvino._offline_transformations import compress_quantize_weights_transformation
from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.branches import refuse_frozen_reads, tracer_warnings
from nncf_compactprune.export.exported_program import program_and_left_out
from nncf_compactprune.export.foreign import exporting, is_foreign
from nncf_compactprune.export.formats import ExportFormat, Session, in_file_order, of_batch
from nncf_compactprune.export.options import ExportOptions
from nncf_compactprune.export.prepared import Array, Prepared, reason_of, refuse_hooks, refuse_other_dtypes
from nncf_compactprune.export.preprocessing import embedded, verify_embedded
from nncf_compactprune.export.tolerances import TOLERANCES
from nncf_compactprune.export.unrounded import Range, ir_without_rounding
from nncf_compactprune.plugins.hookspecs import hookimpl

#: operations of OpenVINO that may become a maximum or minimum over axes
EXTREMES = {"ReduceMax", "ReduceMin", "AdaptiveMaxPool"}


class OpenVinoFormat(ExportFormat):
    """OpenVINO IR: an ``.xml`` and a ``.bin`` beside it. Quantized models are written as they are."""

    name = "openvino"
    title = "OpenVINO"
    runtime = "OpenVINO"
    suffix = ".xml"
    precisions = ("fp32", "fp16", "int8")

    def parts(self, path: Path) -> list[Path]:
        # The weights come first, so that no new .xml is ever without them.
        return [path.with_suffix(".bin"), path]

    def needs(self, path: Path) -> list[Path]:
        return self.parts(path)

    def refuse(self, model: nn.Module) -> None:
        refuse_hooks(model, stripped_quantizers=True)
        refuse_other_dtypes(model)

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        self._write(_converted(ready), ready.options, paths)

    def rewrite(self, path: Path, options: ExportOptions, precision: str) -> None:
        """Gives a float32 IR that another exporter wrote a precision, and what our files say about themselves.

        :param path: the file, changed in place.
        :param options: what it says.
        :param precision: one of :attr:`precisions`.
        :raises ExportError: it cannot be saved.
        """
        finished = path.with_name(f"finished_{path.name}")
        self._write(openvino.Core().read_model(path), options, {precision: finished})
        self._replace(finished, path)

    def finish(self, ready: Prepared, path: Path) -> None:
        if not ready.options.embed_preprocessing or ready.options.pixels is None:
            return
        arithmetic = self.open(path).arithmetic
        model = embedded(openvino.Core().read_model(path).clone(), ready.options.pixels)
        finished = path.with_name(f"finished_{path.name}")
        self._save(model, finished, fp16=arithmetic == "fp16")
        del model
        self._replace(finished, path)
        verify_embedded(ready, path, TOLERANCES[arithmetic])

    def open(self, path: Path) -> Session:
        return self._session(openvino.Core().read_model(path))

    def open_unrounded(self, path: Path) -> tuple[Session, list[Range]]:
        model = openvino.Core().read_model(path)
        ranges = ir_without_rounding(model)
        return self._session(model), ranges

    def _session(self, model: Any) -> Session:
        nodes = model.get_ops()
        half = any(n.get_type_name() == "Constant" and n.get_output_element_type(0) == openvino.Type.f16 for n in nodes)
        quantized = any(node.get_type_name() == "FakeQuantize" for node in nodes)
        # OpenVINO would otherwise compute in bfloat16 where the CPU has it, and round inputs of layers of INT8 weights.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        compiled = openvino.Core().compile_model(model, "CPU", exact)

        def run(arrays: Sequence[Array]) -> list[Array]:
            results = compiled(list(arrays))
            return [np.array(results[position]) for position in range(len(compiled.outputs))]

        return Session(
            self.runtime,
            tuple(_port_name(port) for port in model.inputs),
            any(port.partial_shape.rank.get_length() and port.partial_shape[0].is_dynamic for port in model.inputs),
            "int8" if quantized else "fp16" if half else "fp32",
            run,
        )

    def open_timed(self, path: Path, inputs: Mapping[str, Array], device: str) -> Callable[[], object]:
        core = openvino.Core()
        if device.split(":")[0].split(".")[0] not in {"AUTO", *(one.split(".")[0] for one in core.available_devices)}:
            msg = f"{path}: OpenVINO has no device '{device}' here, it has {core.available_devices}."
            raise ExportError(msg)
        model = core.read_model(path)
        named = in_file_order(path, [_port_name(port) for port in model.inputs], inputs)
        arrays = [_as_taken(port, array) for port, array in zip(model.inputs, named, strict=True)]
        # Served models have their shape fixed: an open batch costs time that has nothing to do with the network.
        model.reshape({port: openvino.PartialShape(a.shape) for port, a in zip(model.inputs, arrays, strict=True)})
        request = core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)

    def _write(self, converted: Any, options: ExportOptions, paths: Mapping[str, Path]) -> None:
        for key, value in options.properties().items():
            converted.set_rt_info(value, ["compactprune", key])
        for precision, path in paths.items():
            if precision == "int8":
                _keep_quantizers_behind_extremes(converted)
                compress_quantize_weights_transformation(converted)
            self._save(converted, path, fp16=precision == "fp16")

    def _replace(self, finished: Path, path: Path) -> None:
        for new, old in zip(self.parts(finished), self.parts(path), strict=True):
            new.replace(old)

    def _save(self, converted: Any, path: Path, *, fp16: bool) -> None:
        """The precision is always said, because OpenVINO's default is float16."""
        try:
            openvino.save_model(converted, path, compress_to_fp16=fp16)
        except RuntimeError as error:
            for part in self.parts(path):  # OpenVINO says "iostream error"; the system says why, when asked to write on
                with open(part, "ab") as file:
                    file.write(bytes(2**16))
            msg = f"OpenVINO could not save the model: {reason_of(error)}."
            raise ExportError(msg) from error


def _as_taken(port: Any, array: Array) -> Array:
    """An input as a file takes it: in its own batch size, and as pixels where preprocessing is in the file."""
    if port.get_element_type() == openvino.Type.u8 and array.dtype.kind == "f" and array.ndim == 4:
        low, high = float(array.min()), float(array.max())
        array = (255 * (array - low) / max(high - low, 1e-9)).astype(np.uint8).transpose(0, 2, 3, 1)
    shape = port.get_partial_shape()
    fixed = shape.rank.is_static and len(shape) > 0 and shape[0].is_static
    return of_batch(array, shape[0].get_length() if fixed else None)


def _converted(ready: Prepared) -> Any:
    """Traces the model into an ``openvino.Model`` with our names and only the batch dim open."""
    whose = "OpenVINO could not convert the model"
    with exporting(whose, ready), ready.after_a_run(), tracer_warnings() as warned:
        # torch's advice to OpenVINO, whose converter traces.
        warnings.filterwarnings("ignore", "`torch.jit.[a-z_]+` is deprecated", DeprecationWarning)
        converted, traced = _traced_or_exported(ready)
    if traced:  # what a trace that failed warned of is in no file; torch's exporter refuses to freeze a value
        refuse_frozen_reads(whose, ready, warned)
    for one in warned.others:
        if is_foreign(one.filename):  # a tracer reads every attribute, those that are deprecated, too
            continue
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
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
        opened = ready.open_dims(tensor)
        shapes[port] = openvino.PartialShape([-1 if at in opened else side for at, side in enumerate(tensor.shape)])
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


def _traced_or_exported(ready: Prepared) -> tuple[Any, bool]:
    """OpenVINO's model from a trace, whose nodes keep the names of layers; else from torch's exported program, which
    takes some of what a trace does not.

    :return: the model, and whether it is from a trace.
    :raises Exception: the tracer's, where both fail.
    """
    tensors = ready.trace_inputs.tensors
    try:
        return openvino.convert_model(ready.flat, example_input=tensors), True
    except Exception as of_trace:
        try:
            program, left_out = program_and_left_out(ready)
            converted = openvino.convert_model(program)
        except Exception:
            raise of_trace from of_trace.__cause__
        if left_out:
            msg = (
                f"it cannot be traced ({reason_of(of_trace)}), and torch's exported program leaves {left_out} of "
                "its quantizers out. Another version of the library that the network is from may be traceable"
            )
            raise ExportError(msg) from None
    nncf_logger.info("OpenVINO took torch's exported program, as it could not trace the model. Nodes have other names.")
    return converted, False


def _keep_quantizers_behind_extremes(model: Any) -> None:
    """Puts a maximum with the lowest number behind maxima and minima over axes, which changes nothing: OpenVINO
    (2026.4, on CPUs) computes them wrongly in one with the quantizer behind.

    :param model: changed in place.
    """
    lowest = openvino.opset13.constant(np.finfo(np.float32).min, openvino.Type.f32)
    for node in model.get_ops():
        if node.get_type_name() not in EXTREMES or node.get_output_element_type(0) != openvino.Type.f32:
            continue
        readers = node.output(0).get_target_inputs()
        guard = openvino.opset13.maximum(node.output(0), lowest)
        for reader in readers:
            reader.replace_source_output(guard.output(0))


def _tensor_of(port: Any) -> tuple[str, int]:
    """What tells tensors apart: Python's handles of one port differ."""
    return port.get_node().get_name(), port.get_index()


def _port_name(port: Any) -> str:
    """An input's name. One that is an output too has that name as well, and then the node's is the input's."""
    node = str(port.get_node().get_friendly_name())
    return node if node in port.get_names() else str(port.get_any_name())


@hookimpl
def compactprune_export_formats() -> list[type[ExportFormat]]:
    """The format of this module."""
    return [OpenVinoFormat]
