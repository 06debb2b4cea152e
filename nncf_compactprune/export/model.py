"""One call from a model to verified files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.onnx import convert_to_fp16, refuse_for_onnx, write_onnx
from nncf_compactprune.export.openvino import convert_openvino, ir_parts, refuse_for_openvino, write_openvino
from nncf_compactprune.export.prepared import Prepared, prepared
from nncf_compactprune.export.runtimes import open_exact
from nncf_compactprune.export.verify import Verification, compare
from nncf_compactprune.storage.writing import whole_files

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written and found to compute what the model computes.

    :param path: the ``.onnx`` or ``.xml`` file.
    :param format: ``onnx`` or ``openvino``.
    :param precision: ``fp32`` or ``fp16``.
    :param bytes: size on disk, the ``.bin`` beside an ``.xml`` included.
    :param verification: the comparison with torch.
    """

    path: Path
    format: str
    precision: str
    bytes: int
    verification: Verification

    @property
    def label(self) -> str:
        """Format and precision in words, for tables: ``OpenVINO FP16``."""
        return f"{ {'onnx': 'ONNX', 'openvino': 'OpenVINO'}[self.format] } {self.precision.upper()}"


def export_model(
    model: nn.Module,
    example_inputs: Any,
    directory_or_file: str | PathLike[str],
    formats: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    *,
    name: str = "model",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> list[ExportedFile]:
    """Exports a model, verifies every file in its runtime, and then puts the files in place: all of them, or none.

    A directory gets ``model.onnx``, ``model_fp16.onnx``, ``model.xml`` (with ``.bin``) and ``model_fp16.xml``; a file
    name that ends in ``.onnx`` or ``.xml`` gives that one file. Each format is traced once, whatever the precisions.

    :param model: a float32 model without NNCF hooks, or, for OpenVINO, a quantized one after ``nncf.strip``. It is
        exported in evaluation mode and left as it was.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
    :param directory_or_file: where to write; created if missing.
    :param formats: ``onnx``, ``openvino``; default: both, or the one that the file name says.
    :param precisions: ``fp32``, ``fp16``; default: both into a directory, ``fp32`` into a file.
    :param name: stem of the files in a directory.
    :param input_names: default: the keywords, or the parameter names of ``forward``.
    :param output_names: default: the keys of a dict output, ``output`` or ``output_0``, ``output_1``, ...
    :param dynamic_batch: leave dim 0 of every input open, and verify at two batch sizes.
    :param tolerance: largest accepted error relative to the largest absolute output; default: by precision.
    :return: the files in the order written.
    :raises StorageError: when a file cannot be written; nothing was exported then.
    :raises ExportError: when the model cannot be exported, or a file computes something else.
    """
    paths = _paths(Path(directory_or_file), formats, precisions, name)
    for format_, refuse in (("onnx", refuse_for_onnx), ("openvino", refuse_for_openvino)):
        if any(one == format_ for one, _ in paths):
            refuse(model)
    targets = [part for path in paths.values() for part in _parts(path)]
    with (
        whole_files(targets[0].parent, [target.name for target in targets]) as stage,
        prepared(
            model, example_inputs, dynamic_batch=dynamic_batch, input_names=input_names, output_names=output_names
        ) as ready,
    ):
        _write(ready, {key: stage / path.name for key, path in paths.items()}, stage)
        checks = {
            key: compare(open_exact(stage / path.name), path, ready.references, ready.output_names, tolerance)
            for key, path in paths.items()
        }
    return [
        ExportedFile(path, format_, precision, sum(p.stat().st_size for p in _parts(path)), checks[format_, precision])
        for (format_, precision), path in paths.items()
    ]


def _write(ready: Prepared, paths: dict[tuple[str, str], Path], stage: Path) -> None:
    onnx_paths = {precision: path for (format_, precision), path in paths.items() if format_ == "onnx"}
    if onnx_paths:
        source = stage / "traced"
        write_onnx(ready, source)
        put: dict[str, Callable[[Path, Path], object]] = {"fp32": shutil.copyfile, "fp16": convert_to_fp16}
        for precision, path in onnx_paths.items():
            put[precision](source, path)
        source.unlink()
    openvino_paths = {precision: path for (format_, precision), path in paths.items() if format_ == "openvino"}
    if openvino_paths:
        converted = convert_openvino(ready)
        for precision, path in openvino_paths.items():
            write_openvino(converted, path, fp16=precision == "fp16")


def _paths(
    where: Path, formats: Sequence[str] | None, precisions: Sequence[str] | None, name: str
) -> dict[tuple[str, str], Path]:
    """File paths by format and precision."""
    named = next((one for one, suffix in SUFFIXES.items() if where.suffix == suffix), None)
    is_file = named is not None and not where.is_dir()
    hint = nearest(where.suffix, SUFFIXES.values())
    if where.suffix and not is_file and hint and not where.is_dir():
        msg = f"{where}: expected a directory, or a file that ends in .onnx or .xml, got '{where.name}'.{hint}"
        raise ExportError(msg)
    if formats is None:
        formats = (named,) if is_file and named else tuple(SUFFIXES)
    if precisions is None:
        precisions = PRECISIONS[:1] if is_file else PRECISIONS
    for option, values, known in (("formats", formats, tuple(SUFFIXES)), ("precisions", precisions, PRECISIONS)):
        wrong = [value for value in values if value not in known]
        if wrong or not values or isinstance(values, str):
            came = repr(values) if not wrong or isinstance(values, str) else f"'{wrong[0]}'"
            msg = f"{option}: expected a list of {' and '.join(known)}, got {came}.{nearest(str(values), known)}"
            raise ExportError(msg)
    if is_file and set(formats) != {named}:
        msg = f"{where}: the file name says {named}, but formats is {list(formats)}. Give a directory instead."
        raise ExportError(msg)
    if is_file and len(set(precisions)) == 1:
        return {(str(named), precisions[0]): where}
    directory, stem = (where.parent, where.stem) if is_file else (where, name)
    endings = {"fp32": "", "fp16": "_fp16"}
    return {(f, p): directory / f"{stem}{endings[p]}{SUFFIXES[f]}" for f in formats for p in precisions}


def _parts(path: Path) -> list[Path]:
    return ir_parts(path) if path.suffix == ".xml" else [path]
