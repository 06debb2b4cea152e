"""Some test images that stand for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from nncf_compactprune.run.datasets.base import ResolvedDataset


def even_samples(dataset: ResolvedDataset, count: int) -> tuple[Tensor, Tensor]:
    """Test images, normalised, and their labels, taken evenly from all of them.

    :param dataset: where from.
    :param count: how many at most.
    """
    total = len(dataset.test)  # type: ignore[arg-type]
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    batches = list(replace(dataset, test=Subset(dataset.test, chosen)).test_loader(64))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
