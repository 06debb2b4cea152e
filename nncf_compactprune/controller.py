"""The way in: NNCF-style ``create_compressed_model`` with its controller, and one-shot ``prune``."""

from __future__ import annotations

import copy
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nncf_compactprune.algorithms import ChannelPruning, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.latency import LatencyResult
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import CompressionConfig, load_algorithm, load_config
from nncf_compactprune.config.reading import one_of
from nncf_compactprune.cut.self_check import SelfCheck
from nncf_compactprune.errors import CompactPruneError, ConfigError, Problem, nearest
from nncf_compactprune.export import ExportedFile, export_model
from nncf_compactprune.export.formats import format_of
from nncf_compactprune.host.calls import rows_of
from nncf_compactprune.host.distributed import refuse_wrapped, retire_wrappers
from nncf_compactprune.host.graph_modules import back_to_graph_module, plain_or_back
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.host.tensors import copy_in
from nncf_compactprune.host.torch_internals import tree_map
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins, default_plugins

STATE_VERSION = 1


class Scheduler:
    """Steps all algorithms of a controller, as NNCF 2.x's scheduler does.

    Call :meth:`epoch_step` at the start of every epoch and :meth:`step` before every training step.
    """

    def __init__(self, controller: CompressionController) -> None:
        self._controller = controller
        self.current_epoch = -1
        self.current_step = -1

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Begins the next epoch, or ``next_epoch`` (counted from 0)."""
        self.current_epoch = self.current_epoch + 1 if next_epoch is None else next_epoch
        self._controller.follow_model()
        for algorithm in self._controller.begun:
            algorithm.epoch_step(self.current_epoch)
        self._controller.tell_of_waiting()

    def step(self, next_step: int | None = None) -> None:
        """Begins the next training step, or ``next_step`` (counted from 0)."""
        self.current_step = self.current_step + 1 if next_step is None else next_step
        for algorithm in self._controller.begun:
            algorithm.step(self.current_step)

    def get_state(self) -> dict[str, int]:
        """Where it is."""
        return {"current_epoch": self.current_epoch, "current_step": self.current_step}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continues where :meth:`get_state` was taken."""
        self.current_epoch, self.current_step = state["current_epoch"], state["current_step"]


