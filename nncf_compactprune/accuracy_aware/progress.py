"""What an accuracy-aware training remembers, as plain values: it is saved after every epoch, and resumed from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nncf_compactprune.config import AccuracyAwareParams


@dataclass(frozen=True)
class TrainingLoopStatistics:
    """Where a training stands, with NNCF 2.x's names. Accuracies are in the unit of ``validate_fn``.

    :param compression_rate: share removed, in [0, 1).
    :param absolute_accuracy_degradation: uncompressed less compressed accuracy.
    :param relative_accuracy_degradation: the same, in percent of the uncompressed accuracy.
    :param accuracy_budget: how far the accuracy is above what is allowed; negative: below.
    """

    uncompressed_accuracy: float
    compression_rate: float
    compressed_accuracy: float
    absolute_accuracy_degradation: float
    relative_accuracy_degradation: float
    accuracy_budget: float

    def to_str(self) -> str:
        """Six lines for logs."""
        return (
            f"Uncompressed accuracy: {self.uncompressed_accuracy:.4f}\n"
            f"Compressed accuracy: {self.compressed_accuracy:.4f}\n"
            f"Compression rate: {self.compression_rate:.4f}\n"
            f"Absolute drop: {self.absolute_accuracy_degradation:.4f}\n"
            f"Relative drop: {self.relative_accuracy_degradation:.2f} %\n"
            f"Above what is allowed: {self.accuracy_budget:.4f}"
        )


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    :param epoch: counted from 1 over the whole training; 0 is the model before any.
    :param phase: ``"initial"`` or ``"search"``.
    :param compression_rate: share removed, in [0, 1).
    :param accuracy: in the unit of ``validate_fn``.
    :param holds: whether the model is fully compressed at this rate and accurate enough.
    :param loss: what ``train_epoch_fn`` returned; None before the first epoch.
    """

    epoch: int
    phase: str
    compression_rate: float
    accuracy: float
    holds: bool
    loss: float | None = None


@dataclass
class RateSearch:
    """The search for the largest rate that holds: up while it does, down while it does not, in ever smaller steps.

    :param step: by how much the rate is moved next.
    :param target: the rate now; None before the first move.
    :param lr_factor: what learning rates are multiplied by.
    :param raised: whether the rate was raised last; None before the first move.
    """

    step: float
    target: float | None = None
    lr_factor: float = 1.0
    raised: bool | None = None

    def move(self, at: float, holds: bool, params: AccuracyAwareParams) -> float:
        """Where to try next. At a turn, step and learning rate shrink.

        :param at: the rate now.
        :param holds: whether it holds the accuracy.
        :param params: by how much things shrink.
        """
        if self.raised is not None and self.raised != holds:
            self.step *= params.compression_rate_step_reduction_factor
            self.lr_factor *= params.lr_reduction_factor
        self.raised = holds
        self.target = round(at + (self.step if holds else -self.step), 6)
        return self.target


@dataclass
class Progress:
    """Everything that the next epochs depend on, but for weights, optimizer and random states.

    :param search: the search's own part.
    :param phase: ``"initial"`` or ``"search"``.
    :param epoch: epochs in all.
    :param epochs_here: epochs in the initial phase, or at this rate.
    :param best: best accuracy in the initial phase, or at this rate.
    :param accuracy: the last one.
    :param loss: of the last epoch.
    :param move_next: whether the rate is to be moved whatever the accuracy is.
    :param checkpoints: file name of the best model of every rate, by the rate as text, with its accuracy.
    :param uncompressed: file name and accuracy of the best model that was not fully compressed.
    :param epochs: all of them.
    """

    search: RateSearch
    phase: str = "initial"
    epoch: int = 0
    epochs_here: int = 0
    best: float = -math.inf
    accuracy: float = -math.inf
    loss: float | None = None
    move_next: bool = True
    checkpoints: dict[str, tuple[str, float]] = field(default_factory=dict)
    uncompressed: tuple[str, float] | None = None
    epochs: list[EpochResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """What :meth:`to_json` gave.

        :param state: plain values.
        """
        return cls(
            **{
                **state,
                "search": RateSearch(**state["search"]),
                "checkpoints": {rate: (path, accuracy) for rate, (path, accuracy) in state["checkpoints"].items()},
                "uncompressed": None if state["uncompressed"] is None else tuple(state["uncompressed"]),
                "epochs": [EpochResult(**epoch) for epoch in state["epochs"]],
            }
        )
