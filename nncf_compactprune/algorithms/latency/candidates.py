"""Networks of other widths, cut from copies and measured against the dense one."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from torch import nn

from nncf_compactprune.algorithms.base import Context, to_device
from nncf_compactprune.algorithms.latency.cache import MeasurementCache, network_signature
from nncf_compactprune.algorithms.latency.model import Measured
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.cut.masks import drop_masks
from nncf_compactprune.cut.surgery import apply_plan
from nncf_compactprune.errors import ExportError
from nncf_compactprune.host.distributed import is_main_process, said_by_main
from nncf_compactprune.plan import make_plan
from nncf_compactprune.serving.meter import LoadedNetwork, Meter, in_turns, loaded_anew


class Candidates:
    """Measures networks of given widths. Which channels stay makes no difference to the time.

    In a distributed run the main process measures, and all hear what it found.

    :param context: its model, still dense, is copied, and left as it is.
    :param graph: the dense model's channels.
    :param meter: builds what measures; called once, in the process that measures.
    """

    def __init__(self, context: Context, graph: ChannelGraph, meter: Callable[[], Meter]) -> None:
        self._graph, self._plugins = graph, context.plugins
        self._model = copy.deepcopy(context.model)  # the one in training may be cut before the last measurement
        drop_masks(self._model)
        self._model.cpu().eval()
        self._inputs = to_device(context.example_inputs, torch.device("cpu"))
        self._build = meter
        self._session: tuple[Meter, MeasurementCache] | None = None
        self._dense: LoadedNetwork | None = None
        self.title = self._shared(lambda: self._started()[0].title)

    def measure(self, widths: Sequence[float]) -> Measured:
        """Compares the network of these widths with the dense one, unless that was done before.

        :param widths: of all groups, ``[groups]``, whole numbers.
        :raises ExportError: the network cannot be exported, or does not run on the device.
        """
        wanted = tuple(int(width) for width in widths)
        return self._heard(lambda: self._measured(wanted))

    def measure_dense(self) -> Measured:
        """Measures the dense network, whatever is known of it: its ratio is 1, but the machine may be faster or slower
        today.

        :raises ExportError: the network cannot be exported, or does not run on the device.
        """
        return self._heard(lambda: self._compared(self._dense_widths))

    def measure_anew(self, widths: Sequence[int]) -> Measured:
        """Measures a network whatever is known of it, both networks loaded anew. What it finds takes the place of what
        was known.

        :param widths: of all groups, ``[groups]``.
        :raises ExportError: the network does not run on the device any more.
        """
        return self._heard(lambda: self._measured_anew(tuple(widths)))

    def done(self) -> None:
        """The dense network leaves the device; it is loaded again where it is needed."""
        if self._dense is not None:
            self._dense.close()
        self._dense = None

    def _measured(self, widths: tuple[int, ...]) -> Measured:
        _, cache = self._started()
        return cache.get(widths) or self._compared(widths)

    def _compared(self, widths: tuple[int, ...]) -> Measured:
        meter, cache = self._started()
        start = time.perf_counter()
        if self._dense is None:
            self._dense = self._load(meter, self._dense_widths)
        is_dense = widths == self._dense_widths
        network = self._dense if is_dense else self._load(meter, widths)
        try:
            paired = in_turns(self._dense, network)
            layers = _by_module(network)  # after the turns, when the caches are warm
        finally:
            if not is_dense:
                network.close()
        ratio, seconds = 1.0 if is_dense else paired.ratio, time.perf_counter() - start
        one = Measured(widths, ratio, paired.spread, paired.first_ms, layers, seconds)
        cache.add(one)
        return one

    def _measured_anew(self, widths: tuple[int, ...]) -> Measured:
        (meter, cache), known = self._started(), self._measured(widths)
        if widths == self._dense_widths:
            return known
        self.done()
        start = time.perf_counter()
        paired = loaded_anew(lambda: self._load(meter, self._dense_widths), lambda: self._load(meter, widths))
        seconds = time.perf_counter() - start
        one = replace(
            known, ratio=paired.ratio, spread=paired.spread, dense_ms=paired.first_ms, seconds=known.seconds + seconds
        )
        cache.add(one)
        return one

    @property
    def _dense_widths(self) -> tuple[int, ...]:
        return tuple(self._graph.sizes.tolist())

    def _load(self, meter: Meter, widths: Sequence[int]) -> LoadedNetwork:
        return meter.load(self._copy(widths), self._inputs)

    def _copy(self, widths: Sequence[int]) -> nn.Module:
        model = copy.deepcopy(self._model)
        keep = [np.arange(group.size) < width for group, width in zip(self._graph.groups, widths, strict=True)]
        if not all(one.all() for one in keep):
            apply_plan(model, make_plan(self._graph, keep), plugins=self._plugins)
        return model

    def _started(self) -> tuple[Meter, MeasurementCache]:
        if self._session is None:
            meter, signature = self._build(), network_signature(self._model, self._inputs)
            self._session = meter, MeasurementCache(meter.identity, meter.options, signature)
        return self._session

    def _heard(self, work: Callable[[], Measured]) -> Measured:
        found = json.loads(self._shared(lambda: json.dumps(asdict(work()))))
        return Measured(**{**found, "widths": tuple(found["widths"])})

    def _shared(self, work: Callable[[], str]) -> str:
        """What the main process found, or failed with, in every process."""
        found, failed = "", ""
        if is_main_process():
            try:
                found = work()
            except ExportError as error:
                failed = str(error)
        found, failed = map(str, json.loads(said_by_main(json.dumps([found, failed]))))
        if failed:
            raise ExportError(failed)
        return found


def _by_module(network: LoadedNetwork) -> dict[str, float]:
    """Microseconds by module; layers that no module is known for count with the one before them."""
    times: dict[str, float] = {}
    last = ""
    for clock in network.layers():
        last = clock.module or last
        if last:
            times[last] = times.get(last, 0.0) + clock.microseconds
    return times
