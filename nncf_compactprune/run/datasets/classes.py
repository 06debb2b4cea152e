"""The part of a dataset that belongs to some of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from nncf_compactprune.decide.labelled import output_classes
from nncf_compactprune.run.datasets.base import ArrayImages, Batch, ResolvedDataset


def only_classes(dataset: ResolvedDataset, classes: Sequence[int]) -> ResolvedDataset:
    """The part of a dataset that belongs to some classes, labels counted from 0 in ascending order of the classes.

    :param dataset: the whole; without labels nobody knows the part, and it stays whole.
    :param classes: indices of the classes, in any order.
    """
    if not dataset.labelled:
        return dataset
    classes = output_classes(classes)
    return replace(
        dataset,
        train=_OfClasses(dataset.train, classes),
        test=_OfClasses(dataset.test, classes),
        class_names=tuple(dataset.class_names[c] for c in classes),
    )


class _OfClasses(Dataset[Batch]):
    """The samples of some classes, with labels counted from 0 in the order given."""

    def __init__(self, whole: Dataset[Any], classes: Sequence[int]) -> None:
        self.whole = whole
        self.label = {old: new for new, old in enumerate(classes)}
        if isinstance(whole, ArrayImages) and whole.labels is not None:
            labels = whole.labels.tolist()
        elif isinstance(getattr(whole, "targets", None), list):  # torchvision's way to tell labels without images
            labels = whole.targets  # type: ignore[attr-defined]
        else:
            labels = [int(whole[at][1]) for at in range(len(whole))]  # type: ignore[arg-type]
        self.positions = [at for at, label in enumerate(labels) if label in self.label]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Batch:
        image, label = self.whole[self.positions[index]]
        return image, torch.tensor(self.label[int(label)])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        chosen = [self.positions[index] for index in indices]
        if not hasattr(self.whole, "__getitems__"):
            return [self[index] for index in indices]
        images, labels = self.whole.__getitems__(chosen)
        return images, torch.tensor([self.label[int(label)] for label in labels])
