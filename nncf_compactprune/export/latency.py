"""How long one request takes, measured so that two networks can be compared on a machine that is not quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.formats import existing, not_loaded
from nncf_compactprune.export.prepared import FlatModel, ModelInputs, evaluation_on_cpu
from nncf_compactprune.plugins import Plugins

BEST_OF = 5  # requests of which the fastest counts


@dataclass(frozen=True)
class Latency:
    """Time of single requests, one after the other, in milliseconds. Of every five requests the fastest counts, as
    other processes only slow one down; of fewer than five, all.

    :param median_ms: half of those that count were faster.
    :param p10_ms: a tenth of them were faster.
    :param p90_ms: nine tenths of them were faster.
    :param runs: how many requests were timed.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def measure_latency(
    models: Mapping[str, str | PathLike[str] | nn.Module],
    inputs: Any,
    *,
    device: str = "CPU",
    runs: int = 50,
    warmup: int = 10,
    plugins: Plugins | None = None,
) -> dict[str, Latency]:
    """Times models in turn, A B A B, so that what else the machine does falls on all of them alike.

    Only models of one runtime take turns, and runtimes follow one another: torch's worker threads spin on after a call
    and would make an OpenVINO request after it look almost twice as slow (0.17 ms became 0.30 ms, 2 cores).

    OpenVINO files are compiled for latency with their shapes fixed to the inputs', in the precision that OpenVINO
    chooses for the device (bfloat16 where a CPU has it): as they would be served.

    :param models: by label: an exported file, or a torch module, which is timed in evaluation mode on the CPU and left
        as it was.
    :param inputs: a tensor, a tuple of tensors, or a dict of keyword arguments; the batch size is theirs. A file takes
        them by name where the names agree, else by position.
    :param device: for files: ``CPU``, or another that the runtime has.
    :param runs: timed requests per model.
    :param warmup: requests before them, per model.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: when a file does not load, does not fit the inputs, or the device is not there.
    """
    if runs < 1 or warmup < 0:
        msg = f"expected runs of at least 1 and warmup of at least 0, got runs={runs} and warmup={warmup}."
        raise ExportError(msg)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        by_runtime: dict[str, dict[str, Callable[[], object]]] = {}
        for label, model in models.items():
            runtime, request = _request(model, inputs, device, stack, plugins)
            by_runtime.setdefault(runtime, {})[label] = request
        times: dict[str, list[int]] = {label: [] for label in models}
        for requests in by_runtime.values():
            for _ in range(warmup):
                for request in requests.values():
                    request()
            for _ in range(runs):
                for label, request in requests.items():
                    start = time.perf_counter_ns()
                    request()
                    times[label].append(time.perf_counter_ns() - start)
    return {label: _summary(taken) for label, taken in times.items()}


def _request(
    model: Any, inputs: Any, device: str, stack: contextlib.ExitStack, plugins: Plugins | None
) -> tuple[str, Callable[[], object]]:
    if isinstance(model, nn.Module):
        tensors = ModelInputs.of(model, inputs)
        flat = FlatModel(stack.enter_context(evaluation_on_cpu(model)), tensors)
        return "torch", lambda: flat.call(tensors.tensors)
    # A positional input has no name without the model, and is then used by position.
    given = ModelInputs.of(nn.Identity(), inputs)
    path = Path(model)
    kind = existing(path, plugins)
    try:
        return kind.runtime, kind.open_timed(path, dict(zip(given.names, given.arrays(), strict=True)), device)
    except ExportError:
        raise
    except Exception as error:
        raise not_loaded(path, kind, error) from error


def _summary(nanoseconds: list[int]) -> Latency:
    whole = len(nanoseconds) // BEST_OF * BEST_OF
    counted = np.array(nanoseconds[:whole]).reshape(-1, BEST_OF).min(1) if whole else np.array(nanoseconds)
    p10, median, p90 = np.percentile(counted / 1e6, [10, 50, 90])
    return Latency(float(median), float(p10), float(p90), len(nanoseconds))
