"""How long requests take of a run's networks: as files, and under the settings of its budgets of latency."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from nncf_compactprune.algorithms.channel_pruning import ChannelPruningConfig
from nncf_compactprune.algorithms.latency.target import TOLERANCE
from nncf_compactprune.config import Budget
from nncf_compactprune.export import QUANTIZED, ExportedFile, measure_latency
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.run.compress import Compressed
from nncf_compactprune.run.models import ExampleInputs
from nncf_compactprune.run.progress import tracked
from nncf_compactprune.run.state import Run
from nncf_compactprune.serving.meter import LoadedNetwork, Meter, MeterOptions, loaded_anew

Times = dict[str, dict[str, float]]


def times_of_files(files: Mapping[str, Sequence[ExportedFile]], example: ExampleInputs) -> Times:
    """Milliseconds of a request by network and file label; dense and pruned of one format and precision are timed in
    turn. An INT8 file takes turns with the dense files of its format.

    :param files: by network.
    :param example: what they are called with.
    """
    result: Times = {network: {} for network in files}
    every = [(network, file) for network, exported in files.items() for file in exported]
    mixed = any(file.precision == QUANTIZED for _, file in every)
    turns: dict[str, dict[str, tuple[str, ExportedFile]]] = {}
    for network, file in every:
        turns.setdefault(file.format if mixed else file.label, {})[f"{network} {file.label}"] = (network, file)
    with tracked(list(turns.values()), "Measuring latency") as groups:
        for group in groups:
            timed = measure_latency({key: file.path for key, (_, file) in group.items()}, example)
            for key, latency in timed.items():
                network, file = group[key]
                result[network][file.label] = latency.median_ms
    return result


def times_of_budgets(run: Run, compressed: Compressed) -> Times:
    """Milliseconds of a request as the budgets of latency ask to measure it, by network and by these settings: of the
    finished networks, loaded anew. Of a quantized network it is what the budget measured of its widths.

    :param run: is told where a budget does not hold.
    :param compressed: the networks.
    """
    result: Times = {"dense": {}, "pruned": {}}
    for entry in run.settings.compression.compression:
        if not isinstance(entry, ChannelPruningConfig) or entry.budget.latency is None:
            continue
        found, quantized = compressed.latency.get(entry.algorithm), carries_hooks(compressed.pruned.model)
        if quantized and found is None:
            continue  # it was decided in a process that was killed
        run.say("Measuring latency as the budget asks")
        build = run.plugins.resolve("latency_meters", entry.budget.runtime)
        meter: Meter = build(MeterOptions.of(entry.budget))
        label = f"budget: {meter.title}, {meter.options}"
        if quantized and found is not None:
            result["dense"][label], result["pruned"][label] = found.dense_ms, found.ms
            continue
        networks = (compressed.dense.model, compressed.pruned.model)
        paired = loaded_anew(*(partial(_loaded, meter, copy.deepcopy(one), run.example) for one in networks))
        result["dense"][label], result["pruned"][label] = paired.first_ms, paired.second_ms
        asked = _asked(entry.budget, paired.first_ms) if found is None else found.asked_ms / found.dense_ms
        if paired.ratio > asked * (1 + TOLERANCE):
            run.say(
                f"Warning: latency of '{entry.algorithm}': the finished network takes {paired.ratio:.1%} of the dense "
                f"one's time (± {paired.spread:.1%}), asked {asked:.1%}; {meter.title}, {meter.options}"
            )
    return result


def _loaded(meter: Meter, model: nn.Module, example: ExampleInputs) -> LoadedNetwork:
    return meter.load(model.cpu().eval(), example)


def _asked(budget: Budget, dense_ms: float) -> float:
    """As a share of the dense network's time."""
    return budget.resolve("latency", round(1e6 * dense_ms)) / (1e6 * dense_ms)
