"""Accuracy after pruning CIFAR-10 ResNets to 70, 50 and 35 % of their MACs, ``catro`` against other criteria.

    python examples/benchmarks/catro.py --data FOLDER [--part resnet20|resnet56|long|samples|time]

Same groups (the channels inside every block), same budgets, same short fine-tuning for all. The first 2,000 test images
are for choices, here and in ``catro_forms.py``; what is reported is measured on the other 8,000. Rows are kept in
``catro.jsonl``, so a killed run goes on; ``catro.md`` is written from them. Needs torch-pruning (``make bench-deps``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from catro_cifar import (
    DATA,
    INNER,
    SHORT_TEST,
    TRAIN_IMAGES,
    Cifar,
    Rows,
    accuracy,
    at_once,
    fine_tuned,
    largest_within,
)
from torch import nn

from nncf_compactprune import analyse, create_compressed_model

HERE = Path(__file__).parent
BUDGETS, SEEDS = (0.35, 0.5, 0.7), (0, 1, 2)
CRITERIA = {
    "L1": "l1", "L2": "l2", "BN scale": "batch_norm_scale", "geometric median": "geometric_median", "Taylor": "taylor",
}  # fmt: skip
PEERS: dict[str, Callable[[], Any]] = {
    "Torch-Pruning, L2": lambda: tp.importance.MagnitudeImportance(p=2),
    "Torch-Pruning, Taylor": tp.importance.TaylorImportance,
}
ARMS = ("catro", *CRITERIA, *PEERS)
LONG = ("catro", "geometric median", "L1", "Torch-Pruning, L2", "Torch-Pruning, Taylor")
ALLOCATIONS = ("uniform", "global")


def macs(model: nn.Module) -> int:
    return analyse(copy.deepcopy(model), torch.zeros(1, 3, 32, 32), trial=False).macs


def ours(data: Cifar, depth: int, budget: float, algorithm: str, seed: int, per_class: int = 50, **params: Any) -> Any:
    """Cut at once by this project, BatchNorm statistics left as they are; also the controller."""
    entry = {
        "algorithm": algorithm, "budget": {"macs": budget}, "target_scopes": INNER,
        "params": {"schedule": "one_shot", "round_to": 1, **params},
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    }  # fmt: skip
    loader = data.few(per_class, seed)
    controller, model = create_compressed_model(
        data.model(depth), {"compression": entry}, loader, example_inputs=data.test[:2]
    )
    return model, controller


def peer(data: Cifar, depth: int, budget: float, name: str, allocation: str, seed: int) -> nn.Module:
    """Torch-Pruning's pruner on the same groups, its ratio bisected to the largest network within the budget."""
    most = budget * macs(data.model(depth))

    def pruned(ratio: float) -> nn.Module:
        model = data.model(depth)
        inner = {m for n, m in model.named_modules() if n.startswith("layer") and n.endswith("conv1")}
        others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inner]
        pruner = tp.pruner.BasePruner(
            model, data.test[:2], importance=PEERS[name](), global_pruning=allocation == "global", pruning_ratio=ratio,
            max_pruning_ratio=0.9, ignored_layers=others,
        )  # fmt: skip
        if "Taylor" in name:
            for x, y in data.few(50, seed):
                nn.functional.cross_entropy(model(x), y).backward()
        pruner.step()
        model.zero_grad()
        return model

    return largest_within(most, macs, pruned)


def build(data: Cifar, depth: int, budget: float, arm: str, allocation: str, seed: int) -> nn.Module:
    if arm.startswith("Torch-Pruning"):
        return peer(data, depth, budget, arm, allocation, seed)
    if arm == "catro":
        return ours(data, depth, budget, "catro", seed)[0]
    return ours(data, depth, budget, "fbnet_pruning", seed, importance=CRITERIA[arm], allocation=allocation)[0]


def measured(
    data: Cifar, rows: Rows, depth: int, budget: float, arm: str, allocation: str, seed: int, epochs: int = 1
) -> dict[str, Any]:
    """Right after pruning, with BatchNorm statistics averaged, and after fine-tuning. The seed draws the labelled
    samples too."""

    def measure() -> dict[str, Any]:
        model = build(data, depth, budget, arm, allocation, seed)
        tuned = fine_tuned(model, data.train, data.train_labels, seed=seed, epochs=epochs)
        return {
            "macs": macs(model),
            **at_once(data, model, slice(SHORT_TEST, 2 * SHORT_TEST)),
            "tuned": accuracy(tuned, data.test[SHORT_TEST:], data.test_labels[SHORT_TEST:]),
            "choice": accuracy(tuned, data.test[:SHORT_TEST], data.test_labels[:SHORT_TEST]),
        }  # fmt: skip

    return rows.get(row_key(len(data.train) * epochs, depth, budget, arm, allocation, seed), measure)


def row_key(images: int, depth: int, budget: float, arm: str, allocation: str, seed: int) -> str:
    return f"{images} images, resnet{depth}, {budget}, {arm}, {allocation}, {seed}"


def chosen(rows: Rows, depth: int, budget: float, arm: str) -> str | None:
    """``catro`` has its own allocation; the others get whichever does better after fine-tuning, with the first seed."""
    if arm == "catro":
        return "own"
    keys = {a: row_key(TRAIN_IMAGES, depth, budget, arm, a, 0) for a in ALLOCATIONS}
    found = {a: rows.rows[key]["choice"] for a, key in keys.items() if key in rows.rows}
    return max(found, key=lambda a: found[a]) if found else None


