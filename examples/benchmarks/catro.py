"""Accuracy after pruning CIFAR-10 ResNets to 70, 50 and 35 % of their MACs, ``catro`` against other criteria.

    python examples/benchmarks/catro.py --data FOLDER [--part resnet20|resnet56|samples|time]

Same groups (the channels inside every block), same budgets, same short fine-tuning for all. Rows are kept in
``catro.jsonl``, so a killed run goes on; ``catro.md`` is written from them. Needs torch-pruning (``make bench-deps``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from catro_cifar import DATA, INNER, SHORT_TEST, Cifar, Rows, accuracy, adapted, fine_tuned
from torch import nn

from nncf_compactprune import create_compressed_model, trace

HERE = Path(__file__).parent
BUDGETS, SEEDS = (0.35, 0.5, 0.7), (0, 1, 2)
# A run that is stopped early has compared all arms on as much as it could.
ORDER = ((0, 0.35), (1, 0.35), (2, 0.35), (0, 0.5), (0, 0.7), (1, 0.5), (2, 0.5), (1, 0.7), (2, 0.7))
CRITERIA = {
    "L1": "l1", "L2": "l2", "BN scale": "batch_norm_scale", "geometric median": "geometric_median", "Taylor": "taylor",
}  # fmt: skip
PEERS: dict[str, Callable[[], Any]] = {
    "Torch-Pruning, L2": lambda: tp.importance.MagnitudeImportance(p=2),
    "Torch-Pruning, Taylor": tp.importance.TaylorImportance,
}
TUNED = ("catro", "Torch-Pruning, Taylor", "L1", "geometric median", "Taylor", "BN scale")
ALLOCATIONS = ("uniform", "global")


def macs(model: nn.Module) -> int:
    return trace(copy.deepcopy(model), torch.zeros(1, 3, 32, 32)).macs


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

    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(pruned(middle)) <= most else (middle, high)
    return pruned(high)


def build(data: Cifar, depth: int, budget: float, arm: str, allocation: str, seed: int) -> nn.Module:
    if arm.startswith("Torch-Pruning"):
        return peer(data, depth, budget, arm, allocation, seed)
    if arm.startswith("catro"):
        params = {} if allocation == "own" else {"allocation": allocation}
        return ours(data, depth, budget, "catro", seed, **params, **({"form": "plain"} if "plain" in arm else {}))[0]
    return ours(data, depth, budget, "fbnet_pruning", seed, importance=CRITERIA[arm], allocation=allocation)[0]


def at_once(data: Cifar, rows: Rows, depth: int, budget: float, arm: str, allocation: str) -> dict[str, Any]:
    """Right after pruning and after BatchNorm adaptation."""

    def measure() -> dict[str, Any]:
        model = build(data, depth, budget, arm, allocation, 0)
        short = data.test[:SHORT_TEST], data.test_labels[:SHORT_TEST]
        return {
            "macs": macs(model), "pruned": accuracy(model, *short),
            "adapted": accuracy(adapted(model, data.train[:2000]), *short),
        }  # fmt: skip

    return rows.get(f"resnet{depth} {budget} {arm} {allocation}", measure)


def better_allocation(data: Cifar, rows: Rows, depth: int, budget: float, arm: str) -> str:
    """``catro`` has its own; the others take whichever does better after adaptation, on the test images even."""
    if arm == "catro":
        return "own"
    return max(ALLOCATIONS, key=lambda a: at_once(data, rows, depth, budget, arm, a)["adapted"])


def tuned(data: Cifar, rows: Rows, budget: float, arm: str, seed: int, allocation: str) -> dict[str, Any]:
    """ResNet-20 after one epoch on 10,000 images, on the whole test set. The seed draws the labelled samples too."""

    def measure() -> dict[str, Any]:
        model = fine_tuned(build(data, 20, budget, arm, allocation, seed), data.train, data.train_labels, seed=seed)
        return {"tuned": accuracy(model, data.test, data.test_labels)}

    return rows.get(f"tuned {budget} {arm} {allocation} {seed}", measure)


def resnet20(data: Cifar, rows: Rows) -> None:
    for budget in BUDGETS:
        for arm in ("catro", *CRITERIA, *PEERS):
            for allocation in ("own",) if arm == "catro" else ALLOCATIONS:
                at_once(data, rows, 20, budget, arm, allocation)
    for seed, budget in ORDER:
        for arm in TUNED:
            tuned(data, rows, budget, arm, seed, better_allocation(data, rows, 20, budget, arm))


def resnet56(data: Cifar, rows: Rows) -> None:
    for budget in (0.5, 0.35, 0.7):
        for arm in ("catro", *CRITERIA, *PEERS):
            for allocation in ("own",) if arm == "catro" else ALLOCATIONS:
                at_once(data, rows, 56, budget, arm, allocation)


def samples(data: Cifar, rows: Rows) -> None:
    """How many labelled samples of a class it takes, three draws each."""
    for per_class in (5, 10, 50, 200):
        for seed in SEEDS:

            def measure(per_class: int = per_class, seed: int = seed) -> dict[str, Any]:
                model, _ = ours(data, 20, 0.5, "catro", seed, per_class, samples_per_class=per_class)
                short = data.test[:SHORT_TEST], data.test_labels[:SHORT_TEST]
                return {
                    "pruned": accuracy(model, *short),
                    "adapted": accuracy(adapted(model, data.train[:2000]), *short),
                }

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


PARTS = {"resnet56": resnet56, "time": duration, "samples": samples, "resnet20": resnet20}


# -- tables ------------------------------------------------------------------------------------------------------------


def figures(rows: Rows, depth: int, budget: float, arm: str) -> dict[str, Any]:
    """Of the better allocation after adaptation; tuned accuracies of all seeds that were run."""
    own = ("own",) if arm == "catro" else ALLOCATIONS
    found = {a: rows.rows[key] for a in own if (key := f"resnet{depth} {budget} {arm} {a}") in rows.rows}
    if not found:
        return {}
    best = max(found, key=lambda a: found[a]["adapted"])
    tuned = [r["tuned"] for s in SEEDS if (r := rows.rows.get(f"tuned {budget} {arm} {best} {s}"))]
    return {**found[best], "tuned": tuned if depth == 20 else [], "allocation": best}


def cell(row: dict[str, Any]) -> str:
    if not row:
        return ""
    text = f"{row['pruned']:.1f} / {row['adapted']:.1f}"
    if row["tuned"]:
        spread = f" ± {statistics.stdev(row['tuned']):.2f}" if len(row["tuned"]) > 1 else ""
        text += f" / {statistics.mean(row['tuned']):.2f}{spread} ({len(row['tuned'])})"
    return text


def report(rows: Rows) -> str:
    lines = ["# Accuracy after pruning CIFAR-10 ResNets", ""]
    for depth in (20, 56):
        if not any(key.startswith(f"resnet{depth}") for key in rows.rows):
            continue
        after = " / one epoch on 10,000 images, all test images, mean ± deviation (seeds)" if depth == 20 else ""
        lines += [
            f"## ResNet-{depth}",
            "",
            f"Right after pruning / BatchNorm statistics of 2,000 training images{after}. The first two on 2,000 test "
            "images. The others with the better of uniform and global allocation (chosen after adaptation, by test "
            "accuracy), `catro` with its own. 500 labelled images where a criterion needs some.",
            "",
            "| kept by | " + " | ".join(f"{b:.0%} of the MACs" for b in BUDGETS[::-1]) + " |",
            "|---|" + "---|" * len(BUDGETS),
        ]
        for arm in ("catro", *CRITERIA, *PEERS):
            cells = [cell(figures(rows, depth, budget, arm)) for budget in BUDGETS[::-1]]
            if not any(cells):
                continue
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
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
    data = Cifar.load(arguments.data)
    for part in arguments.part or PARTS:
        if part != "none":
            PARTS[part](data, rows)
    (HERE / "catro.md").write_text(report(rows))


if __name__ == "__main__":
    main()
