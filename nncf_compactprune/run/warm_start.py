"""Going on from the pruned network of another run, towards a smaller one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nncf_compactprune.algorithms import ChannelPruningConfig
from nncf_compactprune.channels import trace
from nncf_compactprune.config import Budget, CompressionConfig
from nncf_compactprune.config.budget import Kind
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import ConfigError, Problem
from nncf_compactprune.plan import Cost
from nncf_compactprune.run.settings import Settings
from nncf_compactprune.run.state import Network, Run
from nncf_compactprune.storage.checkpoint import WEIGHTS_FILE, is_quantized_checkpoint, load_pruned
from nncf_compactprune.storage.plan_file import PLAN_FILE


def check_warm_start(settings: Settings) -> None:
    """There is something to start from.

    :param settings: the config.
    :raises ConfigError: there is not.
    """
    start = settings.run.warm_start
    if start is None:
        return
    missing = [name for name in (PLAN_FILE, WEIGHTS_FILE) if not (Path(start) / name).is_file()]
    if missing:
        message = f"'{start}' is no directory of a finished run: {', '.join(missing)} not found there."
        raise ConfigError(settings.source, [Problem("warm_start", message)])
    for at, entry in enumerate(settings.compression.compression):
        if isinstance(entry, ChannelPruningConfig) and isinstance(entry.budget.latency, (int, float)):
            message = (
                "a share of the time would be a share of the smaller network's that this run starts from. Give a time, "
                'such as "4.5ms", or start from the dense network.'
            )
            raise ConfigError(settings.source, [Problem(f"compression[{at}].budget.latency", message)])
    if is_quantized_checkpoint(start):
        message = f"'{start}' holds a quantized network, whose channels are not cut any more. Start from a run without "
        raise ConfigError(settings.source, [Problem("warm_start", message + "quantization, and quantize the end.")])


def warm_started(run: Run, dense: Network) -> Run:
    """The run with its model cut as the earlier run's, with its weights, and budgets that mean the dense network's.

    :param run: its model is the dense one, and is changed in place.
    :param dense: a copy of it.
    """
    start = run.config.warm_start
    if start is None:
        return run
    graph = trace(dense.model, run.inputs, plugins=run.plugins)
    load_pruned(run.model, start, plugins=run.plugins)
    run.say(f"Going on from the network of {start}")
    cost = Cost(graph.macs, graph.params)
    plan = plan_of(run.model)
    classes = () if plan is None else plan.output_classes
    config = _of_classes(_of_dense(run.settings.compression, cost), classes, run.settings.source)
    return replace(run, settings=replace(run.settings, compression=config))


def _of_dense(config: CompressionConfig, dense: Cost) -> CompressionConfig:
    """Shares become numbers, which mean the same for a smaller network."""
    entries = [
        entry.model_copy(update={"budget": absolute(entry.budget, dense)})
        if isinstance(entry, ChannelPruningConfig)
        else entry
        for entry in config.compression
    ]
    return config.model_copy(update={"compression": entries})


def _of_classes(config: CompressionConfig, classes: tuple[int, ...], source: str) -> CompressionConfig:
    """The classes of the dense network become outputs of one that has some of them left; all of these need no word.

    :param config: its entries may name classes.
    :param classes: those that are left; empty: all.
    :param source: for messages.
    :raises ConfigError: a class has gone.
    """
    entries = []
    for at, entry in enumerate(config.compression):
        wanted = getattr(getattr(entry, "params", None), "classes", None)
        if classes and wanted is not None:
            gone = [c for c in wanted if c not in classes]
            if gone:
                message = f"class {gone[0]} has gone: the network that this run starts from has {list(classes)} left."
                raise ConfigError(source, [Problem(f"compression[{at}].params.classes", message)])
            left = None if len(wanted) == len(classes) else [classes.index(c) for c in wanted]
            entry = entry.model_copy(update={"params": entry.params.model_copy(update={"classes": left})})  # type: ignore[attr-defined]
        entries.append(entry)
    return config.model_copy(update={"compression": entries})


def absolute(budget: Budget, dense: Cost) -> Budget:
    """The budget in numbers.

    :param budget: in shares of the dense network or in numbers.
    :param dense: what that costs.
    """
    costs: dict[Kind, int] = {"macs": dense.macs, "params": dense.params}
    return budget.model_copy(
        update={kind: budget.resolve(kind, costs[kind]) for kind in costs if getattr(budget, kind) is not None}
    )
