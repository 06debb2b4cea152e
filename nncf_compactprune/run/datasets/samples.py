"""Some test images that stand for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from nncf_compactprune.run.datasets.base import ResolvedDataset


def evenly(total: int, count: int) -> list[int]:
    """Positions, evenly from all of them.

    :param total: how many there are.
    :param count: how many are wanted at most.
    """
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()  # type: ignore[no-any-return]


def even_samples(dataset: ResolvedDataset, count: int) -> tuple[Tensor, Tensor | None]:
    """Test images, normalised, and their labels, if they have any, taken evenly from all of them.

    :param dataset: where from.
    :param count: how many at most.
    """
    chosen = evenly(len(dataset.test), count)  # type: ignore[arg-type]
    batches = list(replace(dataset, test=Subset(dataset.test, chosen)).test_loader(64))
    labels = torch.cat([labels for _, labels in batches]) if dataset.labelled else None
    return torch.cat([images for images, _ in batches]), labels