@dataclass(frozen=True)
class Statistics:
    """Figures of every algorithm, by name; the second entry of one name is ``"name (2)"``."""

    algorithms: Mapping[str, Mapping[str, Any]]

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Names and figures, as NNCF 2.x's give them."""
        return iter(self.algorithms.items())

    def __getattr__(self, name: str) -> Mapping[str, Any]:
        """The figures of one algorithm: ``statistics.filter_pruning``."""
        try:
            return vars(self)["algorithms"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    def only(self, name: str) -> Statistics:
        """Those of one algorithm."""
        return Statistics({key: figures for key, figures in self.algorithms.items() if key.split(" (")[0] == name})

    def to_str(self) -> str:
        """A table for logs."""
        table = Table("algorithm", "figure", "value")
        for name, figures in self.algorithms.items():
            for figure, value in figures.items():
                table.add_row(name, figure, str(value))
        console = Console(file=io.StringIO(), width=100)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


class CompressionController:
    """Drives the compression of one model; interface and names as in NNCF 2.x.

    :param context: the model and what its algorithms work with.
    :param algorithms: in the order of the configuration, from which :func:`create_compressed_model` builds them. They
        act in this order too, but for those that begin earlier or later by their nature
        (:class:`~nncf_compactprune.algorithms.base.Begins`).
    """

    def __init__(self, context: Context, algorithms: Sequence[CompressionAlgorithm]) -> None:
        self._context = context
        self.algorithms = tuple(sorted(algorithms, key=lambda algorithm: algorithm.begins))
        self.scheduler = Scheduler(self)
        self._begun = 0
        self._told = False
        for algorithm in self.algorithms:
            algorithm.capture()

    def begin(self, states: Sequence[Mapping[str, Any] | None] | None = None) -> None:
        """Starts every algorithm whose predecessors in the list let it.

        :param states: of algorithms that an earlier run had begun; None for the others.
        """
        for at, algorithm in enumerate(self.algorithms[self._begun :], self._begun):
            if not all(earlier.lets_begin(algorithm.begins) for earlier in self.started):
                return
            algorithm.prepare(None if states is None else states[at])
            self._begun += 1

    def follow_model(self) -> None:
        """The model may have been moved to another device or precision since it was given."""
        self._context.follow_model()

    def tell_of_waiting(self) -> None:
        """Says once that algorithms wait for a cut which only :meth:`strip` will bring."""
        waiting = [a.name for a in self.algorithms[self._begun :]]
        if self._told or not waiting or self._context.optimizer is not None:
            return
        full, cuts = CompressionStage.FULLY_COMPRESSED, [a for a in self.started if isinstance(a, ChannelPruning)]
        holding = [a.name for a in cuts if not a.settled and a.stage() is full]
        if not holding:
            return
        self._told = True
        nncf_logger.warning(
            f"{', '.join(waiting)} waits for the cut of '{holding[0]}', which comes at strip() only, as no optimizer "
            "is known. Call ctrl.attach(optimizer=...) before the training: the network is then cut when its schedule "
            "ends, and what waits takes part in the training."
        )

    @property
    def begun(self) -> Iterator[CompressionAlgorithm]:
        """The algorithms at work, in order; one that settles the model on the way lets the next begin."""
        at = 0
        while at < self._begun:
            yield self.algorithms[at]
            self.begin()
            at += 1

    @property
    def started(self) -> Sequence[CompressionAlgorithm]:
        """The algorithms that have begun."""
        return self.algorithms[: self._begun]

    @property
    def model(self) -> nn.Module:
        """The model under compression."""
        return self._context.model

    @property
    def example_inputs(self) -> Any:
        """What the model is traced, checked and exported with."""
        return self._context.example_inputs

    @property
    def plugins(self) -> Plugins:
        """Where algorithms, criteria, rules and formats come from."""
        return self._context.plugins

    def copied(self) -> CompressionController:
        """A controller of a copy of the model, as far as this one is: what happens to the copy leaves this one alone.
        Loader and plugins are shared; optimizer and EMA copy stay here."""
        context = self._context
        memo: dict[int, Any] = {id(context.plugins): context.plugins}
        if context.train_loader is not None:
            memo[id(context.train_loader)] = context.train_loader
        left = context.optimizer, context.ema
        context.optimizer = context.ema = None
        try:
            return copy.deepcopy(self, memo)
        finally:
            context.optimizer, context.ema = left

    def attach(self, *, optimizer: Optimizers | None = None, ema: object | None = None) -> None:
        """Lets the model shrink *while training*: as soon as the schedule reaches its target the channels are cut, the
        optimizer's state and the EMA copy along with them, and the remaining epochs are really cheaper. With
        ``shrink_every`` they are cut on the way, too. Without an optimizer the masks stay on until :meth:`strip`.

        :param optimizer: holds the model's parameters, or several that share them out (Muon for matrices beside
            AdamW). Their references stay valid. They replace what was attached before.
        :param ema: a shadow copy (timm's ``ModelEma*``, ``torch.optim.swa_utils.AveragedModel``, or a plain copy).
        :raises CompactPruneError: there is no copy of the model in ``ema``.
        """
        if ema is not None:
            copy_in(ema, self.model)
        self._context.optimizer = optimizer if optimizer is not None else self._context.optimizer
        self._context.ema = ema if ema is not None else self._context.ema
        for algorithm in self.started:
            algorithm.attached()

    def loss(self) -> Tensor | float:
        """What to add to the task's loss."""
        return sum((algorithm.loss() for algorithm in self.started), 0.0)

    @property
    def adding_to_loss(self) -> list[str]:
        """Names of the algorithms that want :meth:`loss` in the task's loss; a loop that leaves it out is wrong."""
        return [algorithm.name for algorithm in self.algorithms if algorithm.adds_to_loss]

    def statistics(self) -> Statistics:
        """Figures of every algorithm."""
        figures: dict[str, Mapping[str, Any]] = {}
        names = Counter[str]()
        for algorithm in self.started:
            names[algorithm.name] += 1
            at = names[algorithm.name]
            figures[algorithm.name if at == 1 else f"{algorithm.name} ({at})"] = algorithm.statistics()
        return Statistics(figures)

    def compression_stage(self) -> CompressionStage:
        """The least advanced algorithm's stage; partial as soon as one has begun."""
        waiting = [CompressionStage.UNCOMPRESSED] * (len(self.algorithms) - self._begun)
        stages = [algorithm.stage() for algorithm in self.started] + waiting
        if len(set(stages)) == 1:
            return stages[0]
        return CompressionStage.PARTIALLY_COMPRESSED

    @property
    def compression_rate(self) -> float:
        """Largest share of the cost removed by any algorithm, in [0, 1)."""
        return max((algorithm.compression_rate for algorithm in self.started), default=0.0)

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        for algorithm in self.begun:
            if algorithm.adjustable:
                algorithm.compression_rate = value

    @property
    def maximal_compression_rate(self) -> float:
        """The largest rate that can be set."""
        return min((a.maximal_compression_rate for a in self.started if a.adjustable), default=0.0)

    def disable_scheduler(self) -> None:
        """The schedules of the algorithms with a rate end: what :attr:`compression_rate` is set to is the target."""
        for algorithm in self.begun:
            algorithm.disable_scheduler()

    def get_compression_state(self) -> dict[str, Any]:
        """JSON-able state: pass it to :func:`create_compressed_model` with the dense model, then load the weights."""
        return {
            "version": STATE_VERSION,
            "scheduler": self.scheduler.get_state(),
            "algorithms": [
                {"name": a.name, "state": a.get_state() if at < self._begun else None}
                for at, a in enumerate(self.algorithms)
            ],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Algorithms with a rate go back to an earlier state of this run, in place; load the weights after. Schedules
        stay where they are.

        :param state: what :meth:`get_compression_state` gave, of this run or of one with the same configuration.
        :raises CompactPruneError: an algorithm cannot go back, as the model is cut.
        """
        states = _states(state, self.algorithms)
        for at, algorithm in enumerate(self.begun):
            earlier = states[at]
            if earlier is not None and algorithm.adjustable:
                algorithm.load_state(earlier)

    def strip(self) -> nn.Module:
        """Ends the compression: cuts what is still masked and removes every hook. In place; returns the model."""
        self.follow_model()
        for algorithm in self.begun:
            algorithm.strip()
        back_to_graph_module(self.model)
        self._context.plugins.emit("stripped", model=self.model)
        return self.model

    def export_model(
        self, path: str | os.PathLike[str], *, precisions: Sequence[str] | None = None
    ) -> list[ExportedFile]:
        """Strips the model and writes it to ONNX (``.onnx``) or OpenVINO IR (``.xml``), reopened and compared.

        :param path: the file; its suffix says the format, one of those that plugins offer.
        :param precisions: ``fp32``, ``fp16``; with both, the second file has ``_fp16`` in its name. Default: ``fp32``,
            or ``int8`` of a quantized model, which has no other.
        :raises StorageError: the file cannot be written.
        :raises ExportError: unknown suffix, or the file computes something else.
        """
        plugins = self._context.plugins
        format_of(Path(path), plugins)  # a mistake is told before the model is stripped
        files = export_model(
            self.strip(), self._context.example_inputs, Path(path), precisions=precisions, plugins=plugins
        )
        self._context.plugins.emit("exported", files=files)
        return files


def create_compressed_model(
    model: nn.Module,
    config: CompressionConfig | str | os.PathLike[str] | Mapping[str, Any],
    train_loader: Iterable[Any] | None = None,
    compression_state: Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    plugins: Plugins | None = None,
    teacher: nn.Module | None = None,
    shared: Mapping[Any, Any] | None = None,
) -> tuple[CompressionController, nn.Module]:
    """Builds every algorithm of a configuration on a model, in the order of the list.

    The model is compressed in place and returned. One-shot pruning happens here, before an optimizer is built.

    :param model: a trained model, dense (also when continuing from ``compression_state``).
    :param config: a configuration, its path, or a dict.
    :param train_loader: batches of ``(inputs, targets)`` or keyword dicts, for BatchNorm adaptation and for algorithms
        that need data.
    :param compression_state: what :meth:`CompressionController.get_compression_state` gave in an earlier run. The plan
        is replayed; load the weights after.
    :param example_inputs: what to trace with; default: built from the configuration's ``input_info``, without which it
        is taken from the training loader.
    :param plugins: where algorithms, criteria and rules come from; the installed plugins by default.
    :param teacher: for algorithms that distil; default: a copy of the model as it is now. Put into eval mode.
    :param shared: live objects that algorithms look for, by their class, such as
        :class:`~nncf_compactprune.algorithms.filter_pruning.learned_ranking.RankingTraining`.
    :return: controller and model.
    :raises ConfigError: every problem of the configuration at once.
    :raises CompactPruneError: nothing prunable, unreachable budget, scope without a match, and the like; the model is
        untouched.
    """
    refuse_wrapped(model)
    retire_wrappers(model)
    plugins = plugins or default_plugins()
    if not isinstance(config, CompressionConfig):
        config = load_config(config, plugins)
    aware = config.accuracy_aware_training
    search = aware is not None and aware.searches
    context = Context(model, example_inputs, plugins, train_loader, teacher=teacher, hold_masks=search)
    context.shared.update(shared or {})
    if example_inputs is None:
        found = _first_examples(context) if not config.input_info else None
        context.example_inputs = found if found is not None else _varied(config.example_inputs(context.device))
    algorithms = [_build(plugins, entry, context) for entry in config.compression]
    controller = CompressionController(context, algorithms)
    states = _states(compression_state, controller.algorithms)
    with plain_or_back(model):
        controller.begin(states)
    if compression_state is not None:
        controller.scheduler.load_state(compression_state["scheduler"])
    return controller, model


def _build(plugins: Plugins, entry: Any, context: Context) -> CompressionAlgorithm:
    algorithm: Any = plugins.get_algorithm(entry.algorithm)
    return algorithm(entry, context)  # type: ignore[no-any-return]


def _states(
    state: Mapping[str, Any] | None, algorithms: Sequence[CompressionAlgorithm]
) -> list[Mapping[str, Any] | None]:
    if state is None:
        return [None] * len(algorithms)
    try:
        names = [entry["name"] for entry in state["algorithms"]]
        states = [entry["state"] for entry in state["algorithms"]]
    except (KeyError, TypeError) as error:
        got = type(state).__name__
        msg = f"compression_state: expected what get_compression_state() gave, got {got} without {error}."
        raise CompactPruneError(msg) from error
    expected = [algorithm.name for algorithm in algorithms]
    if names != expected or state.get("version") != STATE_VERSION:
        msg = (
            f"compression_state: made by {names} (version {state.get('version')}), but the configuration has "
            f"{expected} (version {STATE_VERSION}). Use the configuration of that run."
        )
        raise CompactPruneError(msg)
    return states


def _first_examples(context: Context) -> Any:
    """Two examples of the first batch; None without a training loader."""
    batch = next(context.batches(), None)
    return rows_of(batch, 0, 2)


def _varied(example_inputs: Any) -> Any:
    """Constant floats (NNCF's default filler) become seeded noise: on equal pixels many wrong cuts would go unseen."""
    generator = torch.Generator().manual_seed(0)

    def vary(leaf: Any) -> Any:
        if (
            isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.numel()
            and bool((leaf == leaf.view(-1)[0]).all())
        ):
            return torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf

    return tree_map(vary, example_inputs)


def refuse_to_shrink_on_the_way(controller: CompressionController, wrapper: str) -> None:
    """Several cuts while training need somebody who wraps the network again after each.

    :param controller: of the network.
    :param wrapper: who holds it and does not follow, for the message.
    :raises CompactPruneError: an entry has ``shrink_every``.
    """
    for algorithm in controller.algorithms:
        if algorithm.shrinks_on_the_way:
            msg = (
                f"{wrapper} holds the network on several devices and does not follow when it shrinks. Leave out "
                f"'shrink_every' of '{algorithm.name}' (channels are then masked, and cut at the end), train on one "
                "device, or use a loop of your own that wraps the network again, as examples/torchrun_ddp.py does."
            )
            raise CompactPruneError(msg)


@dataclass(frozen=True)
class PruningResult:
    """What :func:`prune` did.

    :param model: the same object, now smaller.
    :param plan: what was removed; write ``plan.to_json()`` beside the weights to rebuild the model elsewhere.
    :param graph: the dense model's channels.
    :param self_check: how far the pruned model is from the masked one.
    :param seconds: wall time of each part (``"trace"``, ``"scores"``, ``"allocation"``, ``"surgery"``; the self-check's
        forwards are inside ``"surgery"`` and stated in ``self_check.seconds``; ``"latency"`` is the measurements).
    :param latency: what a budget of latency came to, with all that was measured; None without one.
    """

    model: nn.Module
    plan: PruningPlan
    graph: ChannelGraph
    self_check: SelfCheck | None
    seconds: Mapping[str, float]
    latency: LatencyResult | None = None


def prune(
    model: nn.Module,
    example_inputs: Any,
    algorithm: str = "fbnet_pruning",
    *,
    budget: Mapping[str, Any] | None = None,
    train_loader: Iterable[Any] | None = None,
    ignored_scopes: Sequence[str] = (),
    target_scopes: Sequence[str] | None = None,
    initializer: Mapping[str, Any] | None = None,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
    **more: Any,
) -> PruningResult:
    """Prunes a model in place, at once.

    .. code-block:: python

        result = prune(model, torch.randn(1, 3, 224, 224), budget={"macs": 0.5}, importance="l1")

    :param model: a trained model.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; MACs are counted for it.
    :param algorithm: a pruning algorithm by name.
    :param budget: what may be left: ``{"macs": 0.5}``, ``{"params": "3M"}``, measured ``{"latency": "4.5ms"}``, or
        several at once. ``filter_pruning`` has targets in its place: ``pruning_flops_target=0.5``.
    :param train_loader: batches for BatchNorm adaptation and for criteria that need data; none: no adaptation.
    :param ignored_scopes: what stays whole, in NNCF's scope grammar, see :mod:`nncf_compactprune.decide.scopes`.
    :param target_scopes: what alone may be pruned; default: everything.
    :param initializer: what happens right after the cut, as in a configuration: ``{"refit": {}}`` re-fits the layers
        around it to the dense ones.
    :param optimizer: one or several, whose state is cut along.
    :param ema: a shadow copy of the model; it is cut along.
    :param plugins: where algorithms, criteria and rules come from; the installed plugins by default.
    :param more: the algorithm's ``params`` (``round_to``, ``allocation``, ...), and what other keys its entry in a
        configuration has (``generation`` of ``data_free_layerwise``).
    :raises ConfigError: a wrong argument.
    :raises CompactPruneError: nothing prunable, unreachable budget, failed self-check; the model is untouched.
    """
    refuse_wrapped(model)
    retire_wrappers(model)
    plugins = plugins or default_plugins()
    sections, params = _sorted_out(more, algorithm, plugins)
    entry: dict[str, Any] = {
        **sections,
        "algorithm": algorithm,
        "ignored_scopes": list(ignored_scopes),
        "params": {**getattr(plugins.algorithms.get(algorithm), "at_once", {}), **params},
    }
    if budget is not None:
        entry["budget"] = dict(budget)
    if target_scopes is not None:
        entry["target_scopes"] = list(target_scopes)
    if initializer is not None:
        entry["initializer"] = dict(initializer)
    config = load_algorithm(entry, plugins, source="prune")
    context = Context(model, example_inputs, plugins, train_loader, optimizer, ema)
    built: Any = _build(plugins, config, context)
    with plain_or_back(model):
        built.prepare()
        built.strip()
    back_to_graph_module(model)
    return PruningResult(model, built.final_plan, built.graph, built.self_check, dict(context.seconds), built.latency)


def _sorted_out(
    given: Mapping[str, Any], algorithm: str, plugins: Plugins
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Keywords of :func:`prune`: sections of the algorithm's entry, and its ``params``. Values are not looked at.

    :raises CompactPruneError: it is no pruning algorithm.
    :raises ConfigError: keywords that are neither.
    """
    kind: Any = plugins.algorithms.get(algorithm)
    if kind is None:  # told with all that is known
        return {}, given
    if not issubclass(kind, ChannelPruning):
        msg = (
            f"prune: '{algorithm}' is no pruning algorithm. Use create_compressed_model(model, {{\"compression\": "
            f'{{"algorithm": "{algorithm}"}}}}, train_loader, example_inputs=...), and strip() of the controller.'
        )
        raise CompactPruneError(msg)
    fields = kind.Config.model_fields
    params = fields["params"].annotation
    sections = fields.keys() - {"algorithm", "params"}
    known = {*sections - kind.Config.unread.keys(), *params.model_fields.keys() - params.unread.keys()}
    unknown = [key for key in given if key not in sections and key not in params.model_fields]
    if unknown:
        source, expected = "prune", f" Expected {one_of(sorted(known))}."
        hints = {key: nearest(key, known) or expected for key in unknown}
        raise ConfigError(
            source, [Problem(key, f"'{algorithm}' has no such key.{hint}") for key, hint in hints.items()]
        )
    return {k: v for k, v in given.items() if k in sections}, {k: v for k, v in given.items() if k not in sections}
