"""Image files in one folder for each class, read and resized by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.run.datasets.augment import SMALLEST_CROP, resized_crop_and_flip
from nncf_compactprune.run.datasets.base import ResolvedDataset, normalisation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EXTRA = "nncf-compactprune[images]"
_EXPECTED = "Expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."


def imagefolder(
    rest: str,
    *,
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    smallest_crop: float = SMALLEST_CROP,
) -> ResolvedDataset:
    """Images in ``DIR/train/CLASS/`` and ``DIR/val/CLASS/``.

    The short side is resized to ``image_size * 256 / 224``, then the centre is cut out.

    :param rest: the folder that holds ``train`` and ``val``.
    :param image_size: height and width given to the model, in pixels.
    :param mean: of each channel, for pixels in [0, 1]; the model's own by default, or ImageNet's if it states none.
    :param std: the same.
    :param smallest_crop: training images are crops of a share of the area drawn from here to 1; 1 takes all of it.
    :raises ResolveError: torchvision or images are missing, the two parts have different classes, or no such crop.
    """
    if not 0 < smallest_crop <= 1:
        msg = f"imagefolder: smallest_crop: a share of the image's area above 0, up to 1; got {smallest_crop}."
        raise ResolveError(msg)
    folder = Path(rest)
    train, val = (_part(folder / part, image_size) for part in ("train", "val"))
    if train.classes != val.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(val.classes)))
        msg = f"imagefolder: train and val of {folder} must hold the same classes; they differ in: {differing}."
        raise ResolveError(msg)
    return ResolvedDataset(
        f"imagefolder:{rest}",
        train,
        val,
        tuple(train.classes),
        (3, image_size, image_size),
        *normalisation("imagefolder", mean or IMAGENET_MEAN, std or IMAGENET_STD),
        partial(resized_crop_and_flip, smallest=smallest_crop),
        model_normalises=mean is None and std is None,
    )


def _part(folder: Path, size: int) -> Any:
    """A torchvision ``ImageFolder`` of float32 images ``[3, size, size]`` in [0, 1]."""
    datasets = require_package("torchvision.datasets", EXTRA)
    v2 = require_package("torchvision.transforms.v2", EXTRA)
    if not folder.is_dir():
        msg = f"imagefolder: no such folder: {folder}. {_EXPECTED}"
        raise ResolveError(msg)
    steps = [
        v2.Resize(round(size * 256 / 224)),
        v2.CenterCrop(size),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    try:
        return datasets.ImageFolder(folder, v2.Compose(steps), loader=_loaded)
    except FileNotFoundError as error:
        msg = f"imagefolder: {folder}: {str(error).rstrip('. ')}. {_EXPECTED}"
        raise ResolveError(msg) from error


def _loaded(path: str) -> Any:
    try:
        return require_package("torchvision.datasets.folder", EXTRA).pil_loader(path)
    except OSError as error:
        msg = f"Cannot read the image {path}: {error}"
        raise ResolveError(msg) from error
