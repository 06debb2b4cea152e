"""ResNet-20 pruned for 2, 3 and 5 of CIFAR-10's classes: how small at which accuracy on them.

    python examples/benchmarks/catro_subtasks.py --data FOLDER

Dense is the trained network with only these scores compared. Pruned networks are trained on 150,000 images of the
classes, crops and flips of the 5,000 there are of each (batch 128, learning rate 0.05, cosine), beside a teacher, the
dense network: ``catro`` and then ``linear_overparameterization`` with no expansion, which leaves similarity-preserving
distillation. Accuracy on all test images of the classes. Learning rate and distillation were chosen on those of the
first subtask. Rows are kept in ``catro_subtasks.jsonl``; the table goes to ``catro_subtasks.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from catro_cifar import DATA, INNER, Cifar, Rows, accuracy, fine_tuned
from torch import Tensor, nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.run.datasets import CIFAR10_CLASSES

HERE = Path(__file__).parent
SUBTASKS = ([0, 8], [0, 1, 8], [3, 5], [0, 1, 2, 8, 9])
BUDGETS = (0.33, 0.2)
IMAGES = 150_000
LONGER = 300_000  # for the first


def part(images: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    """The classes' samples, labels counted from 0."""
    hit = labels[:, None] == torch.tensor(classes)
    chosen = hit.any(1)
    return images[chosen], hit[chosen].int().argmax(1)


def pruned(data: Cifar, classes: list[int], budget: float, images_seen: int = IMAGES) -> dict[str, Any]:
    pruning = {
        "algorithm": "catro", "budget": {"macs": budget}, "target_scopes": INNER,
        "params": {"schedule": "one_shot", "round_to": 1, "classes": classes},
    }  # fmt: skip
    distillation = {"algorithm": "linear_overparameterization", "params": {"form": "none"}}
    controller, model = create_compressed_model(
        data.model(20), {"compression": [pruning, distillation]}, data.few(50), example_inputs=data.test[:2]
    )
    plan = plan_of(model)
    assert plan is not None
    images, labels = part(data.train, data.train_labels, classes)
    epochs = round(images_seen / len(images))
    tuned = fine_tuned(model, images, labels, seed=0, epochs=epochs, lr=0.05, more_loss=controller.loss)
    return {
        "macs": plan.after.macs, "times": plan.before.macs / plan.after.macs,
        "accuracy": accuracy(tuned, *part(data.test, data.test_labels, classes)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(HERE / "catro_subtasks.jsonl")
    data = Cifar.load(arguments.data, None)
    dense = data.model(20)
    try:
        for budget in BUDGETS:
            for classes in SUBTASKS:
                rows.get(f"{classes} dense", lambda c=classes: {"accuracy": dense_accuracy(data, dense, c)})
                rows.get(f"{classes} {budget}", lambda c=classes, b=budget: pruned(data, c, b))
            if budget == BUDGETS[0]:
                rows.get("longer", lambda: pruned(data, SUBTASKS[0], BUDGETS[0], LONGER))
    finally:
        (HERE / "catro_subtasks.md").write_text(report(rows))


def dense_accuracy(data: Cifar, dense: nn.Module, classes: list[int]) -> float:
    return accuracy(dense, *part(data.test, data.test_labels, classes), classes)


def report(rows: Rows) -> str:
    """A table of what is measured so far."""
    budgets = [b for b in BUDGETS if any(f"{classes} {b}" in rows.rows for classes in SUBTASKS)]
    lines = ["| classes | dense, % | " + " | ".join(f"{b:.0%} of the MACs, %" for b in budgets) + " |"]
    lines.append("|---|---" + "|---" * len(budgets) + "|")
    for classes in SUBTASKS:
        found = [rows.rows.get(f"{classes} {budget}") for budget in budgets]
        if any(found):
            cells = [f"{r['accuracy']:.2f} ({r['times']:.1f}x fewer)" if r else "" for r in found]
            names = ", ".join(CIFAR10_CLASSES[c] for c in classes)
            lines.append(f"| {names} | {rows.rows[f'{classes} dense']['accuracy']:.2f} | {' | '.join(cells)} |")
    if "longer" in rows.rows:
        longer = rows.rows["longer"]
        names = " and ".join(CIFAR10_CLASSES[c] for c in SUBTASKS[0])
        lines += ["", f"Trained on {LONGER:,} images, {names} reach {longer['accuracy']:.2f} % at {BUDGETS[0]:.0%}."]
    return "\n".join(["# Pruning for some of the classes", "", __doc__.split("\n\n")[2].strip(), "", *lines, ""])


if __name__ == "__main__":
    main()
