"""CIFAR-10 in memory, trained ResNets, and the measuring that the benchmarks of ``catro`` share."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_packs import packed_cifar10
from safetensors.torch import load_file
from torch import Tensor, nn

from nncf_compactprune.run.datasets import crop_and_flip
from nncf_compactprune.run.networks.cifar_resnet import resnet20, resnet56

DATA = Path("../shared/data")
TRAIN_IMAGES, SHORT_TEST = 10_000, 2_000
INNER = ["{re}layer.*conv1"]  # the channels inside every block
BUILDERS: dict[int, Callable[[], nn.Module]] = {20: resnet20, 56: resnet56}


@dataclass(frozen=True)
class Cifar:
    """Normalised images ``[n, 3, 32, 32]`` and labels ``[n]``: the first training images, all test images."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    folder: Path

    @classmethod
    def load(cls, folder: Path, train_images: int | None = TRAIN_IMAGES) -> Cifar:
        data = packed_cifar10(folder, train_images)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
        parts: Any = (data.train, data.test)
        (x, y), (u, v) = (((p.images.float() / 255 - mean) / std, p.labels) for p in parts)
        return cls(x, y, u, v, folder)

    def head(self, train_images: int) -> Cifar:
        """With the first training images only."""
        return replace(self, train=self.train[:train_images], train_labels=self.train_labels[:train_images])

    def model(self, depth: int) -> nn.Module:
        model = BUILDERS[depth]()
        model.load_state_dict(load_file(self.folder / f"resnet{depth}_cifar10.safetensors"), strict=False)
        return model.eval()

    def few(self, per_class: int, seed: int = 0, batch: int = 100) -> list[tuple[Tensor, Tensor]]:
        """Batches of so many training images of every class, another draw for each seed."""
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(1000 + seed))
        labels = self.train_labels[order]
        chosen = torch.cat([order[labels == c][:per_class] for c in range(10)])
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
        return [(self.train[part], self.train_labels[part]) for part in chosen.split(batch)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, classes: list[int] | None = None) -> float:
    """Top-1 in percent, in eval mode; with classes, among these scores only."""
    model.eval()
    hits = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        scores = model(x)
        hits += int(((scores if classes is None else scores[:, classes]).argmax(1) == y).sum())
    return 100 * hits / len(labels)


@torch.no_grad()
def adapted(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy with BatchNorm statistics averaged over batches of images."""
    model = copy.deepcopy(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for x in batches:
        model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def largest_within(most: float, cost: Callable[[nn.Module], float], pruned: Callable[[float], nn.Module]) -> nn.Module:
    """The largest network within a budget of what takes a ratio of channels, which is bisected.

    :param most: the budget.
    :param cost: of a network.
    :param pruned: a network pruned by a ratio.
    """
    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(pruned(middle)) <= most else (middle, high)
    return pruned(high)


def at_once(data: Cifar, model: nn.Module, images: slice) -> dict[str, float]:
    """Accuracy on some of the test images: as the model is, and with BatchNorm statistics of 2,000 training images."""
    judged = data.test[images], data.test_labels[images]
    return {
        "pruned": accuracy(model, *judged),
        "adapted": accuracy(adapted(model, data.train[:2000].split(500)), *judged),
    }


def fine_tuned(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int = 1,
    lr: float = 0.02,
    more_loss: Callable[[], Tensor] | None = None,
) -> nn.Module:
    """A copy after SGD (batch 128, momentum 0.9, weight decay 5e-4, cosine to 0 over all steps, crops and flips); with
    a controller's loss, which knows this model only, the model itself."""
    model = (model if more_loss else copy.deepcopy(model)).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4)
    per_epoch = max(len(images) // 128, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(128)[:per_epoch]:
            loss = F.cross_entropy(model(crop_and_flip(images[part], generator)), labels[part])
            loss = loss if more_loss is None else loss + more_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class Rows:
    """Results by key in a JSONL file: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.rows:
            row = self.rows[key] = {"key": key, **measure()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return self.rows[key]
