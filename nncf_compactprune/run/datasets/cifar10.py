"""CIFAR-10 as its authors distribute it: the Python version (pickles), the binary version, or the archive of either."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.run.datasets.augment import crop_and_flip
from nncf_compactprune.run.datasets.base import ArrayImages, ResolvedDataset, normalisation

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
IMAGES_PER_FILE = 10_000
_PIXELS = 3 * 32 * 32
_EXPECTED = "Expected cifar-10-batches-py or cifar-10-batches-bin, a folder with one of them in it, or their .tar.gz."
# What the pickles of the official files name: arrays, and nothing that runs code.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def cifar10(
    rest: str,
    *,
    train_samples: int | None = None,
    test_samples: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ResolvedDataset:
    """CIFAR-10 from its official files.

    :param rest: ``cifar-10-batches-py``, ``cifar-10-batches-bin``, the folder around it, or the ``.tar.gz``.
    :param train_samples: use only that many leading training images.
    :param test_samples: use only that many leading test images.
    :param mean: of each channel, for pixels in [0, 1]; CIFAR-10's own by default.
    :param std: the same.
    """
    files, suffix = _official_files(Path(rest), train_samples) if rest else ({}, "")
    if not files:
        msg = f"cifar10: no CIFAR-10 files at '{rest}'. {_EXPECTED}"
        raise ResolveError(msg)
    test = f"test_batch{suffix}"
    return ResolvedDataset(
        f"cifar10:{rest}",
        _images({name: data for name, data in files.items() if name != test}, train_samples),
        _images({test: files[test]}, test_samples),
        CIFAR10_CLASSES,
        (3, 32, 32),
        *normalisation("cifar10", mean or CIFAR10_MEAN, std or CIFAR10_STD),
        crop_and_flip,
    )


def _official_files(path: Path, train_samples: int | None) -> tuple[dict[str, bytes], str]:
    """The files' contents by name, the test file last, and the ending of their names; nothing where there are none.

    :param train_samples: how many training images are wanted; files beyond these are not read.
    """
    needed = 5 if train_samples is None else min(5, max(1, -(-train_samples // IMAGES_PER_FILE)))
    try:
        for suffix in ("", ".bin"):
            names = [*(f"data_batch_{number}{suffix}" for number in range(1, needed + 1)), f"test_batch{suffix}"]
            found = _from_archive(path, names) if path.is_file() else _from_folders(path, names)
            if found:
                missing = [name for name in names if name not in found]
                if missing:
                    msg = f"cifar10: {path} lacks {', '.join(missing)}. {_EXPECTED}"
                    raise ResolveError(msg)
                return {name: found[name] for name in names}, suffix
    except (OSError, EOFError, tarfile.TarError) as error:
        msg = f"cifar10: {path} cannot be read: {error}. {_EXPECTED}"
        raise ResolveError(msg) from error
    return {}, ""


def _from_folders(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    for folder in (path / inner for inner in FOLDERS):
        found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        if found:
            return found
    return {}


def _from_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        wanted = ((member, Path(member.name).name) for member in archive if member.isfile())
        return {name: archive.extractfile(member).read() for member, name in wanted if name in names}  # type: ignore[union-attr]


def _images(files: Mapping[str, bytes], limit: int | None) -> ArrayImages:
    """The images ``[n, 3, 32, 32]`` of some files, one after the other."""
    read = [
        _read_binary(name, data) if name.endswith(".bin") else _read_pickle(name, data) for name, data in files.items()
    ]
    pixels = np.concatenate([images for images, _ in read]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in read])
    return ArrayImages(torch.from_numpy(pixels)[:limit], torch.from_numpy(labels)[:limit])


def _read_binary(name: str, data: bytes) -> tuple[Bytes, Bytes]:
    """Rows of one label and 3,072 pixels, all bytes."""
    if not data or len(data) % (1 + _PIXELS):
        msg = f"cifar10: {name}: expected rows of {1 + _PIXELS} bytes, got {len(data)} bytes. Is the file complete?"
        raise ResolveError(msg)
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], _checked(name, rows[:, 0])


def _read_pickle(name: str, data: bytes) -> tuple[Bytes, Bytes]:
    """A pickled dict of ``data``, uint8 ``[n, 3072]``, and ``labels``, a list of n."""
    try:
        loaded = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a broken or hostile pickle can raise anything
        msg = f"cifar10: {name} is not a batch of CIFAR-10's Python version: {error}"
        raise ResolveError(msg) from error
    batch: dict[Any, Any] = loaded if isinstance(loaded, dict) else {}
    pixels: Any = batch.get(b"data", batch.get("data"))
    labels: Any = batch.get(b"labels", batch.get("labels"))
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(labels, list) and labels
    if not fits or pixels.shape != (len(labels), _PIXELS):
        msg = f"cifar10: {name}: expected 'data', bytes [n, {_PIXELS}], and 'labels', a list of n. Is it CIFAR-10's?"
        raise ResolveError(msg)
    return pixels, _checked(name, labels)


def _checked(name: str, labels: Bytes | list[Any]) -> Bytes:
    wrong = [label for label in labels if not isinstance(label, (int, np.integer)) or not 0 <= label <= 9]
    if wrong:
        msg = f"cifar10: {name}: expected labels in 0..9, got {wrong[0]}."
        raise ResolveError(msg)
    return np.asarray(labels, np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and numpy arrays. Everything else is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            msg = f"it wants {module}.{name}, which no array needs. It was not run."
            raise pickle.UnpicklingError(msg)
        return super().find_class(module, name)
