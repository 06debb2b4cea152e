"""Weights on a grid: scales by output error, then rounding column by column, each error made up for by the columns that
follow.

The rounding is optimal brain surgery on one weight at a time (Frantar et al. 2022, GPTQ), with H = X^T X of the layer's
inputs, largest inputs first. The same machinery sets weights to zero
(:mod:`nncf_compactprune.algorithms.data_free.thinning`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nncf_compactprune.algorithms.data_free.gram import damped

CLIPS = tuple(1 - 0.025 * step for step in range(25))  # shares of the largest weight that are tried as range


def search_scales(weight: Tensor, inputs: Tensor, high: int, *, per_channel: bool) -> Tensor:
    """Step sizes whose nearest rounding disturbs the layer's output least, over a row of clipped ranges.

    :param weight: ``[groups, out/groups, d]``.
    :param inputs: second moments of the inputs, ``[groups, d, d]``.
    :param high: the largest level; levels are ``-high .. high``.
    :param per_channel: one scale for each output channel; else one for all.
    :return: ``[groups, out/groups, 1]``; all equal where not ``per_channel``.
    """
    largest = weight.abs().amax(2, keepdim=True)
    if not per_channel:
        largest = largest.amax().expand_as(largest)
    largest = largest.clamp_min(1e-12)
    best, chosen = torch.full_like(largest, torch.inf), largest / high
    for clip in CLIPS:
        scale = (clip * largest / high).float().to(weight)  # float32, as the quantizer stores it
        error = weight - rounded(weight, scale, high)
        loss = ((error @ inputs) * error).sum(2, keepdim=True)
        if not per_channel:
            loss = loss.sum().expand_as(loss)
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, scale, chosen)
    return chosen.float().to(weight)


def rounded(weight: Tensor, scale: Tensor, high: int) -> Tensor:
    """The nearest values on the grid.

    :param weight: ``[groups, out/groups, ...]``.
    :param scale: step sizes, ``[groups, out/groups, 1]``.
    :param high: the largest level; levels are ``-high .. high``.
    :return: the weight's shape.
    """
    return (weight / scale).round().clamp(-high, high) * scale


def round_in_turn(weight: Tensor, scale: Tensor, inputs: Tensor, high: int, ridge: float) -> Tensor:
    """Rounds column by column; columns not yet rounded take over each error as far as they can.

    :param weight: ``[groups, out/groups, d]``.
    :param scale: step sizes, ``[groups, out/groups, 1]``.
    :param inputs: second moments of the inputs, ``[groups, d, d]``.
    :param high: the largest level; levels are ``-high .. high``.
    :param ridge: added to the second moments, relative to their mean diagonal.
    :return: weights on the grid, ``[groups, out/groups, d]``.
    """
    order = inputs.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
    w = weight[:, :, order].clone()
    h = damped(inputs, ridge)[:, order][:, :, order]
    # The rows of this factor are those of every trailing block's inverse, scaled.
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for at in range(w.shape[2]):
        column = w[:, :, at : at + 1].clone()
        on_grid = rounded(column, scale, high)
        error = (column - on_grid) / factor[:, at, at][:, None, None]
        w[:, :, at + 1 :] -= error * factor[:, at : at + 1, at + 1 :]
        w[:, :, at : at + 1] = on_grid
    return w[:, :, order.argsort()]
