"""Named datasets: ``digits``, ``cifar10:PATH``, ``imagefolder:DIR`` and ``python:module:function``.

Nothing here downloads. All are brought to one shape, :class:`ResolvedDataset`, so that the same run works on each.
"""

from __future__ import annotations

import inspect
import io
import itertools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from nncf_compactprune.decide.labelled import output_classes
from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.packages import load_function, pick, require_package
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.plugins.hookspecs import hookimpl

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
# The digits' split is part of the dataset's definition, so that figures of different runs compare.
DIGITS_SPLIT_SEED = 0
DIGITS_TEST_IMAGES = 600


@dataclass(frozen=True)
class ResolvedDataset:
    """A classification dataset with a training and a test part.

    :param name: the name it was resolved from.
    :param train: map-style dataset of ``(image, label)``; images are float32 ``[c, h, w]`` in [0, 1].
    :param test: the same, never augmented.
    :param class_names: one name per class, in label order.
    :param input_shape: ``(c, h, w)`` of every image.
    :param mean: subtracted from each image channel when a batch is made.
    :param std: divides each image channel after that.
    :param augment: maps a batch of training images and a generator to augmented images, or None for no augmentation.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: Augment | None = None

    def train_loader(
        self, batch_size: int, *, augment: bool = True, seed: int = 0, sampler: Sampler[int] | None = None
    ) -> DataLoader[Batch]:
        """Returns shuffled batches ``(images [n, c, h, w], labels [n])``; equal seeds give equal epochs.

        An incomplete last batch is dropped unless it is the only one: BatchNorm cannot train on a single image.

        :param sampler: the order instead of shuffling, such as a ``DistributedSampler``'s.
        """
        collate = _Collate(self.mean, self.std, self.augment if augment else None, seed)
        generator = torch.Generator().manual_seed(seed)
        drop_last = len(self.train) > batch_size  # type: ignore[arg-type]
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
    :param labels: integers ``[n]``.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        # torch's loader calls this where it exists: one gather instead of a stack of single images.
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        return images.float() / 255 if images.dtype == torch.uint8 else images, self.labels[chosen]


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


class _OfClasses(Dataset[Batch]):
    """The samples of some classes, with labels counted from 0 in the order given."""

    def __init__(self, whole: Dataset[Any], classes: Sequence[int]) -> None:
        self.whole = whole
        self.label = {old: new for new, old in enumerate(classes)}
        if isinstance(whole, ArrayImages):
            labels = whole.labels.tolist()
        elif isinstance(whole, ImageFiles):
            labels = [label for _, label in whole.files]
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


def resolve_dataset(
    name: str, options: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> ResolvedDataset:
    """Returns the dataset that a name stands for.

    :param name: ``scheme`` or ``scheme:rest``, such as ``digits`` or ``cifar10:data/cifar10``.
    :param options: the scheme's own keyword options.
    :param plugins: where schemes come from; the installed plugins by default.
    :raises ResolveError: if the scheme, the files or an option is wrong.
    """
    scheme, _, rest = name.partition(":")
    resolver = pick("dataset", scheme, (plugins or default_plugins()).datasets)
    try:
        inspect.signature(resolver).bind(rest, **(options or {}))
    except TypeError as error:
        msg = f"Dataset '{name}': {error}."
        raise ResolveError(msg) from error
    dataset = resolver(rest, **(options or {}))
    if not isinstance(dataset, ResolvedDataset):
        msg = f"Dataset '{name}': expected a ResolvedDataset, got {type(dataset).__name__}."
        raise ResolveError(msg)
    return dataset


def only_classes(dataset: ResolvedDataset, classes: Sequence[int]) -> ResolvedDataset:
    """The part of a dataset that belongs to some classes, labels counted from 0 in ascending order of the classes."""
    classes = output_classes(classes)
    return replace(
        dataset,
        train=_OfClasses(dataset.train, classes),
        test=_OfClasses(dataset.test, classes),
        class_names=tuple(dataset.class_names[c] for c in classes),
    )


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


def cifar10(rest: str, *, train_samples: int | None = None, test_samples: int | None = None) -> ResolvedDataset:
    """CIFAR-10 from packed archives ``cifar10_train_*.npz`` and ``cifar10_test.npz``.

    Each holds ``y`` (labels), ``blob`` (WebP sheets of 25 rows of 40 images, concatenated) and ``off`` (byte offsets).

    :param rest: the folder of the archives, or one training archive (its test set lies beside it).
    :param train_samples: use only that many leading training images.
    :param test_samples: use only that many leading test images.
    """
    path = Path(rest)
    if not rest or not path.exists():
        msg = f"cifar10: no such file or folder: '{rest}'. Write cifar10:FOLDER with cifar10_train_*.npz in it."
        raise ResolveError(msg)
    folder = path if path.is_dir() else path.parent
    train_files = sorted(path.glob("cifar10_train_*.npz")) if path.is_dir() else [path]
    test_file = folder / "cifar10_test.npz"
    if not train_files or not test_file.is_file():
        msg = f"cifar10: expected cifar10_train_*.npz and cifar10_test.npz in {folder}."
        if (folder / "data_batch_1").exists():
            msg += " The pickled batches there are not read: unpickling runs whatever code a file contains."
        raise ResolveError(msg)
    return ResolvedDataset(
        f"cifar10:{rest}",
        _read_cifar10(train_files, train_samples),
        _read_cifar10([test_file], test_samples),
        CIFAR10_CLASSES,
        (3, 32, 32),
        IMAGENET_MEAN,
        IMAGENET_STD,
        crop_and_flip,
    )


def imagefolder(rest: str, *, image_size: int = 224) -> ResolvedDataset:
    """Images in ``DIR/train/CLASS/`` and ``DIR/val/CLASS/``.

    :param rest: the folder that holds ``train`` and ``val``.
    :param image_size: height and width given to the model, in pixels.
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
        IMAGENET_MEAN,
        IMAGENET_STD,
        resized_crop_and_flip,
    )


