"""A small, plain training loop for classifiers, with NNCF's calls where NNCF's samples have them.

It is what ``nncf-compactprune run`` trains with, and short enough to copy into a script of one's own.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from nncf_compactprune.config import CompressionConfig, Document, Section, load_section
from nncf_compactprune.decide.labelled import class_scores as class_scores  # also for those who import it from here
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.storage.snapshots import Snapshot, Snapshots

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DEFAULT_MOMENTUM = 0.9


class OptimizerConfig(Section):
    """Which optimizer, with torch's own meaning of every value.

    :param lr: learning rate at the start of the schedule.
    :param momentum: for ``sgd`` only; 0.9 by default.
    """

    type: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> OptimizerConfig:
        if self.momentum is not None and self.type != "sgd":
            msg = f"'momentum' belongs to sgd, not to {self.type}. Leave it out."
            raise ValueError(msg)
        return self

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer over the model's trainable parameters."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.type == "sgd":
            momentum = DEFAULT_MOMENTUM if self.momentum is None else self.momentum
            return torch.optim.SGD(parameters, self.lr, momentum, weight_decay=self.weight_decay)
        if self.type == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)


class ExportConfig(Section):
    """What ``run`` writes of the dense and the pruned model."""

    formats: tuple[Literal["onnx", "openvino"], ...] = Field(default=("onnx", "openvino"), min_length=1, strict=False)
    precisions: tuple[Literal["fp32", "fp16"], ...] = Field(default=("fp32", "fp16"), min_length=1, strict=False)


class RunConfig(Section):
    """The top-level keys that belong to the training script, as in NNCF's samples.

    :param model: name for :func:`~nncf_compactprune.run.models.resolve_model`.
    :param model_options: keyword arguments of the model's builder.
    :param weights: safetensors file of the dense model.
    :param dataset: name for :func:`~nncf_compactprune.run.datasets.resolve_dataset`; without one nothing is
        trained and no accuracy measured.
    :param dataset_options: the dataset's own options.
    :param epochs: fine-tuning epochs, while and after pruning.
    :param pretrain_epochs: epochs of dense training first; ignored where weights are given.
    :param lr_schedule: how the learning rate falls, by epoch.
    :param output_dir: where the artefacts go.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str
    model_options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    dataset: str | None = None
    dataset_options: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=64, ge=1)
    epochs: int = Field(default=10, ge=0)
    pretrain_epochs: int = Field(default=0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = Field(default=0, ge=0)
    export: ExportConfig = ExportConfig()
    output_dir: str = "runs/compactprune"

    @classmethod
    def from_config(cls, config: CompressionConfig, source: str) -> RunConfig:
        """Reads the keys that a compression config leaves to the training script.

        :param source: the config's name, for messages.
        :raises ConfigError: with all problems, each with its JSON path.
        """
        return load_section(Document(source, dict(config.model_extra or {})), cls)


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


def run_schema() -> dict[str, Any]:
    """Returns the JSON schema's ``properties`` and ``$defs`` of :class:`RunConfig`, for a config's schema."""
    # The prefix keeps these definitions apart from an algorithm's of the same name.
    schema = RunConfig.model_json_schema(ref_template="#/$defs/run.{model}")
    definitions = {f"run.{name}": definition for name, definition in schema["$defs"].items()}
    return {"properties": schema["properties"], "$defs": definitions}


def unread_key_warnings(keys: Iterable[str]) -> list[str]:
    """Returns one sentence per top-level key that nobody reads but that is close to one that somebody does.

    Other unread keys are the user's own business: a config may serve several scripts.
    """
    known = {*RunConfig.model_fields, *CompressionConfig.model_fields}
    warnings = []
    for key in keys:
        close = [] if key in known else difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
        warnings += [f"'{key}' is not read. Did you mean '{close[0]}'?" for _ in close]
    return warnings


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    criterion: Criterion = nn.functional.cross_entropy,
    controller: Controller | None = None,
) -> tuple[float, float]:
    """Trains for one pass over the batches.

    :param controller: a compression controller; its scheduler is stepped and its loss added, as in NNCF's samples.
    :returns: mean loss per image and top-1 in [0, 1].
    """
    device = _device(model)
    model.train()
    loss_sum, correct, images = 0.0, 0, 0
    for inputs, labels in batches:
        inputs, labels = inputs.to(device), labels.to(device)
        if controller is not None:
            controller.scheduler.step()
        scores = class_scores(model(inputs))
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
    device = _device(model)
    correct, images = 0, 0
    with evaluating(model):
        for inputs, labels in batches:
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
    on_epoch: Callable[[EpochRecord], None] | None = None,
    snapshots: Snapshots | None = None,
    phase: int = 0,
    resume: Snapshot | None = None,
) -> list[EpochRecord]:
    """Trains in place.

    :param batches: iterated once per epoch.
    :param lr_schedule: ``cosine`` falls from the optimizer's learning rate towards zero over the epochs.
    :param controller: a compression controller, stepped as in NNCF's samples.
    :param on_epoch: called with each epoch's record.
    :param snapshots: where every epoch leaves a snapshot of the run.
    :param phase: which part of the run this is, for the snapshots.
    :param resume: a snapshot of this phase to go on from; the model has its shapes (``create_compressed_model`` with
        its compression state). With the same batches in the same order the weights end as those of a run in one piece:
        on a CPU, bit for bit.
    :returns: one record per epoch trained here.
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
        loss, accuracy = train_epoch(model, batches, optimizer, criterion=criterion, controller=controller)
        if schedule is not None:
            schedule.step()
        records.append(EpochRecord(epoch, loss, accuracy, lr, time.perf_counter() - start))
        if on_epoch is not None:
            on_epoch(records[-1])
        if snapshots is not None:
            state = getattr(controller, "get_compression_state", lambda: None)()
            snapshots.save(phase, epoch, model, optimizer, schedule, batches, compression=state)
    return records


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
