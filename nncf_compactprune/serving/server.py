"""What a file offers once a runtime serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.options import Pixels
from nncf_compactprune.export.prepared import Array

PRECISIONS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Serving:
    """How a runtime is asked to serve a file.

    :param device: ``CPU``, or another that the runtime has.
    :param precision: ``f32``, ``bf16`` or ``f16``; None leaves it to the runtime, as an ordinary user does.
    :param hint: what to tune for: ``latency`` of single requests, or ``throughput``.
    :param streams: requests that run at once; None leaves it to the runtime.
    :param threads: CPU threads for all of them together; None leaves it to the runtime.
    """

    device: str = "CPU"
    precision: str | None = None
    hint: Literal["latency", "throughput"] = "latency"
    streams: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            msg = f"precision: expected one of {', '.join(PRECISIONS)}, got '{self.precision}'."
            raise ExportError(msg)
        if self.hint not in ("latency", "throughput"):
            msg = f"hint: expected latency or throughput, got '{self.hint}'."
            raise ExportError(msg)
        for name in ("streams", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                msg = f"{name}: expected a number of at least 1, got {value}."
                raise ExportError(msg)


@dataclass(frozen=True)
class Tap:
    """A value inside a file.

    :param operation: the name of the operation that gives it.
    :param kind: the operation's type, such as ``Convolution``.
    :param value: what it gave.
    """

    operation: str
    kind: str
    value: Array


@dataclass(frozen=True)
class Weight:
    """The weight of a convolution or of a matrix product in a file.

    :param operation: the name of the operation.
    :param name: the weight's own name; empty where the file has none.
    :param shape: as torch has it: ``[out, in / groups, k, k]`` or ``[out, in]``.
    :param macs: multiply-accumulates of one request; None where the file's shapes are open.
    :param moved: numbers read and written: input, weight and output; None likewise.
    :param side: height of the input; 0 where it has none, or it is open.
    :param module: of the torch model, by the name of the operation, or of one that reads it where an exporter folded a
        norm into the weight; empty where neither says.
    """

    operation: str
    name: str
    shape: tuple[int, ...]
    macs: int | None = None
    moved: int | None = None
    side: int = 0
    module: str = ""


@dataclass(frozen=True)
class LayerTime:
    """What one operation of the running network takes.

    :param operation: its name in the file, or in the runtime's graph where the runtime made it.
    :param kind: its type in the runtime.
    :param precision: what it computes in: ``f32``, ``bf16``, ``f16``, ``i8``; empty where the runtime does not say.
    :param microseconds: of one request.
    """

    operation: str
    kind: str
    precision: str
    microseconds: float


class Server:
    """A file that a runtime serves. A subclass for every runtime; what one cannot say is empty."""

    #: the runtime, with its version
    runtime: str
    #: what it computes floating point in: ``f32``, ``bf16``, ``f16``
    precision: str
    #: whether quantized arithmetic is in the file
    quantized: bool
    #: whether the weights are float16 in the file
    half_weights: bool
    input_names: tuple[str, ...]
    #: of the file's inputs; None where a dimension is open
    input_shapes: tuple[tuple[int | None, ...], ...]
    #: NumPy's names of the inputs' types
    input_types: tuple[str, ...]
    #: how the file itself normalises the u8 pictures ``[n, h, w, c]`` that it takes; None: it takes what torch takes
    pixels: Pixels | None = None

    def __init__(self, path: Path, serving: Serving) -> None:
        self.path, self.serving = path, serving

    @property
    def arithmetic(self) -> str:
        """In words: ``int8 + bf16`` for a quantized file whose other layers run in bfloat16."""
        return f"int8 + {self.precision}" if self.quantized else self.precision

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file insists on; None: any."""
        return next((shape[0] for shape in self.input_shapes if shape and shape[0] is not None), None)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs in the file's order, for inputs in the file's order."""
        raise NotImplementedError

    def request(self, arrays: Sequence[Array]) -> Callable[[], object]:
        """One request on these inputs, without copies where the runtime can."""
        return lambda: self.run(arrays)

    def flood(self, arrays: Sequence[Array], seconds: float) -> tuple[int, float]:
        """Serves as many requests at once as the runtime likes.

        :param arrays: the inputs of each.
        :param seconds: for how long.
        :return: how many were served, and in how many seconds.
        """
        raise NotImplementedError

    def taps(self, arrays: Sequence[Array]) -> list[Tap]:
        """Every floating-point value that is computed inside the file, in the order of the operations."""
        return []

    def weights(self) -> Iterator[Weight]:
        """The weights of all convolutions and matrix products, in the order of the operations."""
        return iter(())

    def layer_times(self, arrays: Sequence[Array], runs: int, quantile: float = 0.5) -> list[LayerTime]:
        """What every operation takes, as the median of some requests or another quantile.

        :param arrays: the inputs.
        :param runs: how many requests.
        :param quantile: of their times; below the median where other processes slow some of them down.
        """
        return []
