"""Cutting on the way of a schedule beside masks: what an equal training costs, and how accurate it ends.

    python examples/benchmarks/shrink_while_training.py --data FOLDER   # writes shrink_while_training.md

FOLDER holds ``cifar10_*.npz`` and ``resnet{20,56}_cifar10.safetensors``. The three arms of a seed follow each other, in
another order for each seed, on the same batches: masks to the end of training, the cut at the end of the schedule, and
cuts in every epoch of the schedule. Times are CPU times of training steps, decisions and cuts, without evaluation.
Rows are kept in ``runs/shrink_while_training``; a run that was killed goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from catro_cifar import DATA, Cifar, accuracy

from nncf_compactprune import create_compressed_model, plan_of
from nncf_compactprune.run.datasets import crop_and_flip

HERE = Path(__file__).parent
ROWS = HERE.parent.parent / "runs" / "shrink_while_training" / "rows.jsonl"
ARMS = {"masks to the end": None, "cut at the schedule's end": {}, "shrink_every 1": {"shrink_every": 1}}
BATCH, LR = 128, 0.02


def train(cifar: Cifar, depth: int, arm: str, seed: int, epochs: int, steps: int, budget: float) -> dict[str, Any]:
    """One training; masks to the end are those of a run whose optimizer the controller does not know."""
    model = cifar.model(depth)
    params = {"schedule": "exponential", "pruning_steps": steps, **(ARMS[arm] or {})}
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": budget}, "params": params}
    entry["initializer"] = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    config = {"input_info": {"sample_size": [1, 3, 32, 32]}, "compression": entry}
    ctrl, model = create_compressed_model(model, config, example_inputs=cifar.test[:2])
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    if ARMS[arm] is not None:
        ctrl.attach(optimizer=optimizer)
    generator = torch.Generator().manual_seed(seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    seconds = []
    for _ in range(epochs):
        order = torch.randperm(len(cifar.train), generator=generator).split(BATCH)
        batches = [(crop_and_flip(cifar.train[part], generator), cifar.train_labels[part]) for part in order]
        started = time.process_time()
        ctrl.scheduler.epoch_step()
        model.train()
        for images, labels in batches:
            ctrl.scheduler.step()
            loss = F.cross_entropy(model(images), labels) + ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()
        seconds.append(time.process_time() - started)
    model = ctrl.strip()
    plan = plan_of(model)
    assert plan is not None
    left = plan.after.macs / plan.before.macs
    return {"accuracy": accuracy(model, cifar.test, cifar.test_labels), "seconds": seconds, "macs": left}


def main(
    data: Annotated[Path, typer.Option(help="What holds the packs and the trained weights.")] = DATA,
    depth: int = 20,
    images: int = 4_000,
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
        names = list(ARMS)
        for arm in names[seed % 3 :] + names[: seed % 3]:
            key = {**setting, "arm": arm, "seed": seed}
            if any(row | key == row for row in rows):
                continue
            rows.append({**key, **train(cifar, depth, arm, seed, epochs, steps, budget)})
            with ROWS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(arm, seed, f"{rows[-1]['accuracy']:.4f}", [round(s, 1) for s in rows[-1]["seconds"]], flush=True)
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
