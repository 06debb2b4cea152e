"""A file in its real consumer: at the precision in which it is served, on real inputs, in several batch sizes.

An export is compared in float32, which shows that the file is right. It is not what a user gets: OpenVINO computes in
bfloat16 or float16 where the device has it, and a quantized file rounds. So the file is opened once more as it is
served, and judged by what counts: how often it decides as torch does, and its own accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.formats import NotLoadedError, existing, in_file_order
from nncf_compactprune.export.options import Pixels
from nncf_compactprune.export.prepared import (
    Array,
    FlatModel,
    ModelInputs,
    evaluation_on_cpu,
    outputs_of,
    reason_of,
)
from nncf_compactprune.export.preprocessing import normalised, pictures_of
from nncf_compactprune.export.tolerances import UNROUNDED
from nncf_compactprune.export.unrounded import can_do_without_rounding, unlike, without_rounding
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.serving.departure import between, from_torch, module_values, relative_error
from nncf_compactprune.serving.noise import noise_for
from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.reference import RealInputs, ServedBatch, TorchSide
from nncf_compactprune.serving.saturation import REMEDY, saturates
from nncf_compactprune.serving.server import Server, Serving

SERVED_TOLERANCES = {"f32": 1e-4, "f16": 2e-2, "bf16": 5e-2, "int8": 1e-1}
"""Largest accepted error by what is computed in, relative to the largest output. bfloat16 keeps 8 bits, and rounding
adds up over the depth: 5e-3 on ResNet-18, 5e-2 on MobileNetV1. Where there are labels, quantized files, and those that
OpenVINO serves in half precision and that are right in float32, are judged by accuracy instead."""
MAX_DROP = 0.01
SHOWN = 3


@dataclass(frozen=True)
class ServedCheck:
    """What was found of one file.

    :param path: the file.
    :param runtime: what served it, with its version.
    :param arithmetic: what it computed in, such as ``bf16`` or ``int8 + f32``.
    :param compared_with: ``torch``, or ``itself in f32`` where the torch model is not at hand.
    :param samples: how many samples were compared.
    :param batch_sizes: in which batches.
    :param error: largest difference relative to the largest output; None where the file does not load.
    :param tolerance: largest accepted one; None where accuracy decides, or what is computed without rounding.
    :param agreement: share of samples with the same first class as torch; None without labels.
    :param accuracy: the file's own, in [0, 1]; None without labels.
    :param torch_accuracy: torch's on the same samples.
    :param widths: how many layers have the plan's widths, and how many there are; None without the torch model.
    :param problems: what is wrong, in sentences; empty when the file is good.
    """

    path: Path
    runtime: str
    arithmetic: str
    compared_with: str
    samples: int
    batch_sizes: tuple[int, ...]
    error: float | None
    tolerance: float | None
    agreement: float | None
    accuracy: float | None
    torch_accuracy: float | None
    widths: tuple[int, int] | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_served(
    path: Path,
    torch_side: TorchSide | None,
    serving: Serving = Serving(),  # noqa: B008  # frozen
    *,
    real: RealInputs | None = None,
    sample_size: Sequence[int] | None = None,
    tolerance: float | None = None,
    max_drop: float = MAX_DROP,
    plugins: Plugins | None = None,
) -> ServedCheck:
    """Serves a file and says how it does. What is wrong with it is told in the result, not raised.

    :param path: the file.
    :param torch_side: the network that it was exported from, on inputs; None compares the file with itself in float32,
        on ``real`` inputs or noise.
    :param serving: how; by default as an ordinary user serves it.
    :param real: images and labels where there is no torch network.
    :param sample_size: the shape of a sample of noise, where the file leaves it open.
    :param tolerance: largest accepted error relative to the largest output; default: by arithmetic.
    :param max_drop: largest accepted loss of accuracy against torch, in [0, 1].
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: when there is no such file, or the device or precision asked for is not there.
    """
    problems = [*_onnx_problems(path)]
    server = open_server(path, serving, plugins=plugins)
    widths = None
    if torch_side is not None:
        widths, wrong = _compare_widths(server, torch_side)
        problems += wrong
        batches = torch_side.batches(server.fixed_batch, server.pixels)
    else:
        batches = _own_batches(path, server, real, sample_size, plugins)
    compared = _Compared(torch_side)
    runs = True
    try:
        for batch in batches:
            compared.add(batch, _served(server, batch))
    except Exception as error:
        runs = False
        shapes = [list(tensor.shape) for tensor in batch.inputs.tensors]
        problems.append(f"{server.runtime} fails on inputs {shapes}: {reason_of(error)}.")
    if torch_side is not None and server.precision != "f32" and not server.quantized and not problems:
        problems += _wrong_in_f32(path, serving, torch_side, batches, plugins)
    judged = False
    if torch_side is not None and server.quantized and runs:
        judged, wrong = _without_rounding(path, server, torch_side, batches, plugins)
        problems += wrong
    labelled = compared.labelled > 0
    source = real if torch_side is None else torch_side
    given = None if source is None else source.samples  # some of which are served twice, alone and in a batch
    whose = "torch's" if torch_side is not None else "in f32 it"
    limit = tolerance if tolerance is not None else _limit(server, labelled or judged)
    off = []
    if limit is not None and not compared.error <= limit:
        off.append(_departs(path, server, torch_side, batches[0], compared, limit, plugins))
    if labelled and compared.torch_correct - compared.correct > max_drop * compared.labelled:
        off.append(
            f"accuracy {compared.accuracy:.2%} as served, {whose} is {compared.torch_accuracy:.2%} on the same "
            f"{compared.labelled} samples. A loss of {100 * max_drop:g} % of the samples is accepted."
        )
    if off and runs and server.quantized and saturates(server):
        off.append(REMEDY)
    problems += off
    return ServedCheck(
        path,
        server.runtime,
        server.arithmetic,
        "torch" if torch_side is not None else "itself in f32",
        compared.labelled or (compared.samples if given is None else min(compared.samples, len(given))),
        tuple(sorted({batch.inputs.batch_size for batch in batches})),
        compared.error,
        limit,
        compared.agreement,
        compared.accuracy,
        compared.torch_accuracy,
        widths,
        tuple(problems),
    )


def not_served(path: Path, error: NotLoadedError) -> ServedCheck:
    """What is found of a file that does not load.

    :param path: the file.
    :param error: why not.
    """
    nothing: tuple[None, None, None, None] = (None, None, None, None)
    return ServedCheck(path, error.runtime, "", "nothing", 0, (), None, *nothing, None, (error.reason,))


def _wrong_in_f32(
    path: Path, serving: Serving, side: TorchSide, batches: Sequence[ServedBatch], plugins: Plugins | None
) -> list[str]:
    """What is wrong with a file whose served precision would hide it: the smallest and the largest batch in float32."""
    if path.suffix == ".onnx":  # is served in the precision of the file
        return []
    exact = open_server(path, replace(serving, precision="f32"), plugins=plugins)
    compared, limit = _Compared(side), SERVED_TOLERANCES["f16" if exact.half_weights else "f32"]
    for batch in {id(one): one for one in (batches[0], batches[-1])}.values():
        compared.add(replace(batch, labels=None), _served(exact, batch))
    return [] if compared.error <= limit else [_departs(path, exact, side, batches[0], compared, limit, plugins)]


class _Compared:
    """Counts over batches."""

    def __init__(self, torch_side: TorchSide | None) -> None:
        self._side = torch_side
        self.error, self.where = 0.0, ""
        self.samples = self.labelled = self.agreeing = self.correct = self.torch_correct = 0

    def add(self, batch: ServedBatch, outputs: Sequence[Array]) -> None:
        if len(outputs) != len(batch.outputs):
            msg = f"{len(outputs)} outputs, expected {len(batch.outputs)}"
            raise ExportError(msg)
        for position, (expected, got) in enumerate(zip(batch.outputs, outputs, strict=True)):
            if expected.shape != got.shape:
                msg = f"output {position} has shape {list(got.shape)}, expected {list(expected.shape)}"
                raise ExportError(msg)
            error = relative_error(expected, got)
            if not error <= self.error:
                self.error, self.where = error, f"output {position}, batch {batch.inputs.batch_size}"
        self.samples += batch.inputs.batch_size
        if batch.labels is not None:
            labels, at = batch.labels.numpy(), 0 if self._side is None else self._side.scores_at
            ours, theirs = (self._first(one[at]) for one in (outputs, batch.outputs))
            self.labelled += len(labels)
            self.agreeing += int((ours == theirs).sum())
            self.correct += int((ours == labels).sum())
            self.torch_correct += int((theirs == labels).sum())

    def _first(self, scores: Array) -> Array:
        chosen = scores[:, self._side.classes] if self._side is not None and self._side.classes else scores
        return np.asarray(chosen.argmax(1))

    @property
    def agreement(self) -> float | None:
        return self.agreeing / self.labelled if self.labelled else None

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    @property
    def torch_accuracy(self) -> float | None:
        return self.torch_correct / self.labelled if self.labelled else None


def _without_rounding(
    path: Path, server: Server, side: TorchSide, batches: Sequence[ServedBatch], plugins: Plugins | None
) -> tuple[bool, list[str]]:
    """A quantized file beside its network, both without the rounding of activations, on the first and last batch.

    :return: whether they can be compared, and what is wrong.
    """
    opened = existing(path, plugins).open_unrounded(path) if can_do_without_rounding(side.model) else None
    if opened is None:
        return False, []
    session, ranges = opened
    compared = _Compared(side)
    with evaluation_on_cpu(side.model) as model, ExitStack() as stack:
        flat = FlatModel(model, batches[0].inputs)
        own = stack.enter_context(without_rounding(flat, batches[0].inputs))
        for batch in {id(one): one for one in (batches[0], batches[-1])}.values():
            expected = outputs_of(flat, batch.inputs)
            compared.add(ServedBatch(batch.inputs, expected, None), session.run(_arrays(server, batch.inputs)))
    wrong = unlike(ranges, own)
    problems = [] if wrong is None else [f"{wrong}."]
    if not compared.error <= UNROUNDED:
        problems.append(
            f"without the rounding of activations it differs from torch by {compared.error:.1e} ({compared.where}), "
            f"more than {UNROUNDED:.0e}."
        )
    return True, problems


def _limit(server: Server, judged: bool) -> float | None:
    """None where something else decides: accuracy of files that are right in f32 and rounded as served; of quantized
    ones that, or what they compute without rounding.

    :param judged: whether there is something else.
    """
    if server.quantized:
        return None if judged else SERVED_TOLERANCES["int8"]
    if judged and server.precision != "f32" and server.path.suffix != ".onnx":
        return None
    return max(SERVED_TOLERANCES[server.precision], SERVED_TOLERANCES["f16"] if server.half_weights else 0.0)


def _served(server: Server, batch: ServedBatch) -> list[Array]:
    return server.run(_arrays(server, batch.inputs))


def _arrays(server: Server, inputs: ModelInputs) -> list[Array]:
    """A request as the file takes it."""
    if server.pixels is not None:
        inputs = replace(inputs, tensors=tuple(pictures_of(one, server.pixels) for one in inputs.tensors))
    return in_file_order(server.path, server.input_names, dict(zip(inputs.names, inputs.arrays(), strict=True)))


def _onnx_problems(path: Path) -> list[str]:
    if path.suffix != ".onnx":
        return []
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # of several kinds, by the finding
        return [f"onnx.checker refuses it: {reason_of(error)}."]
    return []


def _compare_widths(server: Server, side: TorchSide) -> tuple[tuple[int, int] | None, list[str]]:
    """Every layer's weight must be in the file in its shape: by name where the file has names, else by count."""
    found = list(server.weights())
    if not found:
        return None, []
    named = {one.name: one.shape for one in found}
    nameless = Counter(one.shape for one in found if one.name not in side.widths())
    wrong = []
    for name, shape in side.widths().items():
        if named.get(name) == shape:
            continue
        if name not in named and nameless[shape] > 0:
            nameless[shape] -= 1
            continue
        there = f"the file has {list(named[name])}" if name in named else "no weight of the file has this shape"
        wrong.append(f"'{name}' is {list(shape)} by the plan, {there}")
    total = len(side.widths())
    shown = "; ".join(wrong[:SHOWN]) + (f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
    return (total - len(wrong), total), [f"widths differ: {shown}."] if wrong else []


def _departs(
    path: Path,
    server: Server,
    side: TorchSide | None,
    batch: ServedBatch,
    compared: _Compared,
    limit: float,
    plugins: Plugins | None,
) -> str:
    """What to say of outputs that differ: by how much, and the first operation that does.

    A file that differs in float32 too is compared with torch's modules, one that differs only as served with itself.
    """
    said = f"differs from {'torch' if side is not None else 'itself in f32'} by {compared.error:.1e} "
    said += f"({compared.where}), more than {limit:.0e} for {server.arithmetic}."
    arrays = _arrays(server, batch.inputs)
    try:
        exact = open_server(
            path, replace(server.serving, precision=None if path.suffix == ".onnx" else "f32"), plugins=plugins
        )
        taps, found = exact.taps(arrays), None
        if not taps:  # the runtime does not show them
            return said
        if side is not None:
            with evaluation_on_cpu(side.model) as model:
                modules = module_values(FlatModel(model, batch.inputs), batch.inputs.tensors)
            found = from_torch(modules, taps, max(limit, SERVED_TOLERANCES["f16"] if server.half_weights else 0.0))
        found = found or between(taps, server.taps(arrays), limit)
    except Exception as error:  # the finding must not be lost to the search for a place
        return f"{said} Where it begins could not be found: {reason_of(error)}."
    return f"{said} It begins at {found}." if found else f"{said} Every single operation stays below it."


def _own_batches(
    path: Path,
    server: Server,
    real: RealInputs | None,
    sample_size: Sequence[int] | None,
    plugins: Plugins | None,
) -> list[ServedBatch]:
    """Real inputs or noise, and what the file itself makes of them in float32."""
    exact = open_server(path, Serving(precision=None if path.suffix == ".onnx" else "f32"), plugins=plugins)
    requests: list[tuple[ModelInputs, Tensor | None]]
    if real is not None and len(server.input_names) == 1:
        names = server.input_names
        requests = [(ModelInputs(names, (one,), False, {}), known) for one, known in real.requests(server.fixed_batch)]
    else:
        sizes = [server.fixed_batch] if server.fixed_batch else [1, 2]
        requests = [(_as_torch_takes(noise_for(server, size, sample_size), server.pixels), None) for size in sizes]
    return [ServedBatch(inputs, tuple(exact.run(_arrays(exact, inputs))), labels) for inputs, labels in requests]


def _as_torch_takes(inputs: ModelInputs, pixels: Pixels | None) -> ModelInputs:
    if pixels is None:
        return inputs
    return replace(inputs, tensors=tuple(normalised(one, pixels) for one in inputs.tensors))
