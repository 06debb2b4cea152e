"""PyTorch's exported programs: ``.pt2`` files, which ``torch.export.load`` reads without the model's code. In those of
quantized networks pairs of operations between numbers and levels stand behind weights in float, as OpenVINO and torch's
compiler take them; to load one, ``torch.ao.quantization.fx._decomposed`` must have been imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.foreign import exporting, keeping
from nncf_compactprune.export.formats import ExportFormat, Session
from nncf_compactprune.export.left_out import hooks_left_out, hooks_that_run
from nncf_compactprune.export.prepared import Array, Prepared
from nncf_compactprune.host.nncf_quantization import PAIRS
from nncf_compactprune.plugins.hookspecs import hookimpl

_TO_LEVELS = (PAIRS.quantize_per_tensor.default, PAIRS.quantize_per_channel.default)
_ABOUT = "compactprune.json"


class ExportedProgramFormat(ExportFormat):
    """``.pt2`` files, opened by torch. What they say about themselves is in ``extra_files["compactprune.json"]``."""

    name = "pt2"
    title = "PT2"
    runtime = "torch.export"
    suffix = ".pt2"
    precisions = ("fp32", "int8")
    by_default = False

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        program = exported_program(ready)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # with the paths of this machine
        about = {"input_names": ready.input_names, "output_names": ready.output_names, **ready.options.properties()}
        for path in paths.values():
            with keeping():
                torch.export.save(program, path, extra_files={_ABOUT: json.dumps(about)})

    def open(self, path: Path) -> Session:
        said = {_ABOUT: ""}
        with keeping():
            program = torch.export.load(path, extra_files=said)
            module = program.module()
        given = program.graph_signature.user_inputs
        ports = {node.name: node.meta["val"] for node in program.graph.nodes if node.name in given}
        names = json.loads(said[_ABOUT] or "{}").get("input_names", list(ports))

        def run(arrays: Sequence[Array]) -> list[Array]:
            with torch.no_grad():
                return [one.numpy() for one in module(*(torch.from_numpy(array) for array in arrays))]

        quantized = any(node.target in _TO_LEVELS for node in program.graph.nodes)
        shapes = tuple(tuple(side if isinstance(side, int) else None for side in one.shape) for one in ports.values())
        return Session(
            self.runtime,
            tuple(names),
            any(shape and shape[0] is None for shape in shapes),
            "int8" if quantized else "fp32",
            run,
            shapes,
            tuple(str(one.dtype).removeprefix("torch.") for one in ports.values()),
            {name.removeprefix("model."): tuple(one.shape) for name, one in program.state_dict.items()},
        )


def exported_program(ready: Prepared) -> Any:
    """The model as PyTorch's exported program, with the open dimensions of :meth:`Prepared.open_dims`.

    :param ready: the model.
    :raises ExportError: it cannot be exported, or its quantizers would be lost.
    """
    with exporting("torch.export failed", ready), ready.after_a_run():
        program, left_out = program_and_left_out(ready)
    if left_out:
        msg = f"torch.export leaves {left_out} of the network's quantizers out. Export it to OpenVINO."
        raise ExportError(msg)
    return program


def program_and_left_out(ready: Prepared) -> tuple[Any, int]:
    """The same without the words around it, and how many quantizers it lacks.

    :param ready: the model.
    :raises Exception: torch's.
    """
    tensors = ready.trace_inputs.tensors
    shapes = tuple(dict.fromkeys(ready.open_dims(one), torch.export.Dim.DYNAMIC) for one in tensors)
    with hooks_that_run(ready) as exported:
        program = torch.export.export(ready.flat, tensors, dynamic_shapes=(shapes,), strict=False)
    return program, hooks_left_out(ready, exported)


@hookimpl
def compactprune_export_formats() -> list[type[ExportFormat]]:
    """The format of this module."""
    return [ExportedProgramFormat]
