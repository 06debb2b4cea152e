"""timm's train.py, small: its loaders, optimizers, schedules, EMA, mixup and distillation task, and a pruned model.

    python examples/timm_train.py [--model test_resnet] [--epochs 8] [--output runs/timm] [--images 1000]

The lines that are not in timm's own train.py end with "# +". Data: scikit-learn's digits, as pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import typer
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import accuracy
from torch import nn
from torch.utils.data import Dataset

from nncf_compactprune import create_compressed_model, export_model  # +
from nncf_compactprune.integrations.timm import load_pruned_timm, save_pruned_timm  # +

SIZE = (3, 32, 32)
COMPRESSION = {  # +
    "input_info": {"sample_size": [2, *SIZE]},  # +
    "compression": {  # +
        "algorithm": "fbnet_pruning",  # +
        "budget": {"macs": 0.5},  # +
        "params": {"schedule": "exponential", "pruning_steps": 3},  # +
    },  # +
}  # +


class Digits(Dataset[Any]):
    """Pictures and labels; timm's loader sets the transform."""

    def __init__(self, part: slice) -> None:
        images, self.labels = load_digits(return_X_y=True)
        self.images = (images.reshape(-1, 8, 8)[part] * 15.9).astype("uint8")
        self.labels = self.labels[part].tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.labels[index]


def train(
    task: nn.Module, loader: Iterable[Any], optimizer: Any, mixup: Mixup, ctrl: Any, epoch: int, step: int
) -> int:
    task.train()
    for images, labels in loader:
        if ctrl is not None:  # +
            ctrl.scheduler.step()  # +
        images, labels = mixup(images, labels)
        loss = task(images, labels)["loss"]
        if ctrl is not None:  # +
            loss = loss + ctrl.loss()  # +
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        task.update_ema(step=step)
    return step


@torch.no_grad()
def validate(model: nn.Module, loader: Iterable[Any]) -> float:
    model.eval()
    parts = [(accuracy(model(images), labels)[0], len(labels)) for images, labels in loader]
    return float(sum(top1 * n for top1, n in parts) / sum(n for _, n in parts))


def main(model: str = "test_resnet", epochs: int = 8, output: Path = Path("runs/timm"), images: int = 1000) -> None:
    torch.manual_seed(0)
    model_args = {"num_classes": 10}
    net = timm.create_model(model, **model_args)
    data_config = resolve_data_config({"input_size": SIZE}, model=net)
    common = {"input_size": SIZE, "batch_size": 64, "mean": data_config["mean"], "std": data_config["std"]}
    common |= {"use_prefetcher": False, "num_workers": 0, "persistent_workers": False, "device": torch.device("cpu")}
    light = {"hflip": 0.0, "scale": (0.8, 1.0), "color_jitter": None}
    loader = create_loader(Digits(slice(images)), is_training=True, **common, **light)
    test = create_loader(Digits(slice(1200, 1797)), **common)
    mixup = Mixup(mixup_alpha=0.1, num_classes=10)

    def run(net: nn.Module, task: Any, ctrl: Any = None) -> nn.Module:
        task.setup_ema(decay=0.95)
        optimizer = create_optimizer_v2(net, opt="adamw", lr=2e-3, weight_decay=1e-4)
        schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1)
        if ctrl is not None:  # +
            ctrl.attach(optimizer=optimizer, ema=task.trainable_module_ema)  # +
        step = 0
        for epoch in range(epochs):
            if ctrl is not None:  # +
                ctrl.scheduler.epoch_step()  # +
            step = train(task, loader, optimizer, mixup, ctrl, epoch, step)
            schedule.step(epoch + 1)
            removed = "" if ctrl is None else f", {ctrl.compression_rate:.0%} of the MACs removed"
            ema = validate(task.get_eval_model(ema=True), test)
            print(f"epoch {epoch + 1}: {validate(net, test):.1f} %, {ema:.1f} % (EMA){removed}")
        return task.trainable_module_ema.module

    print("Training the dense model")
    run(net, ClassificationTask(net, criterion=SoftTargetCrossEntropy(), device=torch.device("cpu")))

    print("Pruning it, with its own copy as the teacher")
    teacher = copy.deepcopy(net)
    ctrl, net = create_compressed_model(net, COMPRESSION)  # + after create_model, before the optimizer
    soft = {"criterion": SoftTargetCrossEntropy(), "device": torch.device("cpu"), "temperature": 2.0}
    best = run(net, LogitDistillationTask(net, teacher, **soft), ctrl)

    ctrl.strip()  # +
    save_pruned_timm(best, output, **model_args)  # +
    again = load_pruned_timm(output)  # + create_model, cut to the plan, filled
    assert resolve_data_config(model=again)["mean"] == data_config["mean"]
    file = export_model(again, torch.randn(2, *SIZE), output / "model.onnx")[0]  # +
    print(f"{validate(again, test):.1f} %, {file.path}: {file.bytes:,} bytes")


if __name__ == "__main__":
    typer.run(main)
