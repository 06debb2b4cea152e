"""Detection: trains torchvision's FCOS with a small backbone, halves its MACs, fine-tunes; mAP at each step.

pip install torchvision torchmetrics pycocotools
python examples/detection.py --pictures 600 --epochs 12 --fine-tuning 4
"""

from __future__ import annotations

import argparse

import torch
from shapes_on_photographs import CLASSES, SIZE, pictures
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from nncf_compactprune import prune

Targets = list[dict[str, Tensor]]


def small_fcos() -> FCOS:
    """FCOS on one level of 8 x 8 places."""
    layers: list[nn.Module] = []
    for i, o in ((3, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers += [nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 64  # torchvision asks for it
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    return FCOS(backbone, len(CLASSES), anchor_generator=anchors, min_size=SIZE, max_size=SIZE, num_convs=2)


def train(model: nn.Module, images: Tensor, targets: Targets, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(16):
            losses = model(list(images[batch]), [targets[at] for at in batch])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        schedule.step()


@torch.no_grad()
def mean_ap(model: nn.Module, images: Tensor, targets: Targets) -> float:
    """mAP at an overlap of 0.5."""
    model.eval()
    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    for at in range(0, len(images), 50):
        metric.update(model(list(images[at : at + 50])), targets[at : at + 50])
    return float(metric.compute()["map_50"])


def main(number: int, epochs: int, fine_tuning: int) -> None:
    torch.manual_seed(0)
    images, _, targets = pictures(number, train=True)
    test_images, _, test_targets = pictures(max(number // 4, 20), train=False)
    model = small_fcos()
    train(model, images, targets, epochs, 2e-3)
    dense = mean_ap(model, test_images, test_targets)

    example = ([images[0], images[1]],)  # a detector is called with one list
    result = prune(model, example, budget={"macs": 0.5})
    pruned = mean_ap(model, test_images, test_targets)
    train(model, images, targets, fine_tuning, 1e-3)
    tuned = mean_ap(model, test_images, test_targets)
    print(f"{result.plan.before.macs:,} -> {result.plan.after.macs:,} MACs; {result.self_check}")
    print(f"mAP at 0.5: dense {dense:.1%}, pruned {pruned:.1%}, fine-tuned {tuned:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fine-tuning", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.pictures, arguments.epochs, arguments.fine_tuning)
