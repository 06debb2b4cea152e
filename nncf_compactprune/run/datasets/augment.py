"""Random changes of training images: each maps images ``[n, c, h, w]`` and a generator to such images.

torchvision's transforms do not serve here: a call draws from torch's global generator, and once for a whole batch.
These draw for each image, and from a generator whose state a snapshot can hold.
"""

from __future__ import annotations

import torch
from torch.nn import functional

SMALLEST_CROP = 0.35  # of an image's area


def jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns by up to 0.2 rad, scales by up to 10 % and shifts by up to an eighth of the half width.

    :param images: ``[n, c, h, w]``.
    :param generator: of the CPU.
    :return: new images, same shape.
    """
    draws = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = 0.2 * draws[0], 1 + 0.1 * draws[1]
    return _warp(images, scale * angle.cos(), scale * angle.sin(), 0.125 * draws[2:].T)


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pads by 4 pixels of zeros, crops at random and mirrors half of the images: CIFAR's usual augmentation.

    :param images: ``[n, c, h, w]``.
    :param generator: of the CPU.
    :return: new images, same shape.
    """
    n, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator)
    columns = left + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop_and_flip(
    images: torch.Tensor, generator: torch.Generator, smallest: float = SMALLEST_CROP
) -> torch.Tensor:
    """Cuts squares of a share of the area, drawn up to all of it, resizes them back and mirrors half of the images.

    :param images: ``[n, c, h, w]``.
    :param generator: of the CPU.
    :param smallest: least share of the area, in (0, 1].
    :return: new images, same shape.
    """
    n = len(images)
    scale = (smallest + (1 - smallest) * torch.rand(n, generator=generator)).sqrt()
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale[:, None])
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return _warp(images, scale, torch.zeros(n), shift)


def _warp(images: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Samples each image through the similarity [[cosine, -sine], [sine, cosine]] and shift, in half-image units."""
    rows = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    grid = functional.affine_grid(torch.cat([rows, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
