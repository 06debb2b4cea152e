"""A small, plain training loop for classifiers, with NNCF's calls where NNCF's samples have them.

It is what ``nncf-compactprune run`` trains with, and short enough to copy into a script of one's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from nncf_compactprune.decide.labelled import class_scores as class_scores  # also for those who import it from here
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.tensors import computes_in_bfloat16
from nncf_compactprune.run.progress import tracked
from nncf_compactprune.storage.snapshots import Snapshot, Snapshots

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Autocast = Literal["bfloat16", "auto"]


class Scheduler(Protocol):
    """The part of NNCF's compression scheduler that a training loop calls."""

    def epoch_step(self) -> object:
        """Called at the start of every epoch."""

    def step(self) -> object:
        """Called before every optimizer step."""


class Controller(Protocol):
    """The part of NNCF's compression controller that a training loop calls."""

    @property
    def scheduler(self) -> Scheduler:
        """The compression scheduler."""

    def loss(self) -> torch.Tensor | float:
        """The compression loss to add to the task loss."""


@dataclass(frozen=True)
class EpochRecord:
    """What one training epoch came to.

    :param epoch: counted from 1.
    :param loss: mean training loss per image, compression loss included.
    :param accuracy: training top-1 in [0, 1], on augmented images and in training mode.
    :param lr: learning rate of the epoch.
    :param seconds: wall time.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    criterion: Criterion = nn.functional.cross_entropy,
    controller: Controller | None = None,
    autocast: Autocast | None = None,
    title: str = "Training",
) -> tuple[float, float]:
    """Trains for one pass over the batches.

    :param model: gives scores ``[n, classes]``; trained in place.
    :param batches: inputs and labels ``[n]``.
    :param optimizer: over the model's parameters.
    :param criterion: scores and labels to the mean loss.
    :param controller: a compression controller; its scheduler is stepped and its loss added, as in NNCF's samples.
    :param autocast: ``"bfloat16"`` runs layers in it, on channels-last images; ``"auto"`` where the device has
        instructions for it. Weights, loss and optimizer stay in float32.
    :param title: what the progress bar is called, where one is shown.
    :return: mean loss per image and top-1 in [0, 1].
    """
    device = device_of(model)
    mixed = autocast == "bfloat16" or (autocast == "auto" and computes_in_bfloat16(device.type))
    model.train()
    loss_sum, correct, images = 0.0, 0, 0
    with tracked(batches, title, lambda: f"loss {loss_sum / max(images, 1):.4f}") as shown:
        for inputs, labels in shown:
            inputs, labels = inputs.to(device), labels.to(device)
            if controller is not None:
                controller.scheduler.step()
            if mixed and inputs.dim() == 4:
                inputs = inputs.to(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                scores = class_scores(model(inputs))
            scores = scores.float() if mixed else scores
            loss = criterion(scores, labels)
            if controller is not None:
                loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += int((scores.argmax(1) == labels).sum())
            images += len(labels)
    return loss_sum / max(images, 1), correct / max(images, 1)


def evaluate(model: nn.Module, batches: Batches) -> float:
    """Measures a classifier in evaluation mode; its training flags and torch's random state are as before afterwards.

    :param model: gives scores ``[n, classes]``.
    :param batches: inputs and labels ``[n]``.
    :return: top-1 accuracy in [0, 1].
    """
    device = device_of(model)
    correct, images = 0, 0
    with evaluating(model), tracked(batches, "Evaluating") as shown:
        for inputs, labels in shown:
            scores = class_scores(model(inputs.to(device)))
            correct += int((scores.argmax(1) == labels.to(device)).sum())
            images += len(labels)
    return correct / max(images, 1)


def fit(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    lr_schedule: Literal["cosine", "constant"] = "cosine",
    criterion: Criterion = nn.functional.cross_entropy,
    controller: Controller | None = None,
    autocast: Autocast | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    snapshots: Snapshots | None = None,
    phase: int = 0,
    resume: Snapshot | None = None,
) -> list[EpochRecord]:
    """Trains in place.

    :param model: gives scores ``[n, classes]``.
    :param batches: iterated once per epoch.
    :param optimizer: over the model's parameters.
    :param epochs: how many, those before a snapshot included.
    :param lr_schedule: ``cosine`` falls from the optimizer's learning rate towards zero over the epochs.
    :param criterion: scores and labels to the mean loss.
    :param controller: a compression controller, stepped as in NNCF's samples.
    :param autocast: see :func:`train_epoch`.
    :param on_epoch: called with each epoch's record.
    :param snapshots: where every epoch leaves a snapshot of the run.
    :param phase: which part of the run this is, for the snapshots.
    :param resume: a snapshot of this phase to go on from; the model has its shapes (``create_compressed_model`` with
        its compression state). With the same batches in the same order the weights end as those of a run in one piece:
        on a CPU, bit for bit.
    :return: one record per epoch trained here.
    """
    schedule = None
    if lr_schedule == "cosine" and epochs:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if resume is not None:
        resume.restore(model, optimizer, schedule, batches)
    records = []
    for epoch in range(1 if resume is None else resume.epoch + 1, epochs + 1):
        start, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
        if controller is not None:
            controller.scheduler.epoch_step()
        title = f"  epoch {epoch}/{epochs}"
        loss, accuracy = train_epoch(
            model, batches, optimizer, criterion=criterion, controller=controller, autocast=autocast, title=title
        )
        if schedule is not None:
            schedule.step()
        records.append(EpochRecord(epoch, loss, accuracy, lr, time.perf_counter() - start))
        if on_epoch is not None:
            on_epoch(records[-1])
        if snapshots is not None:
            state = getattr(controller, "get_compression_state", lambda: None)()
            snapshots.save(phase, epoch, model, optimizer, schedule, batches, compression=state)
    return records


def device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
