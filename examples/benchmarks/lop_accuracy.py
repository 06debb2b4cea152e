"""Recovery of a pruned ResNet-20 on CIFAR-10: plain fine-tuning against distillation and linear over-parameterization.

    python examples/benchmarks/lop_accuracy.py tune --data FOLDER    # learning rates and weights, on a validation slice
    python examples/benchmarks/lop_accuracy.py final --data FOLDER   # all arms, budgets and seeds, on the test set
    python examples/benchmarks/lop_accuracy.py table                 # writes lop_accuracy.md from the rows there are

FOLDER holds ``cifar10_*.npz`` and ``resnet20_cifar10.safetensors``. The network is pruned by ``fbnet_pruning`` (global,
L2, BatchNorm re-estimated on 2,000 training images) and then trained for equally many epochs on the first 10,000
training images in every arm. Rows are appended to ``lop_accuracy.jsonl``; what is there is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import typer
from cifar_packs import packed_cifar10
from torch.utils.data import Subset

from nncf_compactprune import create_compressed_model
from nncf_compactprune.run.datasets import ResolvedDataset
from nncf_compactprune.run.models import load_weights
from nncf_compactprune.run.networks.cifar_resnet import resnet20
from nncf_compactprune.run.settings import OptimizerConfig
from nncf_compactprune.run.training import evaluate

HERE = Path(__file__).parent
TRAIN_IMAGES, VALIDATION_IMAGES = 10_000, 5_000
BATCH = 128
BUDGETS = (0.5, 0.35, 0.2)
SEEDS = (0, 1, 2)
TUNING_BUDGET, TUNING_SEED = 0.35, 100


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
    feature_size: int | None = None
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
        distillation = {**weights, "feature_size": self.feature_size}
        if self.expansion is None and not any(weights.values()):
            return [pruning]
        recovery = {
            "algorithm": "linear_overparameterization",
            "params": {"form": "none"}
            if self.expansion is None
            else {
                "form": "factors",
                "expansion": self.expansion,
                "core_scale": self.core_scale,
                "weight_decay": self.merged_decay,
            },
            "distillation": distillation,
        }
        return [pruning, recovery]


class Data:
    """The images, read once: training, validation and test part."""

    def __init__(self, folder: Path) -> None:
        whole = packed_cifar10(folder, TRAIN_IMAGES + VALIDATION_IMAGES)
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
    judge = data.judged_on[trial.judged_on].test_loader(500)
    start = evaluate(model, judge) if (trial.arm, trial.seed) == ("plain", 0) else None  # the same for all
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
    accuracy = evaluate(model, judge)
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


TITLES = {
    "plain": "(a) plain fine-tuning",
    "kd": "(b) logits KD",
    "lop": "(c) LOP",
    "spkd": "(d) SPKD",
    "lop_spkd": "(e) LOP + SPKD",
}
LOP: dict[str, Any] = {"expansion": 4}
#: what ``tune`` chose: the best of its arm
CHOSEN: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.01},
    "kd": {"lr": 0.01, "logits_weight": 0.3},
    "lop": {"lr": 0.003, **LOP},
    "spkd": {"lr": 0.01, "similarity_weight": 30_000.0, "feature_size": 8},
    "lop_spkd": {"lr": 0.003, "similarity_weight": 30_000.0, "feature_size": 8, **LOP},
}


def tuning_trials() -> list[Trial]:
    """Learning rates by factors of about three around the best of each arm; then weights, decay and core."""
    tried: list[tuple[str, dict[str, Any]]] = [("plain", {"lr": lr}) for lr in (0.003, 0.01, 0.03, 0.1)]
    tried += [("kd", {"lr": lr, "logits_weight": 0.1}) for lr in (0.01, 0.03)]
    tried += [("kd", {"lr": 0.03, "logits_weight": 1.0})]
    tried += [("kd", {"lr": 0.01, "logits_weight": weight}) for weight in (0.3, 1.0)]
    tried += [("lop", {"lr": lr, **LOP}) for lr in (0.001, 0.003, 0.01, 0.03)]
    tried += [("lop", {"lr": lr, "core_scale": 0.0, **LOP}) for lr in (0.003, 0.01, 0.03)]
    tried += [("spkd", {"lr": lr, "similarity_weight": 3000.0}) for lr in (0.01, 0.03)]
    tried += [("spkd", {"lr": 0.01, "similarity_weight": weight}) for weight in (1e4, 3e4, 1e5)]
    tried += [("lop_spkd", {"lr": lr, "similarity_weight": 3000.0, **LOP}) for lr in (0.003, 0.01)]
    tried += [("lop_spkd", {"lr": 0.01, "core_scale": 0.0, "similarity_weight": 3000.0, **LOP})]
    tried += [("lop_spkd", {"lr": lr, "similarity_weight": 1e4, **LOP}) for lr in (0.003, 0.01)]
    tried += [("lop_spkd", {"lr": 0.003, "similarity_weight": 3e4, **LOP})]
    tried += [(arm, CHOSEN[arm]) for arm in ("spkd", "lop_spkd")]
    return [Trial(arm, TUNING_BUDGET, TUNING_SEED, judged_on="validation", **options) for arm, options in tried]


def final_trials() -> list[Trial]:
    """In an order that leaves whole comparisons where a run is cut short; the mildest budget comes last."""
    order = [(seed, budget) for seed in SEEDS for budget in BUDGETS[1:]] + [(seed, BUDGETS[0]) for seed in SEEDS]
    return [
        Trial(arm, budget, seed, judged_on="test", **options)
        for seed, budget in order
        for arm, options in CHOSEN.items()
    ]


def mean_and_spread(values: list[float]) -> str:
    """In percent; the spread is the sample standard deviation."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def final_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| arm | " + " | ".join(f"{budget:.0%} of MACs" for budget in BUDGETS) + " |"]
    lines.append("|---|" + "---|" * len(BUDGETS))
    found: dict[tuple[str, float], dict[int, float]] = {}
    before: dict[float, float] = {}
    for row in rows:
        trial = row["trial"]
        if trial["judged_on"] == "test":
            found.setdefault((trial["arm"], trial["budget"]), {})[trial["seed"]] = row["accuracy"]
            if row["accuracy_before"] is not None:
                before[trial["budget"]] = row["accuracy_before"]
    lines.append(
        "| not fine-tuned | " + " | ".join(f"{100 * before[b]:.2f}" if b in before else "" for b in BUDGETS) + " |"
    )
    for arm, title in TITLES.items():
        cells = []
        for budget in BUDGETS:
            seeds, plain = found.get((arm, budget), {}), found.get(("plain", budget), {})
            cell = f"{mean_and_spread(list(seeds.values()))}" if seeds else ""
            gains = [seeds[seed] - plain[seed] for seed in seeds if seed in plain]
            if arm != "plain" and gains:
                cell += f" ({100 * statistics.mean(gains):+.2f})"
            cells.append(cell + (f" [{len(seeds)} seed(s)]" if seeds and len(seeds) < len(SEEDS) else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def tuning_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| arm | lr | options | accuracy |", "|---|---|---|---|"]
    for row in rows:
        trial = row["trial"]
        if trial["judged_on"] == "validation":
            names = ("core_scale", "merged_decay") if trial["expansion"] else ()
            options = {
                name: trial[name]
                for name in (*names, "similarity_weight", "feature_size", "logits_weight")
                if trial[name] is not None
            }
            shown = ", ".join(f"{name} {value:g}" for name, value in options.items() if value or name == "core_scale")
            lines.append(f"| {TITLES[trial['arm']]} | {trial['lr']:g} | {shown} | {100 * row['accuracy']:.2f} |")
    return lines


INTRODUCTION = f"""# Recovery of a pruned ResNet-20 on CIFAR-10

`python examples/benchmarks/lop_accuracy.py final --data FOLDER`. Test accuracy in percent (all 10,000 images), mean
and standard deviation over {len(SEEDS)} seeds (order and augmentation of the images); in brackets the mean gain over
plain fine-tuning with the same seed. Every arm: one epoch of {TRAIN_IMAGES:,} images, batch {BATCH}, SGD with
momentum 0.9 and decay 5e-4, learning rate falling to 0 by a cosine. The network is pruned by `fbnet_pruning` (global,
L2, widths of multiples of 8), and BatchNorm re-estimated. The dense network: 91.73.
"""
TUNING = f"""## Tuning

`lop_accuracy.py tune`: {TUNING_BUDGET:.0%} of the MACs, one seed, accuracy on {VALIDATION_IMAGES:,} training images
that were not trained on. With one seed, differences below about a point say little.
"""


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The page beside this file."""
    chosen = (
        f"- {TITLES[arm]}: " + ", ".join(f"{name} {value:g}" for name, value in options.items())
        for arm, options in CHOSEN.items()
    )
    text = [
        INTRODUCTION,
        *final_table(rows),
        "",
        "Chosen by the tuning below:",
        "",
        *chosen,
        "",
        TUNING,
        *tuning_table(rows),
    ]
    path.write_text("\n".join(text) + "\n")


def main(what: str, data: Path = Path("data/cifar10"), rows: Path = HERE / "lop_accuracy.jsonl") -> None:
    torch.set_num_threads(1)
    if what in ("tune", "final"):
        run_missing(tuning_trials() if what == "tune" else final_trials(), Data(data), rows)
    elif what != "table":
        message = f"expected tune, final or table, got '{what}'"
        raise typer.BadParameter(message)
    write_table(read_rows(rows), HERE / "lop_accuracy.md")


if __name__ == "__main__":
    typer.run(main)
