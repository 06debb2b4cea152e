"""Image files in one folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.run.datasets.augment import resized_crop_and_flip
from nncf_compactprune.run.datasets.base import Batch, ResolvedDataset, normalisation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class ImageFiles(Dataset[Batch]):
    """Image files, read when asked for: short side resized to ``size * 256 / 224``, then the centre cut out.

    :param files: paths with their labels.
    :param size: height and width of the images given out, in pixels.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        pil = require_package("PIL.Image", "pillow")
        path, label = self.files[index]
        try:
            with pil.open(path) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            msg = f"Cannot read the image {path}: {error}"
            raise ResolveError(msg) from error
        scale = self.size * 256 / 224 / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), pil.Resampling.BILINEAR)
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)), dtype=np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1) / 255), torch.tensor(label)


def imagefolder(
    rest: str,
    *,
    image_size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResolvedDataset:
    """Images in ``DIR/train/CLASS/`` and ``DIR/val/CLASS/``.

    :param rest: the folder that holds ``train`` and ``val``.
    :param image_size: height and width given to the model, in pixels.
    :param mean: of each channel, for pixels in [0, 1]; the model's own by default, or ImageNet's if it states none.
    :param std: the same.
    """
    folder = Path(rest)
    train_files, class_names = _list_images(folder / "train")
    val_files, val_names = _list_images(folder / "val")
    if class_names != val_names:
        differing = ", ".join(sorted(set(class_names) ^ set(val_names)))
        msg = f"imagefolder: train and val of {folder} must hold the same classes; they differ in: {differing}."
        raise ResolveError(msg)
    return ResolvedDataset(
        f"imagefolder:{rest}",
        ImageFiles(train_files, image_size),
        ImageFiles(val_files, image_size),
        class_names,
        (3, image_size, image_size),
        *normalisation("imagefolder", mean or IMAGENET_MEAN, std or IMAGENET_STD),
        resized_crop_and_flip,
        model_normalises=mean is None and std is None,
    )


def _list_images(folder: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    if not folder.is_dir():
        msg = f"imagefolder: no such folder: {folder}. Expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."
        raise ResolveError(msg)
    class_names = tuple(sorted(child.name for child in folder.iterdir() if child.is_dir()))
    files: list[tuple[Path, int]] = []
    for label, class_name in enumerate(class_names):
        found = sorted(path for path in (folder / class_name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            msg = f"imagefolder: no images in {folder / class_name} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
            raise ResolveError(msg)
        files += [(path, label) for path in found]
    if not files:
        msg = f"imagefolder: {folder} holds no class folders."
        raise ResolveError(msg)
    return files, class_names
