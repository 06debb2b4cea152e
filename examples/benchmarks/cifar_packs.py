"""CIFAR-10 from its packed files: lossless sheets of 25 x 40 images in ``cifar10_*.npz``. Needs Pillow with WebP."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from nncf_compactprune.run.datasets import CIFAR10_CLASSES, ArrayImages, ResolvedDataset, crop_and_flip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACK_IMAGES = 25_000
TRAIN, TEST = ("cifar10_train_0.npz", "cifar10_train_1.npz"), ("cifar10_test.npz",)


def read_packs(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 32, 32]`` of bytes, channels last in memory, and labels ``[n]``; both in the packs' order, which
    is shuffled."""
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[npt.NDArray[np.int64]] = []
    for name in names:
        with np.load(folder / name) as pack:
            blob, offsets = pack["blob"], pack["off"]
            labels.append(pack["y"].astype(np.int64))
        for start, end in itertools.pairwise(offsets):
            with Image.open(io.BytesIO(blob[start:end].tobytes())) as picture:
                sheet = np.asarray(picture.convert("RGB"))
            images.append(sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(labels))


def normalised(images: Tensor) -> Tensor:
    """Bytes as the trained networks want them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def packed_cifar10(folder: Path, train_images: int | None = None) -> ResolvedDataset:
    """The packs as a dataset, normalised as the trained networks want it.

    :param folder: what holds ``cifar10_*.npz``.
    :param train_images: only so many leading training images; all by default.
    """
    parts = TRAIN[:1] if train_images is not None and train_images <= PACK_IMAGES else TRAIN
    images, labels = read_packs(folder, parts)
    train = ArrayImages(images[:train_images], labels[:train_images])
    test = ArrayImages(*read_packs(folder, TEST))
    return ResolvedDataset("packed_cifar10", train, test, CIFAR10_CLASSES, (3, 32, 32), MEAN, STD, crop_and_flip)
