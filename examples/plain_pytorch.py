"""A plain PyTorch script: mixed precision, channels_last, an EMA copy, a checkpoint every epoch, and a resumed run.

    python examples/plain_pytorch.py [--epochs 6] [--output runs/plain] [--compile]

A run that was killed goes on from its checkpoint when it is started again. What the package adds says ctrl.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import typer
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nncf_compactprune import create_compressed_model, export_model
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.networks.digits_net import digits_net
from nncf_compactprune.run.training import evaluate

CONFIG = {
    "input_info": {"sample_size": [1, 1, 16, 16]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "num_init_steps": 1, "pruning_steps": 2},
    },
}


def main(epochs: int = 6, output: Path = Path("runs/plain"), compile: bool = False) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = resolve_dataset("digits")
    model = digits_net().to(device, memory_format=torch.channels_last)
    saved = output / "checkpoint.pt"
    checkpoint = torch.load(saved, map_location=device, weights_only=True) if saved.exists() else None

    ctrl, model = create_compressed_model(
        model,
        CONFIG,
        train_loader=data.train_loader(64),
        compression_state=checkpoint and json.loads(checkpoint["ctrl"]),  # cut to the plan, before the weights
    )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    ctrl.attach(optimizer=optimizer, ema=ema)  # they are cut along
    if checkpoint:
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(checkpoint[name])

    for epoch in range(checkpoint["epoch"] + 1 if checkpoint else 0, epochs):
        ctrl.scheduler.epoch_step(epoch)
        model.train()
        for images, labels in data.train_loader(64, seed=epoch):
            ctrl.scheduler.step()
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16):
                scores = model(images)
            loss = functional.cross_entropy(scores.float(), labels.to(device)) + ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
        print(f"epoch {epoch + 1}: {ctrl.compression_rate:.0%} of the MACs removed, loss {loss:.3f}")
        output.mkdir(parents=True, exist_ok=True)
        parts = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**parts, "epoch": epoch, "ctrl": json.dumps(ctrl.get_compression_state())}, f"{saved}.new")
        os.replace(f"{saved}.new", saved)  # whole or not at all

    ctrl.strip()
    compact = ema.module
    test = data.test_loader(64)
    accuracy = evaluate(torch.compile(compact) if compile else compact, test)
    file = export_model(compact, torch.randn(2, 1, 16, 16, device=device), output / "model.xml")[0]
    print(f"accuracy {accuracy:.1%}, {file.path}: {file.bytes:,} bytes")


if __name__ == "__main__":
    typer.run(main)
