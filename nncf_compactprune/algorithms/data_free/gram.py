"""Second moments of a linear layer's inputs and outputs, streamed: all that least squares needs to know of data.

A convolution is a product with patches (im2col). Rows are patches; memory stays below a chunk whatever the number of
images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_ELEMENTS = 2**23  # patches unfolded at once: 32 MiB in float32
MAX_ROWS = (
    120_000  # patches used of a layer; beyond, evenly strided images and places add nothing to d <= some thousand
)


@dataclass
class Moments:
    """Centred second moments of a layer, by group of channels, in float64.

    :param inputs: ``X^T X / n``, ``[groups, d, d]`` with d = in/groups * kernel area, about the mean.
    :param cross: ``X^T Y / n``, ``[groups, d, out/groups]``, about the means.
    :param energy: ``Y^2 / n``, ``[groups, out/groups]``, about the mean.
    :param mean_in: ``[groups, d]``; :param mean_out: ``[groups, out/groups]``.
    :param rows: number of patches.
    """

    inputs: Tensor
    cross: Tensor
    energy: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rows: int


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that least squares can re-fit: Conv2d with zero padding, or Linear."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def groups_of(module: nn.Module) -> int:
    """Number of channel groups of a convolution; 1 for a linear layer."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def weight_rows(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's weight as matrices ``[groups, out/groups, d]``, float64; :func:`as_weight` is the way back."""
    weight = module.weight if weight is None else weight  # type: ignore[assignment]
    groups = groups_of(module)
    return weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)  # type: ignore[union-attr]


def as_weight(module: nn.Module, rows: Tensor) -> Tensor:
    """Matrices ``[groups, out/groups, d]`` in the shape and dtype of the layer's weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return rows.reshape(weight.shape).to(weight.dtype)


def moments(module: nn.Module, x: Tensor, y: Tensor) -> Moments:
    """Streams inputs and wanted outputs.

    :param module: the layer, for its geometry.
    :param x: its inputs, ``[n, c, h, w]`` or ``[n, ..., c]``.
    :param y: what it should give, ``[n, out, h', w']`` or ``[n, ..., out]``.
    """
    groups = groups_of(module)
    out = y.shape[1] if isinstance(module, nn.Conv2d) else y.shape[-1]
    positions = y.numel() // len(y) // out
    width = _patch_width(module)
    stride = max(1, math.ceil(len(x) * positions / MAX_ROWS)) if positions > 1 else 1
    images = max(1, CHUNK_ELEMENTS // max(1, groups * width * positions))
    total: list[Tensor] = []
    shift = x.new_zeros(1)
    rows = 0
    for begin in range(0, len(x), images):
        part = slice(begin, begin + images)
        px, py = _patches(module, x[part], y[part], groups)
        if stride > 1:  # the offset moves on, so that all places of an image have their turn
            px, py = px[:, begin % stride :: stride], py[:, begin % stride :: stride]
        joined = torch.cat([px, py], 2)
        if not total:  # moments about a point near the mean: about 0, float32 loses a small variance on a large mean
            shift = joined.mean(1, keepdim=True)
        joined = torch.cat([joined - shift, joined.new_ones(*joined.shape[:2], 1)], 2)
        product = torch.bmm(joined.transpose(1, 2), joined).double()
        total = [product] if not total else [total[0] + product]
        rows += joined.shape[1]
    return _centred(total[0] / rows, width, rows, shift.squeeze(1).double())


def _centred(joint: Tensor, d: int, rows: int, shift: Tensor) -> Moments:
    mean = joint[:, :-1, -1]
    cov = joint[:, :-1, :-1] - mean.unsqueeze(2) * mean.unsqueeze(1)
    energy = cov[:, d:, d:].diagonal(dim1=1, dim2=2).clamp_min(0)
    return Moments(cov[:, :d, :d], cov[:, :d, d:], energy, mean[:, :d] + shift[:, :d], mean[:, d:] + shift[:, d:], rows)


def _patch_width(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight[0].numel()


def _patches(module: nn.Module, x: Tensor, y: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rows ``[groups, n * positions, d]`` and ``[groups, n * positions, out/groups]``, float32."""
    if isinstance(module, nn.Conv2d):
        padding: Any = module.padding  # never a word, see is_linear
        unfolded = functional.unfold(x.float(), module.kernel_size, module.dilation, padding, module.stride)
        n, _, places = unfolded.shape
        px = unfolded.reshape(n, groups, -1, places).permute(1, 0, 3, 2).reshape(groups, n * places, -1)
        py = y.float().reshape(n, groups, -1, places).permute(1, 0, 3, 2).reshape(groups, n * places, -1)
        return px, py
    return x.float().reshape(1, -1, x.shape[-1]), y.float().reshape(1, -1, y.shape[-1])
