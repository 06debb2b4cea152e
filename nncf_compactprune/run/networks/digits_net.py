"""A small ConvNet of the FBNet family for the handwritten digits: the demo's dense model.

It has what makes compact networks awkward to prune: inverted residuals whose sums couple many layers, depthwise
convolutions, squeeze-and-excite gates and two kinds of activation (block structure after Sandler et al. 2018,
MobileNetV2, with the gates and hard-swish of FBNetV3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Stage(NamedTuple):
    """One row of the architecture table.

    :param channels: output width of every block of the stage.
    :param expansion: width of the depthwise convolution as a multiple of the block's input width.
    :param kernel: depthwise kernel size.
    :param stride: stride of the stage's first block.
    :param blocks: number of blocks.
    :param gated: whether blocks carry a squeeze-and-excite gate.
    :param hard: hard-swish where true, ReLU otherwise.
    """

    channels: int
    expansion: int
    kernel: int
    stride: int
    blocks: int
    gated: bool
    hard: bool


STAGES = (
    Stage(16, 1, 3, 1, 1, gated=False, hard=False),
    Stage(24, 6, 3, 1, 2, gated=False, hard=False),
    Stage(40, 6, 5, 2, 2, gated=True, hard=True),
    Stage(56, 6, 3, 2, 2, gated=True, hard=True),
)


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Returns a bias-free "same" convolution followed by BatchNorm.

    :param inputs: input channels.
    :param outputs: output channels.
    :param kernel: height and width, odd.
    :param stride: in both directions.
    :param groups: of the convolution.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in [0, 1] computed from all channel means (Hu et al. 2018).

    :param channels: width of the gated tensor.
    :param squeezed: width between the two 1x1 convolutions.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[n, channels, h, w]`` to the same shape."""
        means = x.mean((2, 3), keepdim=True)
        gate = nn.functional.hardsigmoid(self.expand(nn.functional.relu(self.reduce(means))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, gate, project; added to the input where shapes allow.

    :param inputs: input channels.
    :param stage: the table row this block belongs to.
    :param stride: the block's own stride.
    """

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        activation = nn.Hardswish if stage.hard else nn.ReLU
        layers: list[nn.Module] = []
        if stage.expansion > 1:
            layers += [conv_norm(inputs, hidden), activation()]
        layers += [conv_norm(hidden, hidden, stage.kernel, stride, groups=hidden), activation()]
        if stage.gated:
            layers.append(SqueezeExcite(hidden, max(8, hidden // 8)))
        layers.append(conv_norm(hidden, stage.channels))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[n, inputs, h, w]`` to ``[n, channels, h / stride, w / stride]``."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y


class DigitsNet(nn.Module):
    """The demo network: images ``[n, in_channels, h, w]`` to class scores ``[n, num_classes]``.

    :param num_classes: number of scores.
    :param in_channels: image channels; the digits have one.
    """

    input_size = (1, 16, 16)

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        width = 16
        self.stem = nn.Sequential(conv_norm(in_channels, width, 3), nn.Hardswish())
        blocks = []
        for stage in STAGES:
            for index in range(stage.blocks):
                blocks.append(InvertedResidual(width, stage, stage.stride if index == 0 else 1))
                width = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(conv_norm(width, 192), nn.Hardswish())
        self.classifier = nn.Linear(192, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns unnormalised class scores."""
        features = self.head(self.blocks(self.stem(x)))
        scores: torch.Tensor = self.classifier(features.mean((2, 3)))
        return scores


def digits_net(num_classes: int = 10, in_channels: int = 1) -> DigitsNet:
    """Builds the demo network (about 200 thousand parameters), untrained.

    :param num_classes: number of scores.
    :param in_channels: image channels.
    """
    return DigitsNet(num_classes, in_channels)
