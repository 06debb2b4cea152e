"""Which single weights to zero, and how the others make up for it.

Optimal brain surgery column by column (Frantar and Alistarh 2023, SparseGPT): the loss of zeroing w_i is ``w_i^2 /
(H^-1)_ii`` of the columns still free, and what is left takes over. Deviation: within a block of columns the mask is
chosen by that loss over the whole layer, with H^-1 as it is when the block comes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nncf_compactprune.algorithms.data_free.gram import Moments, damped

BLOCK = 128  # columns whose mask is chosen at once
MOST = 0.98  # zeros in any one layer


def shares(weights: Mapping[str, Tensor], found: Mapping[str, Moments], ratio: float, ridge: float) -> dict[str, float]:
    """How many zeros each layer gets, so that one threshold on the loss holds for all.

    The loss of a weight is ``w_i^2 / (H^-1)_ii`` in shares of the layer's output variance.

    :param weights: ``[groups, out/groups, d]`` by layer.
    :param found: moments of the dense layers.
    :param ratio: share of zeros over all layers, in [0, 1).
    :param ridge: added to the second moments, relative to their mean diagonal.
    :return: share of zeros by layer, at most :data:`MOST`.
    """
    losses = {}
    for name, weight in weights.items():
        inverse = torch.linalg.inv(damped(found[name].trusted, ridge)).diagonal(dim1=1, dim2=2)
        loss = weight.square() / inverse[:, None, :] / found[name].energy.sum().clamp_min(1e-30)
        losses[name] = loss.flatten().sort().values
    everything = torch.cat(list(losses.values()))
    count = round(ratio * everything.numel())
    if count == 0:
        return dict.fromkeys(losses, 0.0)
    threshold = everything.kthvalue(count).values
    result = {name: min(MOST, float((loss <= threshold).double().mean())) for name, loss in losses.items()}
    return _topped_up(result, {name: loss.numel() for name, loss in losses.items()}, count)


def _topped_up(ratios: dict[str, float], sizes: Mapping[str, int], count: int) -> dict[str, float]:
    """What the cap took from some layers goes to the others, in proportion to what they have left."""
    missing = count - sum(ratios[name] * sizes[name] for name in ratios)
    room = {name: (MOST - ratio) * sizes[name] for name, ratio in ratios.items()}
    share = missing / max(sum(room.values()), 1e-12) if missing > 0 else 0.0
    return {name: ratio + min(share, 1.0) * room[name] / sizes[name] for name, ratio in ratios.items()}


def sparsify(
    weight: Tensor, inputs: Tensor, ridge: float, *, ratio: float | None = None, pattern: tuple[int, int] | None = None
) -> Tensor:
    """Zeroes weights of one layer and re-fits the others.

    :param weight: ``[groups, out/groups, d]``; columns that belong together in a pattern lie beside each other.
    :param inputs: second moments of the inputs, ``[groups, d, d]``.
    :param ridge: added to them, relative to their mean diagonal.
    :param ratio: share of zeros, in [0, 1).
    :param pattern: (n, m): n zeros in every m columns, where m divides d; else the layer stays whole.
    :return: weights with exact zeros.
    """
    w = weight.clone()
    width = w.shape[2]
    if pattern is not None and width % pattern[1]:
        return w
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(inputs, ridge)), upper=True)
    strength = factor.diagonal(dim1=1, dim2=2).square()[:, None, :]  # (H^-1)_ii as column i comes
    block = pattern[1] if pattern is not None else BLOCK
    for begin in range(0, width, block):
        part = slice(begin, min(begin + block, width))
        loss = w[:, :, part].square() / strength[:, :, part]
        gone = _lowest_of_row(loss, pattern[0]) if pattern is not None else _lowest(loss, ratio or 0.0)
        for at in range(part.start, part.stop):
            column = w[:, :, at : at + 1].clone()
            kept = column.masked_fill(gone[:, :, at - begin : at - begin + 1], 0)
            error = (column - kept) / factor[:, at, at][:, None, None]
            w[:, :, at + 1 :] -= error * factor[:, at : at + 1, at + 1 :]
            w[:, :, at : at + 1] = kept
    return w


def _lowest(loss: Tensor, ratio: float) -> Tensor:
    count = round(loss.numel() * ratio)
    gone = torch.zeros(loss.numel(), dtype=torch.bool, device=loss.device)
    gone[loss.flatten().argsort(stable=True)[:count]] = True
    return gone.view(loss.shape)


def _lowest_of_row(loss: Tensor, count: int) -> Tensor:
    gone = torch.zeros_like(loss, dtype=torch.bool)
    return gone.scatter_(2, loss.argsort(dim=2, stable=True)[:, :, :count], True)
