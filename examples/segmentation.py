"""Segmentation: trains a U-Net on shapes drawn on photographs, halves its MACs, fine-tunes; mean IoU at each step.

python examples/segmentation.py --pictures 600 --epochs 12 --fine-tuning 4
"""

from __future__ import annotations

import argparse

import torch
from shapes_on_photographs import CLASSES, pictures
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from nncf_compactprune import prune


def stage(i: int, o: int) -> nn.Sequential:
    layers = [(nn.Conv2d(a, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for a in (i, o)]
    return nn.Sequential(*(layer for three in layers for layer in three))


class UNet(nn.Module):
    """Three resolutions, skip connections by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c = stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width)
        self.up_b, self.up_a = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
            nn.ConvTranspose2d(2 * width, width, 2, 2),
        )
        self.join_b, self.join_a = stage(4 * width, 2 * width), stage(2 * width, width)
        self.out = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        c = self.c(nn.functional.max_pool2d(b, 2))
        b = self.join_b(torch.cat([self.up_b(c), b], 1))
        return self.out(self.join_a(torch.cat([self.up_a(b), a], 1)))


def train(model: nn.Module, images: Tensor, masks: Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(16):
            loss = nn.functional.cross_entropy(model(images[batch]), masks[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    model.eval()
    metric = MulticlassJaccardIndex(len(CLASSES))
    for x, y in zip(images.split(50), masks.split(50), strict=True):
        metric.update(model(x).argmax(1), y)
    return float(metric.compute())


def main(number: int, epochs: int, fine_tuning: int) -> None:
    torch.manual_seed(0)
    images, masks, _ = pictures(number, train=True)
    test_images, test_masks, _ = pictures(max(number // 4, 20), train=False)
    model = UNet()
    train(model, images, masks, epochs, 3e-3)
    dense = mean_iou(model, test_images, test_masks)

    batches = list(zip(images.split(50), masks.split(50), strict=True))  # re-estimate BatchNorm statistics
    result = prune(model, images[:2], budget={"macs": 0.5}, train_loader=batches)
    pruned = mean_iou(model, test_images, test_masks)
    train(model, images, masks, fine_tuning, 1e-3)
    tuned = mean_iou(model, test_images, test_masks)
    print(f"{result.plan.before.macs:,} -> {result.plan.after.macs:,} MACs; {result.self_check}")
    print(f"mean IoU: dense {dense:.1%}, pruned {pruned:.1%}, fine-tuned {tuned:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fine-tuning", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.pictures, arguments.epochs, arguments.fine_tuning)
