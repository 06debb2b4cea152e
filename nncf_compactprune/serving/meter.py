"""What measures a network's latency on a device, and how two networks are compared there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from torch import nn

from nncf_compactprune.export.latency import BEST_OF
from nncf_compactprune.export.prepared import Array

PAIRS = (20, 600)  # least and most requests of each network
SECONDS = 4.0  # of a comparison, beyond the least requests
PATIENCE = 12.0  # seconds where the machine is not quiet
STEADY, UNSTEADY = 0.01, 0.03  # spreads at which a comparison may end early, or takes longer
LOADS = 3  # of both networks, for a figure that is to be relied on
_PARTS = 4


@dataclass(frozen=True)
class MeterOptions:
    """How networks are exported and served to be measured.

    :param device: of the runtime.
    :param precision: of the exported network: ``fp32``, ``fp16`` or ``int8``.
    :param hint: ``latency``, or ``throughput``: time per request at full load.
    :param batch: samples of a request.
    :param threads: CPU threads; None leaves them to the runtime.
    """

    device: str = "CPU"
    precision: str = "fp32"
    hint: Literal["latency", "throughput"] = "latency"
    batch: int = 1
    threads: int | None = None

    @classmethod
    def of(cls, asked: Any) -> MeterOptions:
        """What a budget says.

        :param asked: has the fields of these options.
        """
        return cls(**{field.name: getattr(asked, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        threads = "default threads" if self.threads is None else f"{self.threads} thread{'s' * (self.threads > 1)}"
        hint = "" if self.hint == "latency" else ", throughput"
        return f"{self.precision.upper()}, batch {self.batch}, {threads}{hint}"


@dataclass(frozen=True)
class LayerClock:
    """What one layer takes, with everything up to the next layer.

    :param module: the module whose weight it uses, such as ``layer1.0.conv1``; empty where that is not known.
    :param microseconds: of one request.
    """

    module: str
    microseconds: float


class LoadedNetwork:
    """A network on the device, ready for requests. A subclass for every meter."""

    def request(self) -> float:
        """Serves one request.

        :return: milliseconds that it took.
        """
        raise NotImplementedError

    def layers(self) -> Sequence[LayerClock]:
        """What the layers take, in the order in which they run; empty where the device does not say."""
        return ()

    def close(self) -> None:
        """Takes the network off the device. No request follows."""


class Meter:
    """Base of the meters. A subclass implements :meth:`load`, and says in ``identity`` what it measures on.

    :param options: what the budget asks for.
    :raises ExportError: the device is not there (with those that are), or the runtime has not what is asked.
    """

    #: runtime with version and device with model: measurements of another identity are not used
    identity: str = ""
    #: in words, for messages and reports, such as ``OpenVINO 2025.4 on CPU``
    title: str = ""

    def __init__(self, options: MeterOptions) -> None:
        self.options = options

    def load(self, model: nn.Module, example_inputs: Any) -> LoadedNetwork:
        """Brings a network to the device.

        :param model: a copy on the CPU in evaluation mode, without hooks.
        :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
        :raises ExportError: it cannot be exported or does not run there.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Paired:
    """Two networks, measured in turns.

    :param ratio: time of the second over the first: of every few turns the fastest request of each, and of their ratios
        the median.
    :param spread: half the range of these medians over four consecutive parts, relative to ``ratio``: what
        the ratio itself is uncertain by.
    :param first_ms: median time of the first.
    :param second_ms: of the second.
    :param turns: how many requests of each.
    """

    ratio: float
    spread: float
    first_ms: float
    second_ms: float
    turns: int


def in_turns(first: LoadedNetwork, second: LoadedNetwork) -> Paired:
    """Measures two networks in turns, A B A B, so that what else the machine does falls on both alike.

    :param first: what to compare with.
    :param second: what is compared.
    """
    for network in (first, second):
        _warmed_up(network.request)
    least, most = PAIRS
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < most:
        # The order changes, as a request may find the caches better or worse after the other network's.
        if len(times) % 2:
            after = second.request()
            times.append((first.request(), after))
        else:
            before = first.request()
            times.append((before, second.request()))
        if len(times) >= least and len(times) % (2 * BEST_OF) == 0:
            taken, spread = time.perf_counter() - start, _paired(times).spread
            if taken > (PATIENCE if spread > UNSTEADY else SECONDS):
                break
            if len(times) >= 4 * least and spread < STEADY:
                break
    return _paired(times)


def loaded_anew(first: Callable[[], LoadedNetwork], second: Callable[[], LoadedNetwork]) -> Paired:
    """Measures two networks in turns, several times, each time loaded anew: a figure to be relied on. Where a network
    lies in memory changes its time by a few percent for as long as it is loaded, which no number of turns shows.

    :param first: loads what to compare with.
    :param second: loads what is compared.
    :return: medians over the loads; the spread is that of the ratios of the loads, or that within them if larger.
    """
    found: list[Paired] = []
    for _ in range(LOADS):
        with contextlib.ExitStack() as stack:
            networks = []
            for load in (first, second):
                networks.append(load())
                stack.callback(networks[-1].close)
            found.append(in_turns(*networks))
    ratios = [one.ratio for one in found]
    ratio = float(np.median(ratios))
    within = float(np.median([one.spread for one in found]))
    spread = max(within, (max(ratios) - min(ratios)) / 2 / ratio)
    first_ms = float(np.median([one.first_ms for one in found]))
    return Paired(ratio, spread, first_ms, first_ms * ratio, sum(one.turns for one in found))


def _warmed_up(request: Callable[[], float]) -> None:
    start, runs = time.perf_counter(), 0
    while runs < 3 or (time.perf_counter() - start < 0.2 and runs < 100):
        request()
        runs += 1


def _paired(times: Sequence[tuple[float, float]]) -> Paired:
    whole = np.array(times[: len(times) // BEST_OF * BEST_OF])
    taken: Array = whole.reshape(-1, BEST_OF, 2).min(1)
    ratios = taken[:, 1] / taken[:, 0]
    ratio = float(np.median(ratios))
    parts = [float(np.median(part)) for part in np.array_split(ratios, _PARTS)]
    spread = (max(parts) - min(parts)) / 2 / ratio
    return Paired(ratio, spread, float(np.median(taken[:, 0])), float(np.median(taken[:, 1])), len(times))
