"""NNCF's training loop on scikit-learn's digits: the network shrinks while it trains, and is exported.

    python examples/nncf_training_loop.py [--dense-epochs 8] [--epochs 9] [--output runs/digits.onnx]

Everything of the package's own is in the lines that say ctrl.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from nncf_compactprune import CompressionController, create_compressed_model
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.networks.digits_net import digits_net
from nncf_compactprune.run.training import Batches, evaluate, fit

CONFIG = {
    "input_info": {"sample_size": [1, 1, 16, 16]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.4},
        "params": {"schedule": "exponential", "pruning_steps": 3},
    },
}


def sgd(model: nn.Module, lr: float) -> Optimizer:
    return SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


def train_epoch(ctrl: CompressionController, model: nn.Module, batches: Batches, optimizer: Optimizer) -> None:
    ctrl.scheduler.epoch_step()
    model.train()
    for images, labels in batches:
        ctrl.scheduler.step()
        loss = nn.functional.cross_entropy(model(images), labels) + ctrl.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(dense_epochs: int = 8, epochs: int = 9, output: Path = Path("runs/digits.onnx")) -> None:
    torch.manual_seed(0)
    data = resolve_dataset("digits")
    batches, test = data.train_loader(64), data.test_loader(64)
    model = digits_net()
    fit(model, batches, sgd(model, 0.05), epochs=dense_epochs)
    print(f"dense: {evaluate(model, test):.1%}")

    ctrl, model = create_compressed_model(model, CONFIG, train_loader=batches)
    optimizer = sgd(model, 0.05)
    ctrl.attach(optimizer=optimizer)  # its state is cut with the weights
    schedule = CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        train_epoch(ctrl, model, batches, optimizer)
        schedule.step()
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(f"epoch {epoch + 1}: {ctrl.compression_rate:.0%} of the MACs removed, {weights:,} parameters in memory")

    print(ctrl.statistics().to_str())
    files = ctrl.export_model(output)  # strips, writes, reopens and compares
    print(f"compact: {evaluate(model, test):.1%}, {files[0].path}: {files[0].bytes:,} bytes")


if __name__ == "__main__":
    typer.run(main)
