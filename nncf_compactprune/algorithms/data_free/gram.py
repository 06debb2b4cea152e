"""Second moments of a linear layer's inputs and outputs, streamed: all that least squares needs to know of data.

Rows are patches (:class:`~nncf_compactprune.algorithms.data_free.operations.Operation`). Memory stays below a chunk
whatever the number of images.

How two inputs vary together is known only as well as the images tell. A layer behind a global pooling has as many rows
as there are images: with fewer rows than inputs, least squares finds that most channels follow from the others, which
no other image bears out. So second moments are shrunk towards their diagonal, by as much as two halves of the images
disagree (:attr:`Moments.doubt`).
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
MOST_CHANCE = 0.99  # something is always learned


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
    :param doubt: how much of what the inputs' covariances say is chance of the images, in [0, 1): see :func:`_chance`.
    :param chance: the same of the covariances between inputs and what the output lacks of Y; 0 where no weights were
        given to compare with.
    """

    operation: Operation
    inputs: Tensor
    cross: Tensor
    energy: Tensor
    mean_in: Tensor
    mean_out: Tensor
    rows: int
    doubt: float = 0.0
    chance: float = 0.0

    @property
    def trusted(self) -> Tensor:
        """``inputs``, the covariances shrunk by :attr:`doubt`: what may be expected of other images."""
        return torch.lerp(self.inputs, torch.diag_embed(self.inputs.diagonal(dim1=1, dim2=2)), self.doubt)


def damped(inputs: Tensor, ridge: float) -> Tensor:
    """Second moments that can be inverted: a share of each group's mean variance is added to the diagonal.

    :param inputs: second moments, ``[groups, d, d]``.
    :param ridge: the share, above 0.
    :return: the same shape.
    """
    scale = inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    return inputs + ridge * scale[:, None, None] * eye


