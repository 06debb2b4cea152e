"""Recovery of a pruned ResNet-20 on CIFAR-10: plain fine-tuning against distillation and linear over-parameterization.

    python examples/benchmarks/lop_accuracy.py --data FOLDER tune    # learning rates and weights, on a validation slice
    python examples/benchmarks/lop_accuracy.py --data FOLDER final   # all arms, budgets and seeds, on the test set
    python examples/benchmarks/lop_accuracy.py table                 # writes lop_accuracy.md from the rows there are

FOLDER holds ``cifar10_*.npz`` and ``resnet20_cifar10.safetensors``. The network is pruned by ``fbnet_pruning`` (global,
L2, BatchNorm re-estimated on 2,000 training images) and then trained for equally many epochs on the first 10,000
training images in every arm. Rows are appended to ``lop_accuracy.jsonl``; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from nncf_compactprune import create_compressed_model
from nncf_compactprune.integrations.cifar_resnet import resnet20
from nncf_compactprune.integrations.datasets import ResolvedDataset, resolve_dataset
from nncf_compactprune.integrations.models import load_weights
from nncf_compactprune.training import OptimizerConfig, evaluate, fit

HERE = Path(__file__).parent
TRAIN_IMAGES, VALIDATION_IMAGES = 10_000, 5_000
BATCH = 128
BUDGETS = (0.5, 0.35, 0.2)
SEEDS = (0, 1, 2)
TUNING_BUDGET, TUNING_SEED = 0.35, 100
RATES = (0.01, 0.03, 0.1)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run; equal trials give equal results.

    :param budget: share of MACs kept.
    :param lr: at the start of a cosine over all steps.
    :param expansion: r, or None for no expansion.
    :param merged_decay: decay of merged weights; None: the optimizer's decay, on factors.
    :param judged_on: ``"validation"`` or ``"test"``.
    """

    arm: str
    budget: float
    seed: int
    lr: float
    judged_on: str
    expansion: int | None = None
    core_scale: float = 1.0
    merged_decay: float | None = None
    similarity_weight: float = 0.0
    logits_weight: float = 0.0
    epochs: int = 1

    def compression(self) -> list[dict[str, Any]]:
        """The config's ``"compression"``."""
        pruning = {
            "algorithm": "fbnet_pruning",
            "budget": {"macs": self.budget},
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 2000}},
            "params": {"schedule": "one_shot", "allocation": "global"},
        }
        weights = {"similarity_weight": self.similarity_weight, "logits_weight": self.logits_weight}
        if self.expansion is None and not any(weights.values()):
            return [pruning]
        recovery = {
            "algorithm": "linear_overparameterization",
            "params": {
                "expansion": self.expansion,
                "core_scale": self.core_scale,
                "weight_decay": self.merged_decay,
            },
            "distillation": weights,
        }
        return [pruning, recovery]


class Data:
    """The images, read once: training, validation and test part."""

    def __init__(self, folder: Path) -> None:
        whole = resolve_dataset(f"cifar10:{folder}", {"train_samples": TRAIN_IMAGES + VALIDATION_IMAGES})
        end = TRAIN_IMAGES + VALIDATION_IMAGES
        self.weights = folder / "resnet20_cifar10.safetensors"
        self.train = dataclasses.replace(whole, train=Subset(whole.train, range(TRAIN_IMAGES)))
        self.judged_on: dict[str, ResolvedDataset] = {
            "validation": dataclasses.replace(whole, test=Subset(whole.train, range(TRAIN_IMAGES, end))),
            "test": whole,
        }


def run(trial: Trial, data: Data) -> dict[str, Any]:
    """Prunes, trains, evaluates."""
    torch.manual_seed(trial.seed)
    model = resnet20()
    load_weights(model, data.weights)
    loader = data.train.train_loader(BATCH, seed=trial.seed)
    document = {"input_info": {"sample_size": [2, 3, 32, 32]}, "compression": trial.compression()}
    ctrl, model = create_compressed_model(model, document, data.train.train_loader(BATCH, augment=False, seed=0))
    start = evaluate(model, data.judged_on[trial.judged_on].test_loader(500)) if trial.seed == 0 else None
    optimizer = OptimizerConfig(lr=trial.lr).build(model)
    ctrl.attach(optimizer=optimizer)
    steps = trial.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started, losses = time.perf_counter(), []
    for _ in range(trial.epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for images, labels in loader:
            ctrl.scheduler.step()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            added = ctrl.loss()
            (loss + added).backward()
            optimizer.step()
            schedule.step()
            losses.append((loss.item(), float(torch.as_tensor(added).detach())))
    seconds = time.perf_counter() - started
    model = ctrl.strip()
    accuracy = evaluate(model, data.judged_on[trial.judged_on].test_loader(500))
    first, last = losses[0], [sum(column) / 10 for column in zip(*losses[-10:], strict=True)]
    return {
        "accuracy": accuracy,
        "accuracy_before": start,
        "seconds": seconds,
        "task_loss": [first[0], last[0]],
        "added_loss": [first[1], last[1]],
    }


def run_missing(trials: list[Trial], data: Data, rows_file: Path) -> None:
    """Runs what the rows do not hold yet."""
    done = {json.dumps(row["trial"], sort_keys=True) for row in read_rows(rows_file)}
    for at, trial in enumerate(trials):
        key = dataclasses.asdict(trial)
        if json.dumps(key, sort_keys=True) in done:
            continue
        row = {"trial": key, **run(trial, data)}
        with rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{k}={v}" for k, v in key.items() if v is not None)
        print(f"{at + 1}/{len(trials)} {row['accuracy']:.2%} {row['seconds']:.0f} s  {shown}", flush=True)


def read_rows(rows_file: Path) -> list[dict[str, Any]]:
    """What was run so far."""
    if not rows_file.exists():
        return []
    return [json.loads(line) for line in rows_file.read_text().splitlines()]


ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kd": {"logits_weight": 0.1},
    "lop": {"expansion": 4},
    "spkd": {"similarity_weight": 10_000.0},
    "lop_spkd": {"expansion": 4, "similarity_weight": 10_000.0},
}
TITLES = {
    "plain": "(a) plain fine-tuning",
    "kd": "(b) logits KD",
    "lop": "(c) LOP",
    "spkd": "(d) SPKD",
    "lop_spkd": "(e) LOP + SPKD",
}
