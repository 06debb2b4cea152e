"""Exported files must compute what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.formats import Session, format_of, in_file_order, opened
from nncf_compactprune.export.prepared import (
    Array,
    Prepared,
    Reference,
    outputs_of,
    prepared,
    reason_of,
)
from nncf_compactprune.export.tolerances import ROUNDED, SMALLEST, UNROUNDED
from nncf_compactprune.export.tolerances import TOLERANCES as TOLERANCES
from nncf_compactprune.export.unrounded import Range, can_do_without_rounding, unlike, without_rounding
from nncf_compactprune.plugins import Plugins


@dataclass(frozen=True)
class Verification:
    """What a comparison with torch found.

    :param path: the file.
    :param runtime: the runtime that computed.
    :param max_abs_error: largest absolute difference over all outputs and batches.
    :param max_rel_error: the same, each output's difference divided by its largest absolute value.
    :param tolerance: largest accepted ``max_rel_error``.
    :param batch_sizes: the batch sizes compared; two when the file's batch is dynamic. Empty for inputs without one.
    """

    path: Path
    runtime: str
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    batch_sizes: tuple[int, ...]


def verify_export(
    model: nn.Module,
    path: str | PathLike[str],
    inputs: Any,
    *,
    tolerance: float | None = None,
    plugins: Plugins | None = None,
) -> Verification:
    """Opens a file in its runtime and compares it with torch, at two batch sizes where the file's may vary.

    :param model: the model the file was exported from; it is left as it was.
    :param path: an exported file.
    :param inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
    :param tolerance: largest accepted error relative to the largest absolute output; default: by the file's arithmetic,
        see :data:`TOLERANCES`.
    :param plugins: where formats come from; the installed plugins by default.
    :return: what was compared; that it is returned says that the file was close enough.
    :raises ExportError: when the file does not load, does not run, or differs by more than the tolerance.
    """
    file = Path(path)
    session = opened(file, plugins)
    with prepared(model, inputs, dynamic_batch=session.dynamic_batch) as ready:
        return compare_with(ready, session, file, file, tolerance, plugins)


def compare_with(
    ready: Prepared, session: Session, file: Path, shown_as: Path, tolerance: float | None, plugins: Plugins | None
) -> Verification:
    """Compares a file with the model that it was exported from; a quantized one without rounding, too.

    :param ready: the model.
    :param session: the file, opened in its runtime.
    :param file: the file, which may still be in its staging place.
    :param shown_as: the path for messages and the result.
    :param tolerance: largest accepted error relative to the largest absolute output; default: by arithmetic. Without
        rounding no less than :data:`UNROUNDED`.
    :param plugins: where formats come from.
    :raises ExportError: it computes something else, or has other quantizers.
    """
    unrounded = format_of(file, plugins).open_unrounded(file) if can_do_without_rounding(ready.flat.model) else None
    if unrounded is None:
        return compare(session, shown_as, ready.references, ready.output_names, tolerance)
    exact, ranges = unrounded
    with without_rounding(ready.flat, ready.trace_inputs) as own:
        references = [Reference(one.inputs, outputs_of(ready.flat, one.inputs)) for one in ready.references]
    exact = replace(exact, arithmetic=session.arithmetic)
    compare_unrounded(exact, shown_as, references, ready.output_names, ranges, own, tolerance)
    limit = ROUNDED if tolerance is None else tolerance
    return compare(session, shown_as, ready.references, ready.output_names, limit)


def compare_unrounded(
    session: Session,
    shown_as: Path,
    references: Sequence[Reference],
    output_names: Sequence[str],
    ranges: Sequence[Range],
    own: Sequence[Range],
    tolerance: float | None = None,
) -> None:
    """Compares a quantized file and its network, both without the rounding of activations.

    :param session: the file without it.
    :param shown_as: see :func:`compare`.
    :param references: batches with what the network computes on them without it.
    :param output_names: one per output, in order.
    :param ranges: of the file's quantizers.
    :param own: of the network's.
    :param tolerance: see :func:`compare`; no less than :data:`UNROUNDED`.
    :raises ExportError: the file computes something else, or has other quantizers.
    """
    session = replace(session, runtime=f"{session.runtime}, without the rounding of activations,")
    compare(session, shown_as, references, output_names, max(UNROUNDED, tolerance or 0.0))
    if wrong := unlike(ranges, own):
        msg = f"{shown_as}: {wrong}. The file was not exported from this model as it is."
        raise ExportError(msg)


def compare(
    session: Session,
    shown_as: Path,
    references: Sequence[Reference],
    output_names: Sequence[str],
    tolerance: float | None,
) -> Verification:
    """Runs a session on every reference batch.

    :param session: the file, opened in its runtime.
    :param shown_as: the path for messages and the result; the file may still be in its staging place.
    :param references: batches with what torch computes on them.
    :param output_names: one per output, in order.
    :param tolerance: largest accepted error relative to the largest absolute output; None: see :data:`TOLERANCES`.
    :raises ExportError: naming file, runtime, output, batch, error and tolerance.
    """
    limit = TOLERANCES[session.arithmetic] if tolerance is None else tolerance
    worst_abs = worst_rel = 0.0
    worst_at = ""
    for reference in references:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in reference.inputs.tensors)
        for name, expected, got in zip(
            output_names, reference.outputs, _run(session, shown_as, reference, shapes), strict=True
        ):
            if expected.shape != got.shape:
                msg = (
                    f"{shown_as}: {session.runtime} returns output '{name}' with shape {list(got.shape)} for input "
                    f"{shapes}, torch {list(expected.shape)}."
                )
                raise ExportError(msg + _batch_remedy(session))
            absolute, relative = _error(expected, got)
            worst_abs = max(worst_abs, absolute)
            if relative > worst_rel:
                worst_rel, worst_at = relative, f"output '{name}', input {shapes}"
    # Written so that a NaN fails.
    if not worst_rel <= limit:
        msg = (
            f"{shown_as}: {session.runtime} differs from torch by {worst_rel:.2e} of the largest output "
            f"({worst_at}), more than the tolerance {limit:.0e} for {session.arithmetic}. "
            "The file was not exported from this model as it is, or the precision is too low for it: export fp32, "
            "or pass a larger tolerance."
        )
        if worst_abs <= SMALLEST:
            msg += (
                f" They are {worst_abs:.0e} apart, which can be rounding: the outputs are next to nothing for these "
                "inputs. Pass example_inputs that the network answers to, such as a picture."
            )
        raise ExportError(msg)
    sizes = tuple(next((int(t.shape[0]) for t in r.inputs.tensors if t.dim()), 0) for r in references)
    return Verification(shown_as, session.runtime, worst_abs, worst_rel, limit, tuple(s for s in sizes if s))


def _run(session: Session, shown_as: Path, reference: Reference, shapes: str) -> list[Array]:
    named = dict(zip(reference.inputs.names, reference.inputs.arrays(), strict=True))
    arrays = in_file_order(shown_as, session.input_names, named)
    try:
        outputs = session.run(arrays)
    except Exception as error:
        msg = f"{shown_as}: {session.runtime} fails on input {shapes}: {reason_of(error)}."
        raise ExportError(msg + _batch_remedy(session)) from error
    if len(outputs) != len(reference.outputs):
        msg = f"{shown_as}: {session.runtime} returns {len(outputs)} outputs, torch {len(reference.outputs)}."
        raise ExportError(msg)
    return outputs


def _batch_remedy(session: Session) -> str:
    said = " Where the model has its batch size written into it, pass dynamic_batch=False."
    return said if session.dynamic_batch else ""


def _error(expected: Array, got: Array) -> tuple[float, float]:
    if expected.size == 0:
        return 0.0, 0.0
    difference = np.abs(expected.astype(np.float64) - got.astype(np.float64))
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    absolute = float(difference.max())
    scale = float(np.abs(expected.astype(np.float64)).max())
    return absolute, absolute / scale if scale else absolute