class Sums:
    """Streams inputs and wanted outputs of a layer.

    :param operation: what goes from one to the other.
    :param count: number of images that will come, in all parts.
    """

    def __init__(self, operation: Operation, count: int) -> None:
        self._operation, self._count = operation, count
        # sums over every other chunk of images: two that can be held against each other
        self._halves: list[_Half] = []
        self._chunks = self._images = 0
        self._shift = torch.zeros(1)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes a part of the images.

        :param x: what enters the layer, ``[n, in, *places]`` or ``[n, ..., in]``.
        :param y: what it should give, ``[n, out, *places]`` or ``[n, ..., out]``.
        """
        operation = self._operation
        positions = y.numel() // len(y) // y.shape[operation.channel_dim]
        stride = max(1, math.ceil(self._count * positions / MAX_ROWS)) if positions > 1 else 1
        images = max(1, CHUNK_ELEMENTS // max(1, operation.groups * operation.width * positions))
        images = min(images, max(1, math.ceil(len(x) / 2)))
        for begin in range(0, len(x), images):
            part = slice(begin, begin + images)
            px, py = operation.patches(x[part]), operation.outputs(y[part])
            if stride > 1:  # the offset moves on, so that all places of an image have their turn
                offset = (self._images + begin) % stride
                px, py = px[:, offset::stride], py[:, offset::stride]
            self._take(px, py)
        self._images += len(x)

    def _take(self, x: Tensor, y: Tensor) -> None:
        joined = torch.cat([x, y], 2)
        if not self._halves:
            # moments about a point near the mean: about 0, float32 loses a small variance on a large mean
            self._shift = joined.mean(1, keepdim=True)
        joined = torch.cat([joined - self._shift, joined.new_ones(*joined.shape[:2], 1)], 2)
        d = self._operation.width
        left = torch.cat([joined[:, :, :d], joined[:, :, -1:]], 2)
        found = _Half(
            torch.bmm(left.transpose(1, 2), joined).double(),
            joined[:, :, d:-1].square().sum(1).double(),
            joined.shape[1],
        )
        if self._chunks < 2:
            self._halves.append(found)
        else:
            self._halves[self._chunks % 2] += found
        self._chunks += 1

    def moments(self, weight: Tensor | None = None) -> Moments:
        """What came, about its means.

        :param weight: what the layer has now, ``[groups, out/groups, d]``; None: :attr:`Moments.chance` is not asked
            for.
        """
        point = self._shift.squeeze(1).double()
        found = _centred(self._operation, sum(self._halves[1:], self._halves[0]), point)
        if len(self._halves) == 2:
            _hold_against_each_other(found, point, self._halves, weight)
        return found


@dataclass
class _Half:
    """Sums over rows, about the same point for all.

    :param products: of inputs and 1 with inputs, outputs and 1, ``[groups, d + 1, d + out/groups + 1]``. Products of
        outputs with each other are not asked for: a head of a vocabulary's size has far too many.
    :param squares: of outputs, ``[groups, out/groups]``.
    :param rows: how many.
    """

    products: Tensor
    squares: Tensor
    rows: int

    def __add__(self, other: _Half) -> _Half:
        return _Half(self.products + other.products, self.squares + other.squares, self.rows + other.rows)

    def __iadd__(self, other: _Half) -> _Half:
        self.products += other.products
        self.squares += other.squares
        self.rows += other.rows
        return self

    @property
    def means(self) -> Tensor:
        """Of inputs and outputs, ``[groups, d + out/groups]``."""
        return self.products[:, -1, :-1] / self.rows

    @property
    def seconds(self) -> Tensor:
        """Second moments of inputs with inputs and outputs, ``[groups, d, d + out/groups]``."""
        return self.products[:, :-1, :-1] / self.rows


def _centred(operation: Operation, sums: _Half, shift: Tensor) -> Moments:
    d, mean = operation.width, sums.means
    cov = sums.seconds - mean[:, :d].unsqueeze(2) * mean.unsqueeze(1)
    energy = (sums.squares / sums.rows - mean[:, d:].square()).clamp_min(0)
    mean = mean + shift
    return Moments(operation, cov[:, :, :d], cov[:, :, d:], energy, mean[:, :d], mean[:, d:], sums.rows)


def _hold_against_each_other(found: Moments, shift: Tensor, halves: list[_Half], weight: Tensor | None) -> None:
    """Fills in ``doubt`` and ``chance``."""
    d = found.operation.width
    centre = torch.cat([found.mean_in, found.mean_out], 1) - shift
    first, second = halves
    means = first.means - second.means
    apart = first.seconds - second.seconds
    apart = apart - centre[:, :d].unsqueeze(2) * means.unsqueeze(1) - means[:, :d].unsqueeze(2) * centre.unsqueeze(1)
    scale = found.inputs.diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt().unsqueeze(2)
    share = first.rows * second.rows / (first.rows + second.rows) ** 2
    inputs, seen = apart[:, :, :d] * scale.transpose(1, 2), found.inputs * scale.transpose(1, 2)
    for matrix in (inputs, seen):
        matrix.diagonal(dim1=1, dim2=2).zero_()
    found.doubt = _chance(inputs * scale, seen * scale, share)
    if weight is not None:
        lacking = found.cross - found.inputs @ weight.transpose(1, 2)
        lacking_apart = apart[:, :, d:] - apart[:, :, :d] @ weight.transpose(1, 2)
        found.chance = _chance(lacking_apart * scale, lacking * scale, share)


def _chance(apart: Tensor, seen: Tensor, share: float) -> float:
    """Which share of squared covariances is sampling error, in [0, 1).

    Ledoit and Wolf's shrinkage intensity (2004). Theirs counts rows as independent, and places of one image are not;
    here two halves of the images tell. With S = a A + b B, of halves of shares a and b,
    ``E ||S - Sigma||^2 = a b E ||A - B||^2``. All groups of channels count together.

    :param apart: the difference of the halves' covariances.
    :param seen: the covariances of all images.
    :param share: a b.
    """
    squared = float(seen.square().sum())
    return min(share * float(apart.square().sum()) / squared, MOST_CHANCE) if squared > 0 else 0.0
