"""Where the time goes, layer by layer, and where it was not saved as multiply-accumulates were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13

from nncf_compactprune.errors import ExportError
from nncf_compactprune.serving.noise import noise_for
from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.server import LayerTime, Serving, Weight

_NOT_SAVED = 0.25  # of the time that the saved MACs would have saved in step
_MEMORY_BOUND = 12  # MACs for each number moved, below which a CPU waits for its memory
_COLOURS = 4  # as many channels may be an image's, which nobody rounds
_VECTOR = 16  # numbers in a 512-bit register


@dataclass(frozen=True)
class LayerPair:
    """A layer of two files.

    :param name: of the layer: its module where that is known, else its operation in the second file.
    :param shape: of its weight in the second file, as torch has it.
    :param macs: multiply-accumulates of one request, in the first and the second file.
    :param microseconds: of one request, in both.
    :param precision: what it computes in, in the second file.
    :param side: height of its input; 0 where it has none.
    :param note: why its time did not go as its multiply-accumulates did; empty where it did.
    """

    name: str
    shape: tuple[int, ...]
    macs: tuple[int, int]
    microseconds: tuple[float, float]
    precision: str
    side: int
    note: str


@dataclass(frozen=True)
class Profile:
    """Two files, layer by layer.

    :param layers: convolutions and matrix products, in the order of the operations.
    :param others: microseconds of all other operations (pooling, additions, changes of layout), in both files.
    """

    layers: tuple[LayerPair, ...]
    others: tuple[float, float]

    @property
    def macs_left(self) -> float:
        """Multiply-accumulates of the second file over the first's."""
        return sum(one.macs[1] for one in self.layers) / max(1, sum(one.macs[0] for one in self.layers))

    @property
    def time_left(self) -> float:
        """Time of the second file over the first's, all operations."""
        first, second = (sum(one.microseconds[at] for one in self.layers) + self.others[at] for at in (0, 1))
        return second / first if first else 1.0


