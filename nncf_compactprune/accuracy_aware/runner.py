"""The runner: calls the script's functions epoch by epoch, measures, logs, and keeps checkpoints.

Names of attributes are NNCF 2.x's, as scripts read them in ``dump_checkpoint_fn``.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nncf_compactprune.accuracy_aware.checkpoints import checkpoint_path, load_checkpoint, save_checkpoint
from nncf_compactprune.accuracy_aware.progress import EpochResult, Progress, RateSearch
from nncf_compactprune.algorithms import CompressionAlgorithm, CompressionStage
from nncf_compactprune.config import AccuracyAwareParams
from nncf_compactprune.host.distributed import averaged, is_main_process, said_by_main, wait_for_all

Log = Callable[[str], object]


@dataclass
class Functions:
    """What the script gives to :meth:`run`, by NNCF 2.x's names."""

    train_epoch: Callable[..., Any]
    validate: Callable[..., Any]
    configure_optimizers: Callable[[], Any] | None = None
    dump_checkpoint: Callable[..., Any] | None = None
    load_checkpoint: Callable[..., Any] | None = None
    early_stopping: Callable[[float], bool] | None = None
    update_learning_rate: Callable[..., Any] | None = None


class TrainingRunner:
    """Runs epochs and remembers.

    :param params: the section of the configuration.
    :param controller: NNCF-style, of the model that is trained.
    :param uncompressed_accuracy: of the model before compression.
    :param log: is given one line at a time.
    :param verbose: also log the controller's statistics, and write figures for TensorBoard.
    :param dump_checkpoints: write every epoch's checkpoint, not only the best.
    :param lr_updates_needed: step the learning rate schedule after every epoch.
    :param on_epoch: is given what every epoch came to, in place of a line in the log.
    """

    def __init__(
        self,
        params: AccuracyAwareParams,
        controller: Any,
        uncompressed_accuracy: float,
        *,
        log: Log | None = None,
        verbose: bool = True,
        dump_checkpoints: bool = True,
        lr_updates_needed: bool = True,
        on_epoch: Callable[[EpochResult], object] | None = None,
    ) -> None:
        self.params, self.controller = params, controller
        self.uncompressed_model_accuracy = float(uncompressed_accuracy)
        self.minimal_tolerable_accuracy = params.tolerable(self.uncompressed_model_accuracy)
        self.log: Log = log or nncf_logger.info
        self.verbose, self.dump_checkpoints = verbose, dump_checkpoints
        self.lr_updates_needed = lr_updates_needed
        self._on_epoch = on_epoch or self._tell
        self.progress = Progress(RateSearch(params.initial_compression_rate_step))
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.directory = Path()
        self._functions = Functions(lambda *_, **__: None, lambda *_, **__: 0.0)
        self._writer: Any = None

    # -- what scripts read ---------------------------------------------------------------------------------------

    @property
    def maximal_total_epochs(self) -> int:
        """Most epochs in all."""
        return self.params.maximal_total_epochs

    @property
    def cumulative_epoch_count(self) -> int:
        """Epochs in all."""
        return self.progress.epoch

    @property
    def training_epoch_count(self) -> int:
        """Epochs in the initial phase, or at this rate."""
        return self.progress.epochs_here

    @property
    def best_val_metric_value(self) -> float:
        """Best accuracy in the initial phase, or at this rate."""
        return self.progress.best

    @property
    def current_val_metric_value(self) -> float:
        """The last accuracy."""
        return self.progress.accuracy

    @property
    def current_loss(self) -> float | None:
        """What ``train_epoch_fn`` returned last."""
        return self.progress.loss

    @property
    def compressed_training_history(self) -> dict[float, float]:
        """Rate to how far its last accuracy was above what is allowed."""
        return {e.compression_rate: e.accuracy - self.minimal_tolerable_accuracy for e in self.progress.epochs}

    @property
    def compression_rate_target(self) -> float:
        """The rate that is tried, or that the schedule has come to."""
        target = self.progress.search.target
        return float(self.controller.compression_rate if target is None else target)

    # -- running -------------------------------------------------------------------------------------------------

    def begin(
        self, functions: Functions, directory: Path | None, log_dir: str | os.PathLike[str] | None, writer: Any
    ) -> None:
        """Takes the script's functions and makes the directory.

        :param functions: of the script.
        :param directory: for checkpoints.
        :param log_dir: without a directory, one named by the time is made in here; default: ``runs``.
        :param writer: a TensorBoard ``SummaryWriter``, or None.
        """
        self._functions, self._writer = functions, writer
        stamp = said_by_main(f"{datetime.datetime.now():%Y-%m-%d__%H-%M-%S}")
        self.directory = directory or Path(log_dir or "runs") / "accuracy_aware_training" / stamp
        if is_main_process():
            self.directory.mkdir(parents=True, exist_ok=True)

    def configure_optimizers(self) -> None:
        """New optimizer and learning rate schedule, at the search's share of the learning rate."""
        made = self._functions.configure_optimizers() if self._functions.configure_optimizers else (None, None)
        self.optimizer, self.lr_scheduler = made
        factor = self.progress.search.lr_factor
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        schedulers = self.lr_scheduler if isinstance(self.lr_scheduler, (tuple, list)) else [self.lr_scheduler]
        for scheduler in schedulers:
            for name in ("base_lrs", "init_lr"):
                values = getattr(scheduler, name, None)
                if values is not None:
                    setattr(scheduler, name, [v * factor for v in values] if name == "base_lrs" else values * factor)

    @property
    def optimizers(self) -> list[Any]:
        """The script's optimizers."""
        if self.optimizer is None:
            return []
        return list(self.optimizer) if isinstance(self.optimizer, (tuple, list)) else [self.optimizer]

    def reset_training(self) -> None:
        """Starts anew at another rate: fresh optimizer, counts from 0."""
        self.configure_optimizers()
        self.progress.epochs_here = 0
        self.progress.best = self.progress.accuracy = -math.inf

    def train_epoch(self, model: nn.Module) -> None:
        """One epoch, by the script's function."""
        progress = self.progress
        self.controller.scheduler.epoch_step()
        loss = self._functions.train_epoch(
            self.controller, model, epoch=progress.epoch, optimizer=self.optimizer, lr_scheduler=self.lr_scheduler
        )
        progress.loss = None if loss is None else float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        progress.epochs_here += 1
        progress.epoch += 1

    def validate(self, model: nn.Module) -> float:
        """The accuracy now, the same in all processes."""
        with torch.no_grad():
            measured = float(self._functions.validate(model, epoch=self.progress.epoch))
        accuracy = float(averaged([torch.tensor(measured, dtype=torch.float64)])[0])
        self.progress.accuracy = accuracy
        self.progress.best = max(self.progress.best, accuracy)
        return accuracy

    def fully_compressed(self) -> bool:
        """Whether every algorithm with a rate has come to its target; without one, every algorithm."""
        started: list[CompressionAlgorithm] = list(self.controller.started)
        judged = [algorithm for algorithm in started if algorithm.adjustable] or started
        return bool(judged) and all(a.stage() is CompressionStage.FULLY_COMPRESSED for a in judged)

    @property
    def holds(self) -> bool:
        """Whether the model is fully compressed and accurate enough."""
        return self.fully_compressed() and self.progress.accuracy >= self.minimal_tolerable_accuracy

    def record(self, model: nn.Module) -> None:
        """Notes what the epoch came to, logs it and writes checkpoints."""
        progress = self.progress
        rate = float(self.controller.compression_rate)
        result = EpochResult(progress.epoch, progress.phase, rate, progress.accuracy, self.holds, progress.loss)
        progress.epochs.append(result)
        self._on_epoch(result)
        if self.verbose and is_main_process():
            self._write_figures(result.accuracy - self.minimal_tolerable_accuracy)
        self.dump_checkpoint(model)

    def _tell(self, result: EpochResult) -> None:
        margin = result.accuracy - self.minimal_tolerable_accuracy
        full = "" if self.fully_compressed() else ", not fully compressed yet"
        self.log(
            f"Epoch {result.epoch}: rate {result.compression_rate:.3f}, accuracy {result.accuracy:.4f}, "
            f"{abs(margin):.4f} {'above' if margin >= 0 else 'below'} what is allowed{full}"
        )

    def scalar(self, name: str, value: float) -> None:
        """One figure for TensorBoard.

        :param name: as in NNCF 2.x.
        :param value: at this epoch.
        """
        if self._writer is not None and self.verbose and is_main_process():
            self._writer.add_scalar(name, value, self.progress.epoch)

    def _write_figures(self, margin: float) -> None:
        self.scalar("val/accuracy_aware/metric_value", self.progress.accuracy)
        self.scalar("val/accuracy_aware/accuracy_budget", margin)
        statistics = self.controller.statistics()
        self.log(statistics.to_str())
        for algorithm, figures in statistics.algorithms.items():
            for figure, value in figures.items():
                if isinstance(value, (int, float)):
                    self.scalar(f"compression/statistics/{algorithm}/{figure}", value)

    def update_learning_rate(self) -> None:
        """After an epoch: the script's function, or the schedule's step."""
        progress, scheduler = self.progress, self.lr_scheduler
        if self._functions.update_learning_rate is not None:
            self._functions.update_learning_rate(scheduler, progress.epochs_here, progress.accuracy, progress.loss)
        elif scheduler is not None and self.lr_updates_needed:
            for one in scheduler if isinstance(scheduler, (tuple, list)) else [scheduler]:
                one.step(*([progress.best] if isinstance(one, ReduceLROnPlateau) else []))

    def stop_training(self) -> bool:
        """Whether the script's ``early_stopping_fn`` says so; asked of fully compressed models only."""
        early = self._functions.early_stopping
        return early is not None and self.fully_compressed() and bool(early(self.progress.accuracy))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def dump_checkpoint(self, model: nn.Module) -> None:
        """Writes the last, and where it is the best so far, that too: of its rate, or of the uncompressed ones."""
        progress, full, rate = self.progress, self.fully_compressed(), repr(self.compression_rate_target)
        is_best = full and progress.accuracy > progress.checkpoints.get(rate, ("", -math.inf))[1]
        if self.dump_checkpoints or is_best:
            if self._functions.dump_checkpoint is None:
                self._save(model, checkpoint_path(self.directory, "last"))
            elif is_main_process():
                self._functions.dump_checkpoint(model, self.controller, self, self.directory)
        if is_best:
            path = checkpoint_path(self.directory, self.best_name(float(rate)))
            self._save(model, path)
            progress.checkpoints[rate] = (path.name, progress.accuracy)
        elif not full and (progress.uncompressed is None or progress.uncompressed[1] < progress.accuracy):
            path = checkpoint_path(self.directory, "best_uncompressed")
            self._save(model, path)
            progress.uncompressed = (path.name, progress.accuracy)

    def best_name(self, rate: float) -> str:
        """What the best checkpoint of a rate is called: one for all, where the rate is not searched for."""
        return "best"

    def _save(self, model: nn.Module, path: Path) -> None:
        if not is_main_process():
            return
        progress = self.progress
        facts: Mapping[str, Any] = {
            "epoch": progress.epoch + 1,
            "best_metric_val": progress.best,
            "current_val_metric_value": progress.accuracy,
        }
        save_checkpoint(path, model, self.controller, self.optimizers, facts)

    def load_best_checkpoint(self, model: nn.Module, *, whatever: bool = False) -> float | None:
        """Goes back to the best model: that of the largest rate that is accurate enough.

        :param model: in place.
        :param whatever: where none is accurate enough, take the most accurate.
        :return: its rate; None where there is none, and the model is as it was.
        """
        wait_for_all()
        known = {float(rate): found for rate, found in self.progress.checkpoints.items()}
        good = [rate for rate, (_, accuracy) in known.items() if accuracy >= self.minimal_tolerable_accuracy]
        if not good and not (whatever and known):
            return None
        rate = max(good) if good else max(known, key=lambda one: known[one][1])
        load_checkpoint(self.directory / known[rate][0], model, self.controller, self._functions.load_checkpoint)
        return rate


class SearchingRunner(TrainingRunner):
    """A runner that keeps the best checkpoint of every rate."""

    def best_name(self, rate: float) -> str:
        name = f"best_{rate:.3f}"
        others = [file for of, (file, _) in self.progress.checkpoints.items() if float(of) != rate]
        return f"best_{rate:.6f}" if any(Path(file).stem.endswith(name) for file in others) else name
