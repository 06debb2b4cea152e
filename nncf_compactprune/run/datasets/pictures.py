"""A folder of pictures without labels: enough to calibrate, to re-fit and to verify, not to train or to judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.run.datasets.base import ArrayImages, ResolvedDataset, normalisation
from nncf_compactprune.run.datasets.image_folder import EXTRA, IMAGENET_MEAN, IMAGENET_STD
from nncf_compactprune.run.datasets.samples import evenly

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SAMPLES = 2000  # as many as anything looks at unless it is told to


def pictures(
    rest: str,
    *,
    image_size: int = 224,
    samples: int = SAMPLES,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResolvedDataset:
    """All pictures in a folder and in folders below it, without labels. They are kept in memory.

    The central square of 7/8 of the short side is resized to ``image_size``, as ``imagefolder`` does.

    :param rest: the folder.
    :param image_size: height and width given to the model, in pixels.
    :param samples: how many pictures at most; of more, as many are taken evenly in the order of their names.
    :param mean: of each channel, for pixels in [0, 1]; the model's own by default, or ImageNet's if it states none.
    :param std: the same.
    :raises ResolveError: there is no such folder, no picture in it, or one that cannot be read.
    """
    for key, value in (("image_size", image_size), ("samples", samples)):
        if type(value) is not int or value < 1:
            msg = f"pictures: {key}: expected a whole number above 0, got {value!r}."
            raise ResolveError(msg)
    paths = _paths(rest)
    images = torch.empty(min(len(paths), samples), 3, image_size, image_size, dtype=torch.uint8)
    for at, chosen in enumerate(evenly(len(paths), samples)):
        images[at] = _read(paths[chosen], image_size)
    only = ArrayImages(images, None)
    return ResolvedDataset(
        f"pictures:{rest}",
        only,
        only,
        (),
        (3, image_size, image_size),
        *normalisation("pictures", mean or IMAGENET_MEAN, std or IMAGENET_STD),
        model_normalises=mean is None and std is None,
    )


def _paths(rest: str) -> list[Path]:
    """The picture files, by name. Hidden ones are left out: systems keep their own notes there."""
    folder = Path(rest)
    if not rest or not folder.is_dir():
        msg = f"pictures: no such folder: '{rest}'. Expected pictures:DIR, with pictures in DIR or in folders below it."
        raise ResolveError(msg)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    shown = sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    if not shown:
        msg = f"pictures: no picture in '{rest}' (looked for {', '.join(SUFFIXES)}, in all folders below)."
        raise ResolveError(msg)
    return shown


def _read(path: Path, size: int) -> torch.Tensor:
    """One picture as bytes ``[3, size, size]``."""
    image = require_package("PIL.Image", EXTRA)
    fit = require_package("PIL.ImageOps", EXTRA).fit
    try:
        with image.open(path) as opened:
            square = fit(opened.convert("RGB"), (size, size), image.Resampling.BILINEAR, bleed=1 / 16)
    except Exception as error:  # decoders raise many kinds
        msg = f"pictures: cannot read {path}: {error}. Remove it from the folder, or replace it."
        raise ResolveError(msg) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
