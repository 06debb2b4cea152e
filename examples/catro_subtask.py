"""Prunes a network for handwritten digits down to telling 3 from 8: fewer channels, and a classifier of two classes.

python examples/catro_subtask.py --dense-epochs 8 --epochs 3
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from nncf_compactprune import load_pruned, prune, save_pruned
from nncf_compactprune.algorithms.catro.subtask import ClassSubset
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.networks.digits_net import digits_net
from nncf_compactprune.run.training import evaluate, fit


def trained(model: nn.Module, batches: object, epochs: int, lr: float) -> nn.Module:
    fit(model, batches, torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4), epochs=epochs)
    return model


def main(dense_epochs: int, epochs: int) -> None:
    torch.manual_seed(0)
    digits = resolve_dataset("digits")
    train, test = digits.train_loader(64), digits.test_loader(200)
    model = trained(digits_net(), train, dense_epochs, 0.05)

    images = next(iter(test))[0][:2]
    result = prune(model, images, "catro", budget={"macs": 0.2}, train_loader=train, classes=[3, 8])
    classes = result.plan.output_classes  # (3, 8): output 0 is the digit 3, output 1 the digit 8
    trained(model, ClassSubset(train, classes), epochs, 0.02)
    accuracy = evaluate(model, ClassSubset(test, classes))
    print(f"{result.plan.before.macs:,} -> {result.plan.after.macs:,} MACs, classes {classes}: {accuracy:.1%} right")

    save_pruned(model, "runs/catro_subtask")
    again = load_pruned(digits_net(), "runs/catro_subtask")
    assert torch.equal(model.eval()(images), again(images))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    main(arguments.dense_epochs, arguments.epochs)
