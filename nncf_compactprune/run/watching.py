"""Fine-tuning of a run that watches the accuracy: until it is good enough, or for the smallest network that is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from nncf_compactprune.accuracy_aware import EpochResult, create_accuracy_aware_training_loop
from nncf_compactprune.accuracy_aware.loops import PartOfRun
from nncf_compactprune.config import AccuracyAwareTraining
from nncf_compactprune.controller import CompressionController
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.run.datasets import ResolvedDataset
from nncf_compactprune.run.prepare import epochs_of_schedule
from nncf_compactprune.run.state import CHECKPOINTS, FINE_TUNING, Run
from nncf_compactprune.run.training import EpochRecord, evaluate, train_epoch


@dataclass(frozen=True)
class RateTried:
    """What training at one compression rate came to.

    :param rate: share removed, in [0, 1).
    :param epochs: how many.
    :param accuracy: the best test accuracy, in percent.
    :param holds: whether it is good enough.
    """

    rate: float
    epochs: int
    accuracy: float
    holds: bool


@dataclass(frozen=True)
class Watched:
    """What a training came to that watched the accuracy. Accuracies are in percent.

    :param mode: of the configuration.
    :param uncompressed: test accuracy of the dense network.
    :param allowed: the lowest one that is allowed.
    :param holds: whether the result is allowed.
    :param rate: the result's compression rate.
    :param epochs: all of them.
    :param final: the exported network's: entries that begin at the end, such as quantization behind pruning, are in it.
    """

    mode: str
    uncompressed: float
    allowed: float
    holds: bool
    rate: float
    epochs: Sequence[EpochResult]
    final: float | None = None

    @property
    def tried(self) -> list[RateTried]:
        """One entry for every rate that was trained at, in ascending order."""
        by_rate: dict[float, list[EpochResult]] = {}
        for result in self.epochs:
            by_rate.setdefault(round(result.compression_rate, 6), []).append(result)
        return [
            RateTried(rate, sum(r.epoch > 0 for r in of), max(r.accuracy for r in of), any(r.holds for r in of))
            for rate, of in sorted(by_rate.items())
        ]

    def ended(self, accuracy: float) -> Watched:
        """The same, judged by the network as it is exported.

        :param accuracy: its test accuracy, in percent.
        """
        return replace(self, holds=self.holds and accuracy >= self.allowed, final=accuracy)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            **asdict(self),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "tried": list(map(asdict, self.tried)),
        }

    def to_markdown(self) -> list[str]:
        """Lines for the report."""
        found = f"{self.rate:.1%} removed holds it" if self.holds else "no compressed network held it"
        if self.final is not None:
            found = f"{found}, with {self.final:.2f} % as exported"
        return [
            "## Accuracy-aware training",
            "",
            f"Mode `{self.mode}`. The test accuracy may fall from {self.uncompressed:.2f} % to {self.allowed:.2f} %: "
            f"{found}. The test set guided the training.",
            "",
            "| removed | epochs | best test accuracy | holds |",
            "| ---: | ---: | ---: | --- |",
            *(
                f"| {one.rate:.1%} | {one.epochs} | {one.accuracy:.2f} % | {'yes' if one.holds else 'no'} |"
                for one in self.tried
            ),
            "",
        ]


def train_watching(
    run: Run, dataset: ResolvedDataset, controller: CompressionController, model: nn.Module, dense_accuracy: float
) -> Watched:
    """Trains as the configuration's ``accuracy_aware_training`` says, in place.

    :param run: where to, and what to tell.
    :param dataset: its test set measures the accuracy.
    :param controller: of the model.
    :param model: under compression; a search leaves it masked.
    :param dense_accuracy: test top-1 of the dense network, in [0, 1].
    """
    section = run.settings.compression.accuracy_aware_training
    if section is None:
        msg = "accuracy_aware_training: missing."
        raise CompactPruneError(msg)
    batches = dataset.train_loader(run.config.batch_size, seed=run.config.seed + 1)
    epochs = _Epochs(run, section)
    loop = create_accuracy_aware_training_loop(
        run.settings.compression, controller, 100 * dense_accuracy, verbose=False, log=run.say, on_epoch=epochs.tell
    )
    directory = run.directory / CHECKPOINTS
    loop.be_part_of(PartOfRun(directory, run.snapshots, FINE_TUNING, batches, run.resume(FINE_TUNING)))

    def train(ctrl: CompressionController, trained: nn.Module, *, epoch: int, optimizer: Optimizer, **_: Any) -> float:
        start, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        title, autocast = f"  epoch {epoch + 1}", run.config.autocast
        loss, accuracy = train_epoch(trained, batches, optimizer, controller=ctrl, autocast=autocast, title=title)
        epochs.record = EpochRecord(epoch + 1, loss, accuracy, lr, time.perf_counter() - start)
        return loss

    def configure() -> tuple[Optimizer, CosineAnnealingLR | None]:
        optimizer = run.config.optimizer.build(model)
        if not section.searches:
            controller.attach(optimizer=optimizer)  # the network shrinks as soon as the schedule arrives
        searching = loop.runner.progress.phase == "search"
        length = section.params.patience_epochs if searching else epochs_of_schedule(run.settings)
        cosine = run.config.lr_schedule == "cosine" and length > 0
        return optimizer, CosineAnnealingLR(optimizer, length) if cosine else None

    loop.run(
        model,
        train_epoch_fn=train,
        validate_fn=lambda judged, epoch: 100 * evaluate(judged, dataset.test_loader(run.config.batch_size)),
        configure_optimizers_fn=configure,
    )
    runner = loop.runner
    allowed, dense = runner.minimal_tolerable_accuracy, runner.uncompressed_model_accuracy
    return Watched(section.mode, dense, allowed, runner.holds, controller.compression_rate, loop.epochs)


class _Epochs:
    """Tells each epoch with what its training and its test came to."""

    def __init__(self, run: Run, section: AccuracyAwareTraining) -> None:
        self._run, self._most = run, section.params.maximal_total_epochs
        self.record: EpochRecord | None = None

    def tell(self, result: EpochResult) -> None:
        """
        :param result: of the epoch; 0 is before any.
        """
        if self.record is not None and result.epoch == self.record.epoch:
            self._run.tell(self.record, "pruned", self._most, result.compression_rate, result.accuracy / 100)
