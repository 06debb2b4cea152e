"""How fast files are served, side by side on a machine that is not quiet.

Requests go round the files, A B A B, so that what else the machine does falls on all alike, and ratios are taken within
a round. A fixed piece of work in every round tells how steady the machine itself is.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.prepared import Array, reason_of
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.serving.noise import noise_for
from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.server import Server, Serving

NOISY = 0.25
"""Spread of a fixed piece of work, 10th to 90th percentile over the median, above which a machine is called noisy."""
_YARDSTICK = 160  # side of the matrices that are multiplied, about a millisecond
_PERCENTILES = (50, 10, 90, 99)


@dataclass(frozen=True)
class Timing:
    """How one file was served.

    :param path: the file.
    :param runtime: what served it, with its version.
    :param arithmetic: what it computed in, such as ``bf16`` or ``int8 + f32``.
    :param batch: samples of a request.
    :param bytes: of the file on disk, weights beside it included.
    :param median_ms: half of the requests were faster.
    :param p10_ms: a tenth of the requests were faster.
    :param p90_ms: nine tenths were.
    :param p99_ms: 99 of a hundred were.
    :param ratio: time relative to the first file: the median over the rounds.
    :param ratio_spread: tenth and ninetieth percentile of that.
    :param samples_per_second: with as many requests at once as the runtime likes.
    :param throughput_spread: least and most of its rounds.
    :param memory_bytes: what loading the file and serving one request adds to a fresh process; None if not measured.
    :param requests: how many were timed.
    """

    path: Path
    runtime: str
    arithmetic: str
    batch: int
    bytes: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    p99_ms: float
    ratio: float
    ratio_spread: tuple[float, float]
    samples_per_second: float
    throughput_spread: tuple[float, float]
    memory_bytes: int | None
    requests: int


@dataclass(frozen=True)
class Benchmark:
    """Files side by side.

    :param timings: in the order of the files.
    :param steadiness: spread of a fixed piece of work meanwhile: 10th to 90th percentile over the median.
    :param serving: how they were served.
    """

    timings: tuple[Timing, ...]
    steadiness: float
    serving: Serving

    @property
    def noisy(self) -> bool:
        """Whether the machine did too much else for times of single files to mean much."""
        return self.steadiness > NOISY

    def verdict(self) -> str:
        """What the times say, in sentences."""
        machine = f"A fixed piece of work varied by {self.steadiness:.0%}"
        if self.noisy:
            said = [f"{machine}: this machine is too noisy for times to be taken at their word; only ratios are meant."]
        else:
            said = [f"{machine}: the machine was steady."]
        first = self.timings[0]
        for one in self.timings[1:]:
            low, high = one.ratio_spread
            if low <= 1 <= high:
                said.append(
                    f"{one.path} and {first.path} cannot be told apart: {one.ratio:.2f} ({low:.2f} to {high:.2f})."
                )
        return " ".join(said)


def benchmark(
    paths: Sequence[Path],
    *,
    serving: Serving = Serving(),  # noqa: B008  # frozen
    batch: int = 1,
    sample_size: Sequence[int] | None = None,
    seconds: float = 5.0,
    memory: bool = True,
    inputs: Mapping[Path, Sequence[Array]] | None = None,
    plugins: Plugins | None = None,
) -> Benchmark:
    """Serves files in turn and measures latency, throughput and memory.

    Files of one runtime take turns; runtimes follow one another, because worker threads of one spin on for a moment
    after a request. The first file is what the others are compared with, whatever its runtime.

    :param paths: the files, the one to compare with first.
    :param serving: how they are served.
    :param batch: samples of a request.
    :param sample_size: the shape of a sample, where a file leaves it open.
    :param seconds: about how long each file is measured, half for latency and half for throughput.
    :param memory: whether to load every file in a fresh process to see what it takes.
    :param inputs: arrays for a file, in its order; noise by default.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: a file is not there, does not load, or does not take the batch or the device.
    """
    if not paths or seconds <= 0 or batch < 1:
        msg = f"expected at least one file, seconds above 0 and a batch of at least 1, got {len(paths)} files, "
        msg += f"seconds={seconds} and batch={batch}."
        raise ExportError(msg)
    opened = [_open(path, serving, batch, sample_size, (inputs or {}).get(path), plugins) for path in paths]
    yardstick = _yardstick()
    requests, lasts = [], []
    for server, arrays in opened:
        try:
            requests.append(server.request(arrays))
            lasts.append(_warmed_up(requests[-1]))
        except Exception as error:
            shapes = [list(array.shape) for array in arrays]
            msg = f"{server.path}: {server.runtime} fails on inputs {shapes}: {reason_of(error)}."
            raise ExportError(msg) from error
    rounds = max(5, min(1000, round(seconds / 2 / max(float(np.mean(lasts)), 1e-5))))
    steady: list[float] = []
    times = np.zeros((len(paths), rounds))
    for which in _by_runtime(opened):
        for turn in range(rounds):
            steady.append(_timed(yardstick))
            for position in which:
                times[position, turn] = _timed(requests[position])
    floods = np.zeros((len(paths), 3))
    for turn in range(floods.shape[1]):
        for position, (server, arrays) in enumerate(opened):
            served, took = server.flood(arrays, seconds / 2 / floods.shape[1])
            floods[position, turn] = served * batch / took
    low, middle, high = np.percentile(steady, [10, 50, 90])
    timings = [
        _timing(server, batch, times[position], times[0], floods[position], _memory(server, arrays) if memory else None)
        for position, (server, arrays) in enumerate(opened)
    ]
    return Benchmark(tuple(timings), float((high - low) / middle), serving)


def _open(
    path: Path,
    serving: Serving,
    batch: int,
    sample_size: Sequence[int] | None,
    given: Sequence[Array] | None,
    plugins: Plugins | None,
) -> tuple[Server, Sequence[Array]]:
    server = open_server(path, serving, plugins=plugins)
    if server.fixed_batch not in (None, batch):
        msg = f"{path}: takes batches of {server.fixed_batch} only, got --batch {batch}."
        raise ExportError(msg)
    arrays = noise_for(server, batch, sample_size).arrays() if given is None else given
    try:
        return open_server(path, serving, [array.shape for array in arrays], plugins=plugins), arrays
    except ExportError as error:
        msg = f"{error} Inputs were {[list(array.shape) for array in arrays]}."
        raise ExportError(msg) from error


def _by_runtime(opened: Sequence[tuple[Server, Sequence[Array]]]) -> list[list[int]]:
    runtimes: dict[str, list[int]] = {}
    for position, (server, _) in enumerate(opened):
        runtimes.setdefault(server.runtime, []).append(position)
    return list(runtimes.values())


def _warmed_up(request: Callable[[], object], seconds: float = 0.3) -> float:
    """How long a request takes, when caches are full."""
    start, last = time.perf_counter(), _timed(request)
    while time.perf_counter() - start < seconds:
        last = _timed(request)
    return last


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _yardstick() -> Callable[[], object]:
    """Single-threaded work that does not change: sorting, which no thread pool takes part in."""
    values = np.random.default_rng(0).standard_normal(_YARDSTICK**2)
    return lambda: np.sort(values)


def _timing(server: Server, batch: int, times: Array, first: Array, floods: Array, memory: int | None) -> Timing:
    median, p10, p90, p99 = (float(one) for one in np.percentile(times * 1e3, _PERCENTILES))
    low, ratio, high = (float(one) for one in np.percentile(times / first, [10, 50, 90]))
    return Timing(
        server.path,
        server.runtime,
        server.arithmetic,
        batch,
        _bytes(server.path),
        median,
        p10,
        p90,
        p99,
        ratio,
        (low, high),
        float(np.median(floods)),
        (float(floods.min()), float(floods.max())),
        memory,
        len(times),
    )


def _bytes(path: Path) -> int:
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else list(path.parent.glob(f"{path.name}.data"))
    return sum(one.stat().st_size for one in (path, *beside) if one.is_file())


def _memory(server: Server, arrays: Sequence[Array]) -> int | None:
    """What a fresh process holds more, once it has loaded a file and served a request; None for other runtimes."""
    if server.path.suffix not in (".xml", ".onnx"):
        return None
    script = str(Path(__file__).with_name("memory.py"))
    shapes = ["x".join(map(str, array.shape)) for array in arrays]
    command = [sys.executable, script, str(server.path), server.serving.device, server.serving.precision or "", *shapes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    return int(last[0]) if done.returncode == 0 and last and last[0].isdigit() else None
