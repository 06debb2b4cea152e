"""Cutting on the way of a schedule beside masks: what an equal training costs, and how accurate it ends.

    python examples/benchmarks/shrink_while_training.py --data FOLDER   # writes shrink_while_training.md

FOLDER holds ``cifar10_*.npz`` and ``resnet{20,56}_cifar10.safetensors``. The arms of a seed train in turn, batch by
batch, on the same batches, so that what else the machine does falls on all alike: masks to the end of training, the cut
at the end of the schedule, and cuts in every epoch of the schedule. Times are CPU times of training steps, decisions
and cuts. Rows are kept in ``runs/shrink_while_training``; what is finished is not run again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from catro_cifar import DATA, Cifar, accuracy
from torch import Tensor

from nncf_compactprune import create_compressed_model, plan_of
from nncf_compactprune.run.datasets import crop_and_flip

HERE = Path(__file__).parent
ROWS = HERE.parent.parent / "runs" / "shrink_while_training" / "rows.jsonl"
ARMS = {"masks to the end": None, "cut at the schedule's end": {}, "shrink_every 1": {"shrink_every": 1}}
BATCH, LR = 128, 0.02


class Arm:
    """One training. Masks to the end are those of a run whose optimizer the controller does not know."""

    def __init__(self, cifar: Cifar, depth: int, name: str, epochs: int, steps: int, budget: float) -> None:
        params = {"schedule": "exponential", "pruning_steps": steps, **(ARMS[name] or {})}
        entry = {"algorithm": "fbnet_pruning", "budget": {"macs": budget}, "params": params}
        entry["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
        config = {"input_info": {"sample_size": [1, 3, 32, 32]}, "compression": entry}
        self.ctrl, self.model = create_compressed_model(cifar.model(depth), config, example_inputs=cifar.test[:2])
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
        if ARMS[name] is not None:
            self.ctrl.attach(optimizer=self.optimizer)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.seconds: list[float] = []

    def begin(self) -> None:
        self.seconds.append(0.0)
        self._timed(self.ctrl.scheduler.epoch_step)
        self.model.train()

    def step(self, images: Tensor, labels: Tensor) -> None:
        self._timed(lambda: self._step(images, labels))

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.ctrl.scheduler.step()
        loss = F.cross_entropy(self.model(images), labels) + self.ctrl.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _timed(self, action: Callable[[], object]) -> None:
        started = time.process_time()
        action()
        self.seconds[-1] += time.process_time() - started

    def result(self, cifar: Cifar) -> dict[str, Any]:
        model = self.ctrl.strip()
        plan = plan_of(model)
        assert plan is not None
        right = accuracy(model, cifar.test, cifar.test_labels)
        return {"accuracy": right, "seconds": self.seconds, "macs": plan.after.macs / plan.before.macs}


def train(cifar: Cifar, depth: int, seed: int, epochs: int, steps: int, budget: float) -> dict[str, dict[str, Any]]:
    """All arms of a seed, batch by batch in turn."""
    arms = {name: Arm(cifar, depth, name, epochs, steps, budget) for name in ARMS}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for arm in arms.values():
            arm.begin()
        for part in torch.randperm(len(cifar.train), generator=generator).split(BATCH):
            images, labels = crop_and_flip(cifar.train[part], generator), cifar.train_labels[part]
            for arm in arms.values():
                arm.step(images, labels)
        for arm in arms.values():
            arm.decay.step()
    return {name: arm.result(cifar) for name, arm in arms.items()}


def main(
    data: Annotated[Path, typer.Option(help="What holds the packs and the trained weights.")] = DATA,
    depth: int = 20,
    images: int = 2_000,
    epochs: int = 8,
    steps: Annotated[int, typer.Option(help="Epochs of the schedule.")] = 4,
    budget: Annotated[float, typer.Option(help="Share of the MACs kept.")] = 0.5,
    seeds: int = 3,
) -> None:
    """Trains what is missing, and writes the table."""
    torch.set_num_threads(1)
    cifar = Cifar.load(data, images)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    setting = {"depth": depth, "images": images, "epochs": epochs, "steps": steps, "budget": budget}
    for seed in range(seeds):
        if any(row | {**setting, "seed": seed} == row for row in rows):
            continue
        for arm, found in train(cifar, depth, seed, epochs, steps, budget).items():
            rows.append({**setting, "arm": arm, "seed": seed, **found})
            print(arm, seed, f"{found['accuracy']:.2f} %", [round(s, 1) for s in found["seconds"]], flush=True)
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [row for row in rows if row | setting == row]
    (HERE / "shrink_while_training.md").write_text(report(rows, setting, seeds))


def report(rows: list[dict[str, Any]], setting: dict[str, Any], seeds: int) -> str:
    """The table: every ratio and difference is taken within a seed."""
    by_arm = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    reference = by_arm["masks to the end"]
    lines = [
        "# Shrinking on the way",
        "",
        f"ResNet-{setting['depth']} to {setting['budget']:.0%} of its MACs, {setting['epochs']} epochs of "
        f"{setting['images']:,} CIFAR-10 images, the schedule over {setting['steps']} of them, {seeds} seeds, one "
        "thread. `python examples/benchmarks/shrink_while_training.py --data FOLDER` writes this file. Times are CPU "
        "times. Ratios and differences are taken within a seed, to masks that stay to the end of training.",
        "",
        "| arm | MACs left | CPU seconds | ratio | test accuracy | difference, points |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, of in by_arm.items():
        seconds = [sum(r["seconds"]) for r in of]
        ratios = [sum(r["seconds"]) / sum(m["seconds"]) for r, m in zip(of, reference, strict=True)]
        points = [r["accuracy"] - m["accuracy"] for r, m in zip(of, reference, strict=True)]
        accuracies = ", ".join(f"{r['accuracy']:.2f} %" for r in of)
        lines.append(
            f"| {arm} | {statistics.mean(r['macs'] for r in of):.1%} | {statistics.mean(seconds):.1f} "
            f"| {statistics.mean(ratios):.2f} | {accuracies} | {', '.join(f'{p:+.2f}' for p in points)} |"
        )
    lines += ["", "CPU seconds of each epoch, mean over the seeds:", "", f"| arm | {' | '.join(_numbers(setting))} |"]
    lines.append("|---|" + "---:|" * setting["epochs"])
    for arm, of in by_arm.items():
        each = (statistics.mean(s) for s in zip(*(r["seconds"] for r in of), strict=True))
        lines.append(f"| {arm} | {' | '.join(f'{s:.1f}' for s in each)} |")
    return "\n".join(lines) + "\n"


def _numbers(setting: dict[str, Any]) -> list[str]:
    return [str(n + 1) for n in range(setting["epochs"])]


if __name__ == "__main__":
    typer.run(main)
