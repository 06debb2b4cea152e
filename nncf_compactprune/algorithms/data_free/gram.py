"""Second moments of a linear layer's inputs and outputs, streamed: all that least squares needs to know of data.

Rows are patches (:class:`~nncf_compactprune.algorithms.data_free.operations.Operation`). Memory stays below a chunk
whatever the number of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nncf_compactprune.algorithms.data_free.operations import Operation

CHUNK_ELEMENTS = 2**23  # patches unfolded at once: 32 MiB in float32
MAX_ROWS = (
    120_000  # patches used of a layer; beyond, evenly strided images and places add nothing to d <= some thousand
)


@dataclass
class Moments:
    """Centred second moments of a layer, by group of channels, in float64.

    :param operation: the layer's.
    :param inputs: ``X^T X / n``, ``[groups, d, d]`` with d = in/groups * taps, about the mean.
    :param cross: ``X^T Y / n``, ``[groups, d, out/groups]``, about the means.
    :param energy: ``Y^2 / n``, ``[groups, out/groups]``, about the mean.
    :param mean_in: ``[groups, d]``.
    :param mean_out: ``[groups, out/groups]``.
    :param rows: number of patches.
    """

    operation: Operation
    inputs: Tensor
    cross: Tensor
    energy: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rows: int


def damped(inputs: Tensor, ridge: float) -> Tensor:
    """Second moments that can be inverted: a share of each group's mean variance is added to the diagonal.

    :param inputs: second moments, ``[groups, d, d]``.
    :param ridge: the share, above 0.
    :return: the same shape.
    """
    scale = inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    return inputs + ridge * scale[:, None, None] * eye


def moments(operation: Operation, x: Tensor, y: Tensor) -> Moments:
    """Streams inputs and wanted outputs.

    :param operation: what goes from one to the other.
    :param x: what enters it, ``[n, in, *places]`` or ``[n, ..., in]``.
    :param y: what it should give, ``[n, out, *places]`` or ``[n, ..., out]``.
    """
    positions = y.numel() // len(y) // y.shape[operation.channel_dim]
    width = operation.width
    stride = max(1, math.ceil(len(x) * positions / MAX_ROWS)) if positions > 1 else 1
    images = max(1, CHUNK_ELEMENTS // max(1, operation.groups * width * positions))
    total: list[Tensor] = []
    shift = x.new_zeros(1)
    rows = 0
    for begin in range(0, len(x), images):
        part = slice(begin, begin + images)
        px, py = operation.patches(x[part]), operation.outputs(y[part])
        if stride > 1:  # the offset moves on, so that all places of an image have their turn
            px, py = px[:, begin % stride :: stride], py[:, begin % stride :: stride]
        joined = torch.cat([px, py], 2)
        if not total:  # moments about a point near the mean: about 0, float32 loses a small variance on a large mean
            shift = joined.mean(1, keepdim=True)
        joined = torch.cat([joined - shift, joined.new_ones(*joined.shape[:2], 1)], 2)
        product = torch.bmm(joined.transpose(1, 2), joined).double()
        total = [product] if not total else [total[0] + product]
        rows += joined.shape[1]
    return _centred(operation, total[0] / rows, rows, shift.squeeze(1).double())


def _centred(operation: Operation, joint: Tensor, rows: int, shift: Tensor) -> Moments:
    d = operation.width
    mean = joint[:, :-1, -1]
    cov = joint[:, :-1, :-1] - mean.unsqueeze(2) * mean.unsqueeze(1)
    energy = cov[:, d:, d:].diagonal(dim1=1, dim2=2).clamp_min(0)
    mean = mean + shift
    return Moments(operation, cov[:, :d, :d], cov[:, :d, d:], energy, mean[:, :d], mean[:, d:], rows)
