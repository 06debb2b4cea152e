"""scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
from torch.nn import functional

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.run.datasets.augment import jitter
from nncf_compactprune.run.datasets.base import ArrayImages, ResolvedDataset

# The split is part of the dataset's definition, so that figures of different runs compare.
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 600


def digits(rest: str = "") -> ResolvedDataset:
    """scikit-learn's 1,797 handwritten digits, enlarged bilinearly from 8 x 8 to 16 x 16 pixels.

    The stratified split into 1,197 training and 600 test images is fixed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if rest:
        msg = f"'digits' takes no path, got '{rest}'."
        raise ResolveError(msg)
    loaded = load_digits()
    small = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
    images = functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(loaded.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, random_state=DIGITS_SPLIT_SEED, stratify=labels
    )
    std, mean = torch.std_mean(images[train])
    return ResolvedDataset(
        "digits",
        ArrayImages(images[train], labels[train]),
        ArrayImages(images[test], labels[test]),
        tuple(str(digit) for digit in range(10)),
        (1, 16, 16),
        (mean.item(),),
        (std.item(),),
        jitter,
    )
