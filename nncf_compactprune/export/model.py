"""One call from a model to verified files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.formats import ExportFormat, export_formats, opened
from nncf_compactprune.export.options import ExportOptions
from nncf_compactprune.export.prepared import is_quantized, prepared
from nncf_compactprune.export.verify import Verification, compare_with
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.storage.plan_file import plan_digest
from nncf_compactprune.storage.writing import whole_files
from nncf_compactprune.version import __version__

QUANTIZED = "int8"


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written and found to compute what the model computes.

    :param path: the file.
    :param format: its format's name, such as ``openvino``.
    :param precision: such as ``fp32``.
    :param bytes: size on disk, further parts (the ``.bin`` beside an ``.xml``) included.
    :param verification: the comparison with torch.
    :param label: format and precision in words, for tables: ``OpenVINO FP16``.
    """

    path: Path
    format: str
    precision: str
    bytes: int
    verification: Verification
    label: str


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
    options: ExportOptions | None = None,
    plugins: Plugins | None = None,
) -> list[ExportedFile]:
    """Exports a model, verifies every file in its runtime, and then puts the files in place: all of them, or none.

    A directory gets ``model.onnx``, ``model_fp16.onnx``, ``model.xml`` (with ``.bin``) and ``model_fp16.xml``, and the
    files of formats that plugins add; of a quantized model ``model_int8.onnx`` and ``model_int8.xml``. PyTorch's
    ``model.pt2`` and ExecuTorch's ``model.pte`` are written where ``formats`` asks for them. A file name that ends like
    one of these gives that one file. Each format is traced once, whatever the precisions.

    :param model: a float32 model without NNCF hooks, or a quantized one after ``ctrl.strip()``; for OpenVINO also one
        after ``nncf.strip``. It is exported in evaluation mode and left as it was.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
    :param directory_or_file: where to write; created if missing.
    :param formats: ``onnx``, ``openvino``, ``pt2``, ``executorch``, or a plugin's; default: ``onnx``, ``openvino`` and
        the plugins', or the one that the file name says.
    :param precisions: ``fp32``, ``fp16``; of these each format writes those that it has. Default: all that a format has
        into a directory, its first into a file. A quantized model has one, ``int8``.
    :param name: stem of the files in a directory.
    :param input_names: default: the keywords, or the parameter names of ``forward``.
    :param output_names: default: the keys of a dict output, ``output`` or ``output_0``, ``output_1``, ...
    :param dynamic_batch: leave dim 0 of every input open, and verify at two batch sizes. ExecuTorch plans memory ahead:
        its files then have a batch of 1.
    :param tolerance: largest accepted error relative to the largest absolute output; default: by precision.
    :param options: batch, sizes, opset, and what files say about themselves: see :class:`ExportOptions`.
    :param plugins: where formats come from; the installed plugins by default.
    :return: the files in the order written.
    :raises StorageError: when a file cannot be written; nothing was exported then.
    :raises ExportError: when the model cannot be exported, or a file computes something else.
    """
    known = export_formats(plugins)
    paths = _paths(Path(directory_or_file), known, formats, precisions, name, quantized=is_quantized(model))
    for format_ in paths:
        known[format_].refuse(model)
    files = [
        (known[f], precision, path) for f, by_precision in paths.items() for precision, path in by_precision.items()
    ]
    targets = [part for kind, _, path in files for part in kind.parts(path)]
    names = [target.name for target in targets]
    with (
        whole_files(targets[0].parent, names, stale=names) as stage,  # a part that is not written any more goes
        prepared(
            model,
            example_inputs,
            dynamic_batch=dynamic_batch,
            input_names=input_names,
            output_names=output_names,
            options=described(model, options or ExportOptions()),
        ) as ready,
    ):
        own = {one: ready if known[one].open_batch else ready.of_one() for one in paths}
        for format_, by_precision in paths.items():
            staged = {precision: stage / path.name for precision, path in by_precision.items()}
            known[format_].write(own[format_], staged)
        checks = [
            compare_with(
                own[kind.name], opened(stage / path.name, plugins, path), stage / path.name, path, tolerance, plugins
            )
            for kind, _, path in files
        ]
        for kind, _, path in files:
            kind.finish(own[kind.name], stage / path.name)
    return [
        ExportedFile(
            path,
            kind.name,
            precision,
            sum(p.stat().st_size for p in kind.parts(path) if p.is_file()),
            check,
            f"{kind.title} {precision.upper()}",
        )
        for (kind, precision, path), check in zip(files, checks, strict=True)
    ]