def profile(
    dense: Path,
    pruned: Path,
    *,
    serving: Serving = Serving(),  # noqa: B008  # frozen
    batch: int = 1,
    sample_size: Sequence[int] | None = None,
    runs: int = 20,
    names: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> Profile:
    """Compares two IR files of one architecture, layer by layer, by OpenVINO's own clocks.

    :param dense: the first file.
    :param pruned: the second; also one of the same widths, such as a quantized one.
    :param serving: how both are served.
    :param batch: samples of a request.
    :param sample_size: the shape of a sample, where the file leaves it open.
    :param runs: requests of each.
    :param names: modules of the second network with the shapes of their weights, in the order in which they run.
    :raises ExportError: for other files than IR, or where the two have not the same layers.
    """
    sides = []
    for path in (dense, pruned):
        if path.suffix != ".xml":
            msg = f"{path}: layers are timed in OpenVINO; expected an .xml file."
            raise ExportError(msg)
        server = open_server(path, serving)
        arrays = noise_for(server, server.fixed_batch or batch, sample_size).arrays()
        server = open_server(path, serving, [array.shape for array in arrays])
        sides.append((server, list(server.weights()), server.layer_times(arrays, runs)))
    (_, first, first_times), (second_server, second, second_times) = sides
    if len(first) != len(second):
        msg = f"{dense} has {len(first)} layers, {pruned} has {len(second)}: they are not one architecture."
        raise ExportError(msg)
    known = modules_of(second, names)
    spent = [{one.operation: one for one in times} for times in (first_times, second_times)]
    layers = []
    for before, after in zip(first, second, strict=True):
        clocks = [spent[at].get(one.operation) for at, one in enumerate((before, after))]
        times = tuple(clock.microseconds if clock else 0.0 for clock in clocks)
        pair = LayerPair(
            known.get(after.operation, after.module or after.operation),
            after.shape,
            (before.macs or 0, after.macs or 0),
            (times[0], times[1]),
            clocks[1].precision if clocks[1] else "",
            after.side,
            "",
        )
        note = "; ".join(_notes(pair, after, second_server.quantized))
        layers.append(LayerPair(**{**vars(pair), "note": note}))
    return Profile(tuple(layers), (_rest(first, first_times), _rest(second, second_times)))


def modules_of(weights: Sequence[Weight], names: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Modules of operations: both run in one order, and their weights have one shape.

    :param weights: of a file.
    :param names: modules with the shapes of their weights, in the order in which they run.
    """
    found, left = {}, list(names)
    for weight in weights:
        at = next((at for at, (_, shape) in enumerate(left) if shape == weight.shape), None)
        if at is not None:
            found[weight.operation] = left.pop(at)[0]
    return found


def _rest(weights: Sequence[Weight], times: Sequence[LayerTime]) -> float:
    layers = {one.operation for one in weights}
    return sum(one.microseconds for one in times if one.operation not in layers)


def _notes(pair: LayerPair, weight: Weight, quantized: bool) -> Iterator[str]:
    """What keeps a layer from being as fast as its MACs say."""
    if quantized and pair.precision and pair.precision != "i8":
        yield f"runs in {pair.precision} in a quantized network"
    saved = 1 - pair.macs[1] / pair.macs[0] if pair.macs[0] else 0.0
    if saved <= 0 or not pair.microseconds[0]:
        return
    faster = 1 - pair.microseconds[1] / pair.microseconds[0]
    if faster >= (1 - _NOT_SAVED) * saved:
        return
    yield f"{saved:.0%} of the MACs saved, {max(0.0, faster):.0%} of the time"
    odd = [side for side in weight.shape[:2] if side % _VECTOR and side > _COLOURS]
    if odd:
        yield f"width {' and '.join(map(str, odd))} is no multiple of {_VECTOR}"
    if weight.moved and pair.macs[1] / weight.moved < _MEMORY_BOUND:
        yield f"memory-bound: {pair.macs[1] / weight.moved:.1f} MACs for each number moved"


@dataclass(frozen=True)
class Rounding:
    """What other widths of a layer would take, measured on the layer alone.

    :param width: output channels as they are.
    :param microseconds: of one request with them.
    :param rounded: microseconds by the multiple that the widths are rounded up to.
    """

    width: int
    microseconds: float
    rounded: dict[int, float]


def rounding_of(pair: LayerPair, serving: Serving, multiples: Sequence[int] = (8, 16, 32)) -> Rounding:
    """Times a convolution alone, as it is and with its widths rounded up, in turns.

    :param pair: a convolution, without groups; stride 1 is taken.
    :param serving: how it is served.
    :param multiples: what to round up to.
    """
    (out, into), side = pair.shape[:2], pair.side
    kernel = list(pair.shape[2:])
    widths = {0: (out, into)}
    widths |= {m: (-(-out // m) * m, into if into <= _COLOURS else -(-into // m) * m) for m in multiples}
    core, requests = openvino.Core(), {}
    for multiple, (outputs, inputs) in widths.items():
        given = opset13.parameter([1, inputs, side, side], openvino.Type.f32)
        kernels = opset13.constant(np.ones((outputs, inputs, *kernel), np.float32))
        around = [one // 2 for one in kernel]
        result = opset13.convolution(given, kernels, [1] * len(kernel), around, around, [1] * len(kernel))
        asked = {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
        if serving.precision is not None:
            asked["INFERENCE_PRECISION_HINT"] = serving.precision
        compiled = core.compile_model(openvino.Model([result], [given]), serving.device, asked)
        requests[multiple] = (compiled.create_infer_request(), np.ones((1, inputs, side, side), np.float32))
    taken: dict[int, list[float]] = {multiple: [] for multiple in requests}
    for _ in range(30):
        for multiple, (request, array) in requests.items():
            request.infer([array])
            clocks = [one.real_time.total_seconds() for one in request.profiling_info if "onv" in one.node_type]
            taken[multiple].append(1e6 * sum(clocks))
    medians = {multiple: float(np.median(times[5:])) for multiple, times in taken.items()}
    return Rounding(out, medians.pop(0), medians)
