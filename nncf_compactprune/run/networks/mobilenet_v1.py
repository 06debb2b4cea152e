"""MobileNetV1 (Howard et al. 2017) as TensorFlow trained it: padding at the bottom and the right, ReLU6, eps 1e-3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class MobileNetV1(nn.Module):
    """Thirteen depthwise separable blocks. Inputs are RGB / 127.5 - 1, ``[n, 3, h, w]`` with even h and w.

    Modules are named as in TensorFlow's checkpoints: ``conv1``, ``conv1_bn``, ``conv_dw_1``, ``conv_dw_1_bn``,
    ``conv_pw_1``, ``conv_pw_1_bn``, ..., ``conv_preds``. Each ReLU6 is a module, so that channels can be equalised
    through it.

    :param width: multiplier of all channel counts.
    :param classes: number of class scores.
    """

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * width)
        self._add("conv1", nn.Conv2d(3, channels, 3, stride=2, bias=False))
        for at, (wide, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), 1):
            same = 0 if stride == 2 else 1
            self._add(f"conv_dw_{at}", nn.Conv2d(channels, channels, 3, stride, same, groups=channels, bias=False))
            self._add(f"conv_pw_{at}", nn.Conv2d(channels, int(wide * width), 1, bias=False))
            channels = int(wide * width)
        self.conv_preds = nn.Conv2d(channels, classes, 1)

    def _add(self, name: str, conv: nn.Conv2d) -> None:
        self.add_module(name, conv)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(conv.out_channels, eps=1e-3))
        self.add_module(f"{name}_relu", nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[n, classes]``."""
        for name, conv in self.named_children():
            if isinstance(conv, nn.Conv2d) and conv is not self.conv_preds:
                x = conv(F.pad(x, (0, 1, 0, 1)) if conv.stride == (2, 2) else x)
                x = self.get_submodule(f"{name}_relu")(self.get_submodule(f"{name}_bn")(x))
        scores: Tensor = self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)
        return scores


def mobilenet_v1(width: float = 1.0, classes: int = 1000) -> MobileNetV1:
    """The network, for configs: ``"python:nncf_compactprune.run.networks.mobilenet_v1:mobilenet_v1"``.

    :param width: multiplier of all channel counts.
    :param classes: number of class scores.
    """
    return MobileNetV1(width, classes)
