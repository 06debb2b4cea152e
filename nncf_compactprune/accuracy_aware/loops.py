"""NNCF 2.x's accuracy-aware training loops: ``early_exit`` and ``adaptive_compression_level``.

What differs from NNCF 2.x: a training that was killed can be resumed; the largest and the smallest possible rate are
tried before the search gives up; where nothing holds the accuracy, the most accurate compressed model is returned, with
a warning; the accuracy may be negative.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from torch import nn

from nncf_compactprune.accuracy_aware.progress import EpochResult, Progress, TrainingLoopStatistics
from nncf_compactprune.accuracy_aware.runner import Functions, Log, SearchingRunner, TrainingRunner
from nncf_compactprune.algorithms import ChannelPruning, CompressionAlgorithm, CompressionStage
from nncf_compactprune.config import AccuracyAwareTraining, CompressionConfig, load_section, read_document
from nncf_compactprune.config.nncf2_top_level import modern_top_level
from nncf_compactprune.errors import CompactPruneError, ConfigError, Problem
from nncf_compactprune.host.distributed import is_main_process
from nncf_compactprune.storage.snapshots import Snapshot, Snapshots

SNAPSHOTS = "snapshots"
Configuration = CompressionConfig | Mapping[str, Any]


@dataclass(frozen=True)
class PartOfRun:
    """A longer run that the training is a part of.

    :param directory: gets the checkpoints.
    :param snapshots: of the whole run.
    :param phase: which part of it this is.
    :param batches: the training loader, whose generators belong to the state.
    :param resumed: the snapshot to go on from; the controller was built from its state.
    """

    directory: Path
    snapshots: Snapshots
    phase: int
    batches: Iterable[Any]
    resumed: Snapshot | None


class EarlyExitCompressionTrainingLoop:
    """Trains until the fully compressed model is accurate enough, or the epochs are used up.

    :param nncf_config: holds ``accuracy_aware_training``.
    :param compression_controller: of the model to train.
    :param uncompressed_model_accuracy: of the model before compression, in the unit of ``validate_fn``; default: the
        registered ``model_eval_fn`` measures it now, if nothing was trained yet.
    :param lr_updates_needed: step the learning rate schedule after every epoch.
    :param verbose: also log the controller's statistics, and write figures for TensorBoard.
    :param dump_checkpoints: write every epoch's checkpoint, not only the best.
    :param log: is given one line at a time; NNCF's logger by default.
    :param on_epoch: is given what every epoch came to, in place of a line in the log.
    """

    runner_class = TrainingRunner

    def __init__(
        self,
        nncf_config: Configuration,
        compression_controller: Any,
        uncompressed_model_accuracy: float | None = None,
        lr_updates_needed: bool = True,
        verbose: bool = True,
        dump_checkpoints: bool = True,
        *,
        log: Log | None = None,
        on_epoch: Callable[[EpochResult], object] | None = None,
    ) -> None:
        self.section = accuracy_aware_section(nncf_config)
        self.compression_controller = compression_controller
        if uncompressed_model_accuracy is None:
            if not hasattr(compression_controller, "uncompressed_accuracy"):
                msg = "accuracy-aware training: expected uncompressed_model_accuracy. Measure it before compressing."
                raise CompactPruneError(msg)
            uncompressed_model_accuracy = compression_controller.uncompressed_accuracy()
        self.runner = self.runner_class(
            self.section.params,
            compression_controller,
            uncompressed_model_accuracy,
            log=log,
            verbose=verbose,
            dump_checkpoints=dump_checkpoints,
            lr_updates_needed=lr_updates_needed,
            on_epoch=on_epoch,
        )
        self._snapshots: Snapshots | None = None
        self._part: PartOfRun | None = None

    # -- what is known afterwards --------------------------------------------------------------------------------

    @property
    def statistics(self) -> TrainingLoopStatistics:
        """Where the training stands."""
        runner = self.runner
        dense, accuracy = runner.uncompressed_model_accuracy, runner.current_val_metric_value
        relative = 100 * (dense - accuracy) / abs(dense) if dense else 0.0
        rate = float(self.compression_controller.compression_rate)
        margin = accuracy - runner.minimal_tolerable_accuracy
        return TrainingLoopStatistics(dense, rate, accuracy, dense - accuracy, relative, margin)

    @property
    def epochs(self) -> Sequence[EpochResult]:
        """What every epoch came to."""
        return tuple(self.runner.progress.epochs)

    @property
    def log_dir(self) -> Path:
        """Where checkpoints are."""
        return self.runner.directory

    # -- running -------------------------------------------------------------------------------------------------

    def run(
        self,
        model: nn.Module,
        train_epoch_fn: Callable[..., Any],
        validate_fn: Callable[..., Any],
        configure_optimizers_fn: Callable[[], Any] | None = None,
        dump_checkpoint_fn: Callable[..., Any] | None = None,
        load_checkpoint_fn: Callable[..., Any] | None = None,
        early_stopping_fn: Callable[[float], bool] | None = None,
        tensorboard_writer: Any = None,
        log_dir: str | os.PathLike[str] | None = None,
        update_learning_rate_fn: Callable[..., Any] | None = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> nn.Module:
        """Trains in place; same arguments as in NNCF 2.x.

        :param model: under compression.
        :param train_epoch_fn: ``(controller, model, epoch=, optimizer=, lr_scheduler=)``, trains one epoch and returns
            its loss. ``scheduler.epoch_step()`` was called, ``scheduler.step()`` is its own matter.
        :param validate_fn: ``(model, epoch=)``, returns the accuracy; more is better.
        :param configure_optimizers_fn: returns optimizer and learning rate schedule, new ones at every call; either
            may be a list, or None.
        :param dump_checkpoint_fn: ``(model, controller, runner, directory)``, writes the last checkpoint its own way.
        :param load_checkpoint_fn: ``(model, path)``, loads weights in its own way.
        :param early_stopping_fn: ``(accuracy)``, whether training at this rate may end.
        :param tensorboard_writer: a ``SummaryWriter``.
        :param log_dir: gets ``accuracy_aware_training/<time>`` with the checkpoints; default: ``runs``.
        :param update_learning_rate_fn: ``(lr_scheduler, epoch, accuracy, loss)``, in place of the schedule's step.
        :param resume_from: directory of a training that was killed (:attr:`log_dir`): it goes on there after its last
            whole epoch. Model and controller are fresh ones of the same configuration.
        :return: the model.
        """
        runner = self.runner
        functions = Functions(
            train_epoch_fn,
            validate_fn,
            configure_optimizers_fn,
            dump_checkpoint_fn,
            load_checkpoint_fn,
            early_stopping_fn,
            update_learning_rate_fn,
        )
        part = self._part
        directory = part.directory if part is not None else None if resume_from is None else Path(resume_from)
        runner.begin(functions, directory, log_dir, tensorboard_writer)
        if part is not None:
            self._snapshots, snapshot = part.snapshots, part.resumed
        else:
            self._snapshots, snapshot = Snapshots(runner.directory / SNAPSHOTS, self._identity()), None
            if resume_from is not None:
                snapshot = self._found(self._snapshots)
        return self._run(model, snapshot)

    def be_part_of(self, part: PartOfRun) -> None:
        """Keeps its state with that of a longer run, before :meth:`run`.

        :param part: which one.
        """
        self._part = part

    def _run(self, model: nn.Module, snapshot: Snapshot | None) -> nn.Module:
        self._initial_phase(model, self.section.params.maximal_total_epochs, snapshot)
        self._finish(model)
        return model

    def _initial_phase(self, model: nn.Module, most: int, snapshot: Snapshot | None) -> None:
        """Trains at the schedule's rate until that is complete and accurate enough."""
        runner, progress = self.runner, self.runner.progress
        runner.log(
            f"Accuracy-aware training: the accuracy may fall from {runner.uncompressed_model_accuracy:.4f} to "
            f"{runner.minimal_tolerable_accuracy:.4f}"
        )
        runner.configure_optimizers()
        if snapshot is not None:
            self._restore(model, snapshot)
        else:
            runner.validate(model)
            runner.record(model)
            if runner.holds:
                runner.log("The compressed model is accurate enough before any training.")
                return
        progress = self.runner.progress
        while progress.epochs_here < most:
            self._epoch(model)
            if runner.holds:
                runner.log(f"Accurate enough after epoch {progress.epoch}.")
                break
            if runner.stop_training():
                runner.log("Stopped by early_stopping_fn.")
                break
            self._end_of_epoch(model)

    def _epoch(self, model: nn.Module) -> None:
        self.runner.train_epoch(model)
        self.runner.validate(model)
        self.runner.record(model)

    def _end_of_epoch(self, model: nn.Module) -> None:
        """Everything is as the next epoch needs it: time for a snapshot."""
        runner = self.runner
        runner.update_learning_rate()
        if self._snapshots is None or not is_main_process() or len(runner.optimizers) != 1:
            return
        state = {"controller": self.compression_controller.get_compression_state(), "loop": runner.progress.to_json()}
        schedule = runner.lr_scheduler if hasattr(runner.lr_scheduler, "load_state_dict") else None
        phase, epoch = 0 if self._part is None else self._part.phase, runner.progress.epoch
        self._snapshots.save(phase, epoch, model, runner.optimizers[0], schedule, self._batches, compression=state)

    @property
    def _batches(self) -> Iterable[Any]:
        return () if self._part is None else self._part.batches

    def _finish(self, model: nn.Module) -> None:
        """The best model, and what it is."""
        runner = self.runner
        rate = runner.load_best_checkpoint(model, whatever=True)
        if rate is None:
            runner.log("Warning: no epoch had a fully compressed model. What is left is the last one.")
        accuracy = runner.validate(model)
        if not runner.holds:
            runner.log(
                f"Warning: no compressed model holds the accuracy: {accuracy:.4f} is the best, "
                f"{runner.minimal_tolerable_accuracy:.4f} is allowed. Train longer, or allow more."
            )
        algorithms = self.compression_controller.algorithms
        late = [a.name for a in algorithms if not a.adjustable and a.stage() is CompressionStage.UNCOMPRESSED]
        if late:
            runner.log(f"Not judged, as it begins at strip(): {', '.join(late)}. Measure the accuracy again there.")
        runner.log(f"Result: rate {self.compression_controller.compression_rate:.3f}, accuracy {accuracy:.4f}")
        if self._snapshots is not None and self._part is None and is_main_process():
            self._snapshots.remove()

    # -- resuming ------------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What must be equal for a training to go on."""
        algorithms = [algorithm.name for algorithm in self.compression_controller.algorithms]
        words = json.dumps([self.section.model_dump(mode="json"), algorithms], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()

    def _found(self, snapshots: Snapshots) -> Snapshot:
        snapshot = snapshots.newest()
        if snapshot is None:
            msg = f"{snapshots.directory.parent}: holds no training to go on with. Leave resume_from out to start anew."
            raise CompactPruneError(msg)
        return snapshot

    def _restore(self, model: nn.Module, snapshot: Snapshot) -> None:
        """Everything as after the snapshot's epoch; optimizer and schedule are those just configured."""
        runner, state = self.runner, snapshot.facts["compression"]
        runner.progress = Progress.from_json(state["loop"])
        controller = self.compression_controller
        if self._part is None:
            controller.load_state(state["controller"])
            controller.scheduler.load_state(state["controller"]["scheduler"])
        schedule = runner.lr_scheduler if snapshot.facts["schedule"] is not None else None
        snapshot.restore(model, runner.optimizers[0], schedule, self._batches)
        runner.log(f"Going on after epoch {runner.progress.epoch}, from {snapshot.path}")


class AdaptiveCompressionTrainingLoop(EarlyExitCompressionTrainingLoop):
    """Searches for the largest compression rate at which the model is accurate enough: the smallest network.

    After an initial phase at the schedule's rate, the rate is raised as long as the accuracy holds, and lowered when it
    does not for ``patience_epochs``; at every turn the step and the learning rate shrink.

    :param nncf_config: holds ``accuracy_aware_training``.
    :param compression_controller: of the model to train; one of its algorithms has a rate that can be set.
    :param uncompressed_model_accuracy: of the model before compression; see the other loop.
    :param lr_updates_needed: step the learning rate schedule after every epoch.
    :param verbose: also log the controller's statistics, and write figures for TensorBoard.
    :param minimal_compression_rate: the search goes no lower.
    :param maximal_compression_rate: the search goes no higher, nor higher than the algorithm can.
    :param dump_checkpoints: write every epoch's checkpoint, not only the best.
    :param log: is given one line at a time; NNCF's logger by default.
    :param on_epoch: is given what every epoch came to, in place of a line in the log.
    :raises CompactPruneError: no algorithm, or more than one, has a rate that can be set.
    """

    runner_class = SearchingRunner

    def __init__(
        self,
        nncf_config: Configuration,
        compression_controller: Any,
        uncompressed_model_accuracy: float | None = None,
        lr_updates_needed: bool = True,
        verbose: bool = True,
        minimal_compression_rate: float = 0.0,
        maximal_compression_rate: float = 0.95,
        dump_checkpoints: bool = True,
        *,
        log: Log | None = None,
        on_epoch: Callable[[EpochResult], object] | None = None,
    ) -> None:
        self.adaptive_controller = adjustable_algorithm(compression_controller)
        super().__init__(
            nncf_config,
            compression_controller,
            uncompressed_model_accuracy,
            lr_updates_needed,
            verbose,
            dump_checkpoints,
            log=log,
            on_epoch=on_epoch,
        )
        self.minimal_compression_rate = minimal_compression_rate
        self.maximal_compression_rate = min(maximal_compression_rate, self.adaptive_controller.maximal_compression_rate)

    def _run(self, model: nn.Module, snapshot: Snapshot | None) -> nn.Module:
        searching = snapshot is not None and snapshot.facts["compression"]["loop"]["phase"] == "search"
        if searching:
            assert snapshot is not None
            self._go_on(model, snapshot)
        else:
            self._initial_phase(model, self.section.params.initial_training_phase_epochs, snapshot)
            self._begin_search(model)
        self._search(model)
        self._finish(model)
        return model

    def _begin_search(self, model: nn.Module) -> None:
        runner = self.runner
        runner.load_best_checkpoint(model)
        runner.progress.phase = "search"
        runner.reset_training()
        runner.validate(model)
        self.compression_controller.disable_scheduler()
        runner.log("The search for the compression rate begins.")

    def _go_on(self, model: nn.Module, snapshot: Snapshot) -> None:
        self.compression_controller.disable_scheduler()
        self.runner.progress = Progress.from_json(snapshot.facts["compression"]["loop"])
        self.runner.configure_optimizers()
        self._restore(model, snapshot)

    def _search(self, model: nn.Module) -> None:
        runner, params = self.runner, self.section.params
        progress = runner.progress
        search = progress.search
        while search.step >= params.minimal_compression_rate_step and progress.epoch < params.maximal_total_epochs:
            good = progress.best >= runner.minimal_tolerable_accuracy
            done_here = progress.move_next or good or progress.epochs_here >= params.patience_epochs
            if done_here and not self._move(model, good):
                break
            self._epoch(model)
            progress.move_next = runner.stop_training()
            self._end_of_epoch(model)

    def _move(self, model: nn.Module, good: bool) -> bool:
        """Sets the next rate, on the weights of the best model so far; False where there is none to try."""
        runner, algorithm = self.runner, self.adaptive_controller
        search = runner.progress.search
        before, step = runner.compression_rate_target, search.step
        rate = search.move(before, good, self.section.params)
        low, high = self.minimal_compression_rate, self.maximal_compression_rate
        if not low <= rate <= high:
            bound = max(low, min(rate, high))
            if abs(bound - before) < 1e-6:
                runner.log(f"The {'largest' if good else 'smallest'} possible rate, {bound:.3f}, was tried.")
                return False
            rate = search.target = bound
        shrunk = f", step {step:.3f} -> {search.step:.3f}" if search.step != step else f", step {step:.3f}"
        runner.log(f"Rate {before:.3f} {'holds' if good else 'does not hold'} the accuracy: next {rate:.3f}{shrunk}")
        runner.load_best_checkpoint(model)
        algorithm.compression_rate = rate
        runner.reset_training()
        runner.progress.move_next = False
        runner.scalar("compression/accuracy_aware/target_compression_rate", rate)
        runner.scalar("compression/accuracy_aware/compression_rate_step", search.step)
        return True


def create_accuracy_aware_training_loop(
    nncf_config: Configuration,
    compression_ctrl: Any,
    uncompressed_model_accuracy: float | None = None,
    **additional_runner_args: Any,
) -> EarlyExitCompressionTrainingLoop:
    """The loop that the configuration's ``accuracy_aware_training`` asks for.

    :param nncf_config: the configuration.
    :param compression_ctrl: the controller of the model to train.
    :param uncompressed_model_accuracy: of the model before compression, in the unit of ``validate_fn``; default: the
        registered ``model_eval_fn`` measures it now, if nothing was trained yet.
    :param additional_runner_args: further arguments of the loop, such as ``verbose`` or ``lr_updates_needed``.
    :raises ConfigError: the section is missing or wrong.
    """
    searches = accuracy_aware_section(nncf_config).searches
    loop = AdaptiveCompressionTrainingLoop if searches else EarlyExitCompressionTrainingLoop
    return loop(nncf_config, compression_ctrl, uncompressed_model_accuracy, **additional_runner_args)


class _Only(BaseModel):
    model_config = ConfigDict(extra="ignore")
    accuracy_aware_training: AccuracyAwareTraining


def accuracy_aware_section(config: Configuration) -> AccuracyAwareTraining:
    """``accuracy_aware_training`` of a configuration.

    :raises ConfigError: it is missing or wrong.
    """
    if isinstance(config, CompressionConfig):
        section = config.accuracy_aware_training
    else:
        keys = ("accuracy_aware_training", "compression")  # NNCF 1.x had it inside an entry
        modern = modern_top_level({key: config[key] for key in keys if key in config}, [], [])
        given = modern.get("accuracy_aware_training")
        only = read_document({"accuracy_aware_training": given})
        section = None if given is None else load_section(only, _Only).accuracy_aware_training
    if section is None:
        missing = Problem("accuracy_aware_training", 'missing. Expected an object with "mode" and "params".')
        raise ConfigError(str(getattr(config, "_source", "config")), [missing])
    return section


def adjustable_algorithm(controller: Any) -> CompressionAlgorithm:
    """The one algorithm whose rate a search can move.

    :raises CompactPruneError: there is none or more than one, or the model is cut.
    """
    algorithms = cast(Sequence[CompressionAlgorithm], controller.algorithms)
    found = [algorithm for algorithm in algorithms if algorithm.adjustable]
    names = ", ".join(algorithm.name for algorithm in (found or algorithms)) or "none"
    if len(found) != 1:
        msg = (
            "adaptive_compression_level: expected one algorithm with a compression rate, such as filter_pruning or "
            f"fbnet_pruning, got {names}. Use early_exit, or leave all but one out."
        )
        raise CompactPruneError(msg)
    if isinstance(found[0], ChannelPruning) and found[0].settled:
        msg = (
            f"adaptive_compression_level: '{names}' has cut the model already, so its rate cannot be moved. Give "
            '"accuracy_aware_training" with this mode in the configuration that the model is compressed with.'
        )
        raise CompactPruneError(msg)
    return found[0]