def tables(data: Cifar, rows: Rows, depth: int) -> None:
    first = data.head(TRAIN_IMAGES)
    for seed in SEEDS:
        for budget in BUDGETS:
            for arm in ARMS:
                if seed == 0 and arm != "catro":
                    for allocation in ALLOCATIONS:
                        measured(first, rows, depth, budget, arm, allocation, seed)
                else:
                    measured(first, rows, depth, budget, arm, chosen(rows, depth, budget, arm) or "uniform", seed)


def long(data: Cifar, rows: Rows) -> None:
    """ResNet-20 after two epochs on all training images."""
    for budget in BUDGETS:
        for arm in LONG:
            measured(data, rows, 20, budget, arm, chosen(rows, 20, budget, arm) or "uniform", 0, epochs=2)


def samples(data: Cifar, rows: Rows) -> None:
    """How many labelled samples of a class it takes, three draws each."""
    data = data.head(TRAIN_IMAGES)
    for per_class in (5, 10, 50, 200):
        for seed in SEEDS:

            def measure(per_class: int = per_class, seed: int = seed) -> dict[str, Any]:
                model, _ = ours(data, 20, 0.5, "catro", seed, per_class, samples_per_class=per_class)
                return at_once(data, model, slice(SHORT_TEST, None))

            rows.get(f"samples {per_class} {seed}", measure)


def duration(data: Cifar, rows: Rows) -> None:
    """Statistics and selection on ResNet-56 with 500 samples, in forward passes over them: medians of five, in turn."""

    def measure() -> dict[str, Any]:
        batches, model = data.few(50), data.model(56)
        forward, chosen = [], []
        for _ in range(5):
            start = time.perf_counter()
            with torch.no_grad():
                for x, _ in batches:
                    model(x)
            forward.append(time.perf_counter() - start)
            _, controller = ours(data, 56, 0.5, "catro", 0)
            seconds = controller._context.seconds
            chosen.append(seconds["scores"] + seconds["allocation"])
        one, both = statistics.median(forward), statistics.median(chosen)
        return {"forward_s": one, "chosen_s": both, "passes": both / one}

    rows.get("time", measure)


PARTS = {
    "time": duration,
    "samples": samples,
    "resnet20": partial(tables, depth=20),
    "resnet56": partial(tables, depth=56),
    "long": long,
}


# -- tables ------------------------------------------------------------------------------------------------------------


def figures(rows: Rows, images: int, depth: int, budget: float, arm: str) -> list[dict[str, Any]]:
    """Of all seeds that were run, with the chosen allocation."""
    allocation = chosen(rows, depth, budget, arm)
    keys = [row_key(images, depth, budget, arm, allocation or "", seed) for seed in SEEDS]
    return [rows.rows[key] for key in keys if key in rows.rows]


def cell(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    tuned = [row["tuned"] for row in found]
    spread = f" ± {statistics.stdev(tuned):.2f}" if len(tuned) > 1 else ""
    before = (statistics.mean(row[k] for row in found) for k in ("pruned", "adapted"))
    return f"{' / '.join(f'{b:.1f}' for b in before)} / **{statistics.mean(tuned):.2f}**{spread} ({len(tuned)})"


def report(rows: Rows) -> str:
    lines = [
        "# Accuracy after pruning CIFAR-10 ResNets",
        "",
        "Right after pruning / BatchNorm statistics of 2,000 training images / after fine-tuning, mean ± deviation "
        "(seeds). On 8,000 test images that nothing was chosen by (the first two figures on 2,000 of them). `catro` "
        "has its own allocation, the others the better of uniform and global, chosen after fine-tuning with the first "
        "seed, by the 2,000 test images left. 500 labelled images where a criterion needs some.",
        "",
    ]
    for depth, images, told in (
        (20, TRAIN_IMAGES, "one epoch on 10,000 images"),
        (20, 100_000, "two epochs on all 50,000 images"),
        (56, TRAIN_IMAGES, "one epoch on 10,000 images"),
    ):
        cells = {arm: [cell(figures(rows, images, depth, b, arm)) for b in BUDGETS[::-1]] for arm in ARMS}
        if any(any(row) for row in cells.values()):
            lines += [f"## ResNet-{depth}, {told}", ""]
            lines += ["| kept by | " + " | ".join(f"{b:.0%} of the MACs" for b in BUDGETS[::-1]) + " |"]
            lines += ["|---|" + "---|" * len(BUDGETS)]
            lines += [f"| {arm} | {' | '.join(row)} |" for arm, row in cells.items() if any(row)] + [""]
    lines += ["## Samples per class (ResNet-20, half of the MACs, three draws)", "", "| samples | right after | + BN |"]
    lines.append("|---|---|---|")
    for per_class in (5, 10, 50, 200):
        found = [r for s in SEEDS if (r := rows.rows.get(f"samples {per_class} {s}"))]
        if found:
            means = (statistics.mean(r[k] for r in found) for k in ("pruned", "adapted"))
            lines.append(f"| {per_class} | {' | '.join(f'{m:.1f}' for m in means)} |")
    if "time" in rows.rows:
        row = rows.rows["time"]
        lines += [
            "",
            f"Statistics and selection on ResNet-56 with 500 samples: {row['chosen_s']:.1f} s, "
            f"{row['passes']:.2f} forward passes over them ({row['forward_s']:.1f} s each); one thread.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--part", choices=[*PARTS, "none"], action="append", help="none: only write the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(HERE / "catro.jsonl")
    data = Cifar.load(arguments.data, None)
    for part in arguments.part or PARTS:
        if part != "none":
            PARTS[part](data, rows)
    (HERE / "catro.md").write_text(report(rows))


if __name__ == "__main__":
    main()
