"""ExecuTorch programs: ``.pte`` files for phones and small devices, with what XNNPACK takes given to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nncf_compactprune.errors import ExportError, ResolveError
from nncf_compactprune.export.exported_program import exported_program
from nncf_compactprune.export.foreign import exporting, keeping, natively_quiet
from nncf_compactprune.export.formats import ExportFormat, Session
from nncf_compactprune.export.prepared import Array, Prepared
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.plugins.hookspecs import hookimpl

_INSTALL = "nncf-compactprune[executorch]"
# by the numbers that ATen gives them, which the runtime tells
_TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}


class ExecuTorchFormat(ExportFormat):
    """``.pte`` files, opened in ExecuTorch's runtime. Memory is planned ahead, so their batch is fixed."""

    name = "executorch"
    title = "ExecuTorch"
    runtime = "ExecuTorch"
    suffix = ".pte"
    by_default = False
    open_batch = False

    def check_installed(self) -> None:
        try:
            _package("exir")
        except ResolveError as error:
            raise ExportError(str(error)) from error

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        program = exported_program(ready)
        lower = _package("exir").to_edge_transform_and_lower
        partitioner = _package("backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner
        for path in paths.values():
            with exporting("ExecuTorch could not lower the model", ready):
                lowered = lower(program, partitioner=[partitioner()]).to_executorch()
            path.write_bytes(lowered.buffer)

    def open(self, path: Path) -> Session:
        runtime = _package("runtime").Runtime.get()
        with natively_quiet():  # XNNPACK reads what the CPU is, and tells each file that is missing
            method = runtime.load_program(path).load_method("forward")
        about = method.metadata
        ports = [about.input_tensor_meta(position) for position in range(about.num_inputs())]

        def run(arrays: Sequence[Array]) -> list[Array]:
            return [one.numpy().copy() for one in method.execute([torch.from_numpy(array) for array in arrays])]

        return Session(
            self.runtime,
            tuple(f"input_{position}" for position in range(len(ports))),
            dynamic_batch=False,
            arithmetic="fp32",
            run=run,
            input_shapes=tuple(tuple(one.sizes()) for one in ports),
            input_types=tuple(_TYPES[one.dtype()] for one in ports),
        )


def _package(name: str) -> Any:
    """A part of ExecuTorch.

    :raises ResolveError: it is not installed.
    """
    # torchao, which it brings, tells of kernels for GPUs that are not there.
    with keeping(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require_package(f"executorch.{name}", _INSTALL)


@hookimpl
def compactprune_export_formats() -> list[type[ExportFormat]]:
    """The format of this module."""
    return [ExecuTorchFormat]
