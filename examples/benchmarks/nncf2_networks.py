"""The networks that NNCF 2.x's sample configurations name, with random weights: torchvision's, and narrow ones of the
kinds that were NNCF's own (SSD detectors, a U-Net, an ICNet). Module and class names are as in the scopes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm_import import let_torchvision_import
from torch import Tensor, nn

OWN = ("ssd_vgg", "ssd_mobilenet", "unet", "icnet")


def network(config: Mapping[str, Any]) -> nn.Module:
    """The network that a configuration names, in train mode.

    :param config: with ``"model"`` and perhaps ``"num_classes"``.
    :raises ValueError: there is none of this name.
    """
    name, classes = config["model"], config.get("num_classes", 1000)
    if name in OWN:
        kinds = {"ssd_vgg": SSD, "ssd_mobilenet": SSD, "unet": UNet, "icnet": ICNet}
        return kinds[name](config.get("num_classes", 20))
    let_torchvision_import()
    from torchvision import models

    known = name.lower().removesuffix("_cifar").removesuffix("_32x32")
    options = {"aux_logits": False, "init_weights": True} if known in ("googlenet", "inception_v3") else {}
    if not hasattr(models, known):
        msg = f"no network is called {name!r}"
        raise ValueError(msg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(models, known)(weights=None, num_classes=classes, **options)
    return model


def _conv(i: int, o: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, stride, padding), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]


class L2Norm(nn.Module):
    """Scales every position's channels to one length (Liu et al. 2016, SSD)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.weight.view(1, -1, 1, 1)


class SSD(nn.Module):
    """A single-shot detector: heads on feature maps of falling size, boxes and scores of all of them in one list."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.classes = classes
        wide = 2 * width
        self.basenet = nn.Sequential(
            *_conv(3, width), *_conv(width, width), nn.MaxPool2d(2),
            *_conv(width, wide), *_conv(wide, wide), nn.MaxPool2d(2),
            *_conv(wide, wide), nn.MaxPool2d(2), *_conv(wide, wide),
        )  # fmt: skip
        self.L2Norm = L2Norm(wide)
        self.extras = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, width, 1), nn.ReLU(inplace=True), *_conv(width, wide, 2)) for _ in range(3)
        )
        self.detection_head = nn.ModuleList(SSDHead(wide, 4, classes) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.basenet(x)
        maps = [self.L2Norm(x)]
        for extra in self.extras:
            x = extra(x)
            maps.append(x)
        found = [head(features) for head, features in zip(self.detection_head, maps, strict=True)]
        boxes, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return boxes.view(len(boxes), -1, 4), scores.view(len(scores), -1, self.classes)


class SSDHead(nn.Module):
    """Boxes and scores at one scale."""

    def __init__(self, channels: int, boxes: int, classes: int) -> None:
        super().__init__()
        self.loc = nn.Conv2d(channels, boxes * 4, 3, padding=1)
        self.conf = nn.Conv2d(channels, boxes * classes, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = (layer(x).permute(0, 2, 3, 1).flatten(1) for layer in (self.loc, self.conf))
        return boxes, scores


class UNet(nn.Module):
    """Ronneberger et al. 2015, four steps down and up, cropped where sides are odd."""

    def __init__(self, classes: int, width: int = 16, depth: int = 5) -> None:
        super().__init__()
        widths = [width * 2**step for step in range(depth)]
        self.down_path = nn.ModuleList(UNetConvBlock(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up_path = nn.ModuleList(UNetUpBlock(i, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        bridges: list[Tensor] = []
        for down in self.down_path:
            x = down(F.max_pool2d(x, 2) if bridges else x)
            bridges.append(x)
        for up, bridge in zip(self.up_path, bridges[-2::-1], strict=True):
            x = up(x, bridge)
        return self.last(x)


class UNetConvBlock(nn.Module):
    """Two convolutions."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(o),
            nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(o),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class UNetUpBlock(nn.Module):
    """Twice the size, beside the bridge from the way down."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(i, o, 2, stride=2)
        self.conv_block = UNetConvBlock(2 * o, o)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        up = self.up(x)
        height, width = up.shape[2:]
        return self.conv_block(torch.cat([up, bridge[:, :, :height, :width]], 1))


class ICNet(nn.Module):
    """Two resolutions of one picture, fused (after Zhao et al. 2018)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.fine = nn.Sequential(*_conv(3, width, 2), *_conv(width, width, 2))
        self.coarse = nn.Sequential(*_conv(3, width, 2), *_conv(width, width, 2), *_conv(width, width))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(F.interpolate(x, scale_factor=0.5))
        return self.last(fine + F.interpolate(coarse, size=fine.shape[2:]))