def described(model: nn.Module, options: ExportOptions) -> ExportOptions:
    """The options with what is known of the model: the digest of its plan, and its algorithm.

    :param model: its plan is read.
    :param options: what is known already.
    """
    plan = plan_of(model)
    said = {"producer": f"nncf_compactprune {__version__}"}
    if plan is not None:
        said |= {"plan_sha256": plan_digest(plan.to_json().encode()), "algorithm": plan.algorithm}
    return replace(options, metadata={**said, **options.metadata})


def _paths(
    where: Path,
    known: Mapping[str, ExportFormat],
    formats: Sequence[str] | None,
    precisions: Sequence[str] | None,
    name: str,
    *,
    quantized: bool,
) -> dict[str, dict[str, Path]]:
    """File paths by format and precision."""
    named = next((one for one in known.values() if where.suffix == one.suffix), None)
    if named is None and not where.is_dir() and nearest(where.suffix, [one.suffix for one in known.values()]):
        endings = " or ".join(one.suffix for one in known.values())
        hint = nearest(where.suffix, [one.suffix for one in known.values()])
        msg = f"{where}: expected a directory, or a file that ends in {endings}, got '{where.name}'.{hint}"
        raise ExportError(msg)
    file = named if not where.is_dir() else None
    chosen = _checked("formats", formats, known) or (
        [file.name] if file else [one for one in known if known[one].by_default]
    )
    if file and set(chosen) != {file.name}:
        msg = f"{where}: the file name says {file.name}, but formats is {chosen}. Give a directory instead."
        raise ExportError(msg)
    offers = {one: _offered(known[one], quantized=quantized) for one in chosen}
    if formats is None and not file:  # all formats that there are for such a model
        chosen = [one for one in chosen if offers[one]]
    if precisions is not None and quantized != (QUANTIZED in precisions):
        said = "the model is quantized, its files are int8" if quantized else "the model is not quantized"
        msg = f"precisions: {said}, got {list(precisions)}. Leave precisions out."
        raise ExportError(msg)
    asked = _checked("precisions", precisions, dict.fromkeys(p for one in chosen for p in offers[one]))
    result: dict[str, dict[str, Path]] = {}
    for one in chosen:
        wanted = _wanted(known[one], asked, quantized=quantized)
        if file and not asked:
            wanted = wanted[:1]
        directory, stem = (where.parent, where.stem) if file else (where, name)
        single = file is not None and len(set(wanted)) == 1
        result[one] = {
            p: where if single else directory / f"{stem}{'' if p == 'fp32' else f'_{p}'}{known[one].suffix}"
            for p in wanted
        }
    return result


def check_formats(
    formats: Sequence[str], precisions: Sequence[str], *, quantized: bool, plugins: Plugins | None = None
) -> None:
    """Refuses formats that cannot hold a model, or whose package is missing, before the long work.

    :param formats: their names.
    :param precisions: of files that are not quantized.
    :param quantized: whether the model will be quantized.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: naming what is missing.
    """
    known = export_formats(plugins)
    for name in formats:
        known[name].check_installed()
        _wanted(known[name], () if quantized else precisions, quantized=quantized)


def _offered(kind: ExportFormat, *, quantized: bool) -> list[str]:
    return [precision for precision in kind.precisions if (precision == QUANTIZED) == quantized]


def _wanted(kind: ExportFormat, asked: Sequence[str], *, quantized: bool) -> list[str]:
    """What a format writes of the precisions that were asked for; all it has where none were.

    :raises ExportError: it has none of them.
    """
    own = _offered(kind, quantized=quantized)
    if not own:
        msg = f"formats: {kind.title} files hold no {'quantized' if quantized else 'float'} model."
        raise ExportError(msg)
    wanted = [precision for precision in asked if precision in own] if asked else own
    if not wanted:
        msg = f"precisions: {kind.title} has {' and '.join(own)}, got '{asked[0]}'."
        raise ExportError(msg)
    return wanted


def _checked(option: str, values: Sequence[str] | None, known: Mapping[str, object]) -> list[str]:
    """What was chosen; empty where nothing was."""
    if values is None:
        return []
    wrong = [value for value in values if value not in known]
    if wrong or not values or isinstance(values, str):
        came = repr(values) if not wrong or isinstance(values, str) else f"'{wrong[0]}'"
        hint = nearest(values if isinstance(values, str) else str(wrong[0]) if wrong else "", known)
        msg = f"{option}: expected a list of {' and '.join(known)}, got {came}.{hint}"
        raise ExportError(msg)
    return list(values)
