"""What every dataset is brought to: two parts, class names, and how pixels are normalised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nncf_compactprune.errors import ResolveError

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Batch = tuple[torch.Tensor, Any]  # the labels are a tensor, or None without


@dataclass(frozen=True)
class ResolvedDataset:
    """A classification dataset with a training and a test part, or images without labels.

    :param name: the name it was resolved from.
    :param train: map-style dataset of ``(image, label)``; images are float32 ``[c, h, w]`` in [0, 1].
    :param test: the same, never augmented.
    :param class_names: one name per class, in label order; none: batches have None for labels.
    :param input_shape: ``(c, h, w)`` of every image.
    :param mean: subtracted from each image channel when a batch is made.
    :param std: divides each image channel after that.
    :param augment: maps a batch of training images and a generator to augmented images, or None for no augmentation.
    :param model_normalises: a model that states mean and std of its own replaces these.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: Augment | None = None
    model_normalises: bool = False

    @property
    def labelled(self) -> bool:
        """Whether its images have labels. Without, nothing is trained on them, and no accuracy is measured."""
        return bool(self.class_names)

    def train_loader(
        self, batch_size: int, *, augment: bool = True, seed: int = 0, sampler: Sampler[int] | None = None
    ) -> DataLoader[Batch]:
        """Returns shuffled batches ``(images [n, c, h, w], labels [n])``; equal seeds give equal epochs.

        An incomplete last batch is dropped unless it is the only one: BatchNorm cannot train on a single image. Without
        labels none is dropped.

        :param batch_size: images in a batch.
        :param augment: whether images are changed at random, where the dataset has an augmentation.
        :param seed: of order and augmentation.
        :param sampler: the order instead of shuffling, such as a ``DistributedSampler``'s.
        """
        collate = _Collate(self.mean, self.std, self.augment if augment else None, seed)
        generator = torch.Generator().manual_seed(seed)
        count = len(self.train)  # type: ignore[arg-type]
        drop_last = self.labelled and count > batch_size
        if not self.labelled:  # batches of like size: they count alike in means over batches
            batch_size = math.ceil(count / math.ceil(count / batch_size))
        return DataLoader(
            self.train,
            batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            generator=generator,
        )

    def test_loader(self, batch_size: int) -> DataLoader[Batch]:
        """Returns the test batches in their fixed order, without augmentation."""
        return DataLoader(self.test, batch_size, collate_fn=_Collate(self.mean, self.std, None, 0))


class ArrayImages(Dataset[Batch]):
    """Images held in memory.

    :param images: ``[n, c, h, w]``, uint8 in 0..255 or floating point in [0, 1].
    :param labels: integers ``[n]``, or None where there are none.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        self.images = images
        self.labels = None if labels is None else labels.long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], None if labels is None else labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        # torch's loader calls this where it exists: one gather instead of a stack of single images.
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return pixels, None if self.labels is None else self.labels[chosen]


class _Collate:
    """Makes a batch: stacks samples, augments, normalises."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], augment: Augment | None, seed: int) -> None:
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, samples: Batch | list[Batch]) -> Batch:
        images, labels = samples if isinstance(samples, tuple) else default_collate(samples)
        if self.augment is not None:
            images = self.augment(images, self.generator)
        return (images - self.mean) / self.std, labels


def normalisation(
    name: str, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Checks mean and std of three channels.

    :param name: the dataset's, for messages.
    :param mean: of each channel, for pixels in [0, 1].
    :param std: of each channel; above zero.
    :return: both as tuples.
    :raises ResolveError: if one is not three such numbers.
    """
    for key, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or (key == "std" and min(values) <= 0):
            above = " above 0" if key == "std" else ""
            msg = f"{name}: {key}: expected three numbers{above}, one for each channel, got {values!r}."
            raise ResolveError(msg)
    return tuple(mean), tuple(std)
