"""Named datasets: ``digits``, ``cifar10:PATH``, ``imagefolder:DIR``, ``pictures:DIR`` and ``python:module:function``.

Nothing here downloads. All are brought to one shape, :class:`ResolvedDataset`, so that the same run works on each.
"""

from nncf_compactprune.run.datasets.augment import crop_and_flip, jitter, resized_crop_and_flip
from nncf_compactprune.run.datasets.base import ArrayImages, Augment, Batch, ResolvedDataset
from nncf_compactprune.run.datasets.cifar10 import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD
from nncf_compactprune.run.datasets.classes import only_classes
from nncf_compactprune.run.datasets.digits import digits
from nncf_compactprune.run.datasets.image_folder import IMAGENET_MEAN, IMAGENET_STD
from nncf_compactprune.run.datasets.resolve import compactprune_datasets, resolve_dataset
from nncf_compactprune.run.datasets.samples import even_samples

__all__ = [
    "CIFAR10_CLASSES",
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ArrayImages",
    "Augment",
    "Batch",
    "ResolvedDataset",
    "compactprune_datasets",
    "crop_and_flip",
    "digits",
    "even_samples",
    "jitter",
    "only_classes",
    "resized_crop_and_flip",
    "resolve_dataset",
]
