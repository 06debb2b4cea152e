"""A small detector of the YOLO kind is trained on drawn shapes, pruned, fine-tuned, quantized and exported.

    python examples/detector_int8.py [--output runs/detector] [--steps 300]

Backbone with split and concatenated blocks, a pyramid of two resolutions, a head on each. A prediction is an
objectness, two class scores and a box for every cell. Accuracy is the share of pictures whose best cell has the right
class and a box that overlaps the shape by half.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune import create_compressed_model, export_model, prune

SIZE, STRIDES, CLASSES = 64, (8, 16), 2
Batch = tuple[Tensor, Tensor, Tensor]  # pictures [n, 3, h, w], classes [n], boxes [n, 4] as centre and size in pixels


def conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Stage(nn.Module):
    """Half of the channels go through a bottleneck; everything is concatenated, as in YOLO's C2f."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down, self.one, self.two = (
            conv(inputs, outputs, 2),
            conv(outputs // 2, outputs // 2),
            conv(outputs // 2, outputs // 2),
        )
        self.join = conv(outputs // 2 * 3, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.down(x).chunk(2, 1)
        return self.join(torch.cat([kept, worked, worked + self.two(self.one(worked))], 1))


class Detector(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.stage1 = conv(3, width, 2), Stage(width, 2 * width)
        self.stage2, self.stage3 = Stage(2 * width, 4 * width), Stage(4 * width, 8 * width)
        self.lateral = conv(12 * width, 4 * width, kernel=1)
        self.heads = nn.ModuleList(
            nn.Sequential(conv(width * n, 2 * width), nn.Conv2d(2 * width, 1 + CLASSES + 4, 1)) for n in (4, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``[n, 3, h, w]`` to ``[n, cells, 1 + classes + 4]``, the cells of both resolutions in a row."""
        fine = self.stage2(self.stage1(self.stem(x)))
        coarse = self.stage3(fine)
        up = functional.interpolate(coarse, scale_factor=2.0)
        fine = self.lateral(torch.cat([fine, up], 1))
        levels = zip((fine, coarse), self.heads, strict=True)
        return torch.cat([head(level).flatten(2) for level, head in levels], 2).transpose(1, 2)


def cells() -> tuple[Tensor, Tensor]:
    """Centres ``[cells, 2]`` and strides ``[cells, 1]`` in pixels."""
    centres, strides = [], []
    for stride in STRIDES:
        ys, xs = torch.meshgrid(*[torch.arange(SIZE // stride)] * 2, indexing="ij")
        centres.append((torch.stack([xs, ys], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full((len(centres[-1]), 1), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def boxes(predicted: Tensor) -> Tensor:
    """The boxes of all cells, ``[n, cells, 4]``: centre and size in pixels."""
    centres, strides = cells()
    raw = predicted[..., 1 + CLASSES :]
    return torch.cat([centres + raw[..., :2] * strides, raw[..., 2:].clamp(-4, 4).exp() * strides * 2], -1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes, ``[..., 4]`` to ``[...]``."""
    low = torch.maximum(one[..., :2] - one[..., 2:] / 2, other[..., :2] - other[..., 2:] / 2)
    high = torch.minimum(one[..., :2] + one[..., 2:] / 2, other[..., :2] + other[..., 2:] / 2)
    both = (high - low).clamp_min(0).prod(-1)
    return both / (one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - both)


def draw(count: int, seed: int) -> Batch:
    """Pictures of noise with one disc (class 0) or one square (class 1) in each."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(count, 3, SIZE, SIZE, generator=generator) * 0.5
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    sizes = torch.randint(12, 33, (count,), generator=generator).float()
    centres = sizes[:, None] / 2 + torch.rand(count, 2, generator=generator) * (SIZE - sizes)[:, None]
    away = torch.stack(torch.meshgrid(*[torch.arange(SIZE)] * 2, indexing="xy"), -1) - centres[:, None, None]
    radius = sizes[:, None, None] / 2
    inside = torch.where(
        labels[:, None, None] == 0, away.norm(dim=-1) < radius, (away.abs() < radius[..., None]).all(-1)
    )
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 0.5 + 0.5
    return torch.where(inside[:, None], colour, pictures), labels, torch.cat([centres, sizes[:, None].expand(-1, 2)], 1)


def loss(predicted: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """The cell nearest to the shape's centre answers for it, on the resolution that suits its size."""
    centres, strides = cells()
    wanted = torch.where(truth[:, 2:3] < 22, STRIDES[0], STRIDES[1])
    distance = (centres[None] - truth[:, None, :2]).norm(dim=-1) + 1e3 * (strides[:, 0][None] != wanted)
    cell, rows = distance.argmin(1), torch.arange(len(labels))
    objects = torch.zeros_like(predicted[..., 0]).index_put((rows, cell), torch.ones(len(rows)))
    found = functional.binary_cross_entropy_with_logits(predicted[..., 0], objects, reduction="sum") / len(rows)
    classified = functional.cross_entropy(predicted[rows, cell, 1 : 1 + CLASSES], labels)
    return found + classified + 2 * (1 - overlap(boxes(predicted)[rows, cell], truth)).mean()


@torch.no_grad()
def accuracy(model: nn.Module, test: Batch) -> float:
    predicted = model.eval()(test[0])
    best, rows = predicted[..., 0].argmax(1), torch.arange(len(predicted))
    right = predicted[rows, best, 1 : 1 + CLASSES].argmax(1) == test[1]
    return float((right & (overlap(boxes(predicted)[rows, best], test[2]) >= 0.5)).float().mean())


def train(model: nn.Module, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(steps):
        pictures, labels, truth = draw(32, seed=step)
        optimizer.zero_grad()
        loss(model(pictures), labels, truth).backward()
        optimizer.step()
        schedule.step()


def main(output: Path = Path("runs/detector"), steps: int = 300) -> None:
    torch.manual_seed(0)
    model, test = Detector(), draw(200, seed=10**6)
    train(model, steps, 3e-3)
    print(f"dense: {accuracy(model, test):.1%}")

    pictures, loader = test[0][:2], [draw(32, seed=10**5 + batch)[:2] for batch in range(10)]
    result = prune(model, pictures, budget={"macs": 0.5}, train_loader=loader)
    print(f"{result.plan.before.macs:,} -> {result.plan.after.macs:,} MACs, error {result.self_check.error:.0e}")
    train(model, steps // 2, 1e-3)
    print(f"pruned: {accuracy(model, test):.1%}")

    int8 = {
        "algorithm": "quantization",
        "preset": "mixed",
        "params": {"start_epoch": None},
        "ignored_scopes": ["{re}heads"],
    }
    ctrl, model = create_compressed_model(model, {"compression": int8}, loader, example_inputs=pictures)
    files = export_model(ctrl.strip(), pictures, output)
    print(f"INT8: {accuracy(ctrl.model, test):.1%}")
    for file in files:
        print(f"{file.path}: {file.bytes:,} bytes, {file.label}")


if __name__ == "__main__":
    typer.run(main)