def python_dataset(rest: str, **options: Any) -> ResolvedDataset:
    """Calls a user's own function, which returns a :class:`ResolvedDataset`."""
    try:
        dataset = load_function(rest)(**options)
    except TypeError as error:
        msg = f"python:{rest} does not take these options: {error}"
        raise ResolveError(msg) from error
    return dataset  # type: ignore[no-any-return]  # resolve_dataset checks the type


def jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns by up to 0.2 rad, scales by up to 10 % and shifts by up to an eighth of the half width."""
    draws = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = 0.2 * draws[0], 1 + 0.1 * draws[1]
    return _warp(images, scale * angle.cos(), scale * angle.sin(), 0.125 * draws[2:].T)


def crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pads by 4 pixels of zeros, crops at random and mirrors half of the images: CIFAR's usual augmentation."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator)
    columns = left + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop_and_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cuts squares of 35 to 100 % of the area, resizes them back and mirrors half of the images."""
    n = len(images)
    scale = (0.35 + 0.65 * torch.rand(n, generator=generator)).sqrt()
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale[:, None])
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return _warp(images, scale, torch.zeros(n), shift)


def _warp(images: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Samples each image through the similarity [[cosine, -sine], [sine, cosine]] and shift, in half-image units."""
    rows = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    grid = functional.affine_grid(torch.cat([rows, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def _read_cifar10(files: Sequence[Path], limit: int | None) -> ArrayImages:
    images, labels = [], []
    for path in files:
        try:
            with np.load(path, allow_pickle=False) as packed:
                blob, offsets, targets = packed["blob"], packed["off"], packed["y"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            msg = f"cifar10: {path} is not a packed archive with the arrays blob, off and y: {error}"
            raise ResolveError(msg) from error
        sheets = [_read_sheet(blob[start:end].tobytes(), path) for start, end in itertools.pairwise(offsets)]
        if len(targets) != 1000 * len(sheets) or np.any(targets >= len(CIFAR10_CLASSES)):
            msg = f"cifar10: {path} must hold 1000 labels in 0..9 for each of its {len(sheets)} sheets."
            raise ResolveError(msg)
        images += sheets
        labels.append(targets)
        if limit is not None and 1000 * len(images) >= limit:
            break
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)
    return ArrayImages(pixels[:limit], torch.from_numpy(np.concatenate(labels))[:limit])


def _read_sheet(data: bytes, path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the 1000 images ``[1000, 32, 32, 3]`` of one sheet."""
    pil = require_package("PIL.Image", "pillow")
    try:
        sheet = np.asarray(pil.open(io.BytesIO(data)).convert("RGB")).reshape(25, 32, 40, 32, 3)
    except (OSError, ValueError) as error:
        msg = f"cifar10: {path} holds a sheet that is no image of 25 x 40 tiles of 32 x 32 pixels: {error}"
        raise ResolveError(msg) from error
    images: np.ndarray[Any, np.dtype[np.uint8]] = sheet.transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3)
    return images


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


@hookimpl
def compactprune_datasets() -> Mapping[str, Callable[..., ResolvedDataset]]:
    """The dataset schemes that come with the package."""
    return {"cifar10": cifar10, "digits": digits, "imagefolder": imagefolder, "python": python_dataset}
