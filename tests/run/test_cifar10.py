"""CIFAR-10's official files give the same images whichever version they are; a hostile file runs nothing."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cifar10_files import binary_batch, hostile_batch, images, write_binary, write_python

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.run.datasets import ArrayImages, ResolvedDataset, resolve_dataset

PER_FILE = 4


def read(path: Path, **options: object) -> tuple[ResolvedDataset, ArrayImages, ArrayImages]:
    dataset = resolve_dataset(f"cifar10:{path}", options)
    assert isinstance(dataset.train, ArrayImages)
    assert isinstance(dataset.test, ArrayImages)
    return dataset, dataset.train, dataset.test


@pytest.fixture(params=["python", "binary", "root", "archive"])
def official(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place that holds the official files."""
    if request.param == "binary":
        write_binary(tmp_path / "cifar-10-batches-bin", PER_FILE)
        return tmp_path / "cifar-10-batches-bin"
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, PER_FILE)
    if request.param == "archive":
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        return tmp_path / "cifar-10-python.tar.gz"
    return tmp_path if request.param == "root" else folder


def test_every_official_layout_gives_the_same_images_in_order(official: Path) -> None:
    dataset, train, test = read(official)
    pixels, labels = zip(*(images(PER_FILE, number) for number in range(6)), strict=True)
    np.testing.assert_array_equal(train.images.flatten(1).numpy(), np.concatenate(pixels[:5]))
    assert train.labels.tolist() == [label for part in labels[:5] for label in part]
    np.testing.assert_array_equal(test.images.flatten(1).numpy(), pixels[5])
    assert test.labels.tolist() == labels[5]
    assert train.images.shape == (5 * PER_FILE, 3, 32, 32)
    assert (dataset.class_names[3], dataset.class_names[5]) == ("cat", "dog")


def test_images_are_normalised_by_cifar10s_own_figures_or_the_given_ones(tmp_path: Path) -> None:
    write_binary(tmp_path, PER_FILE)
    pixels = torch.from_numpy(images(PER_FILE, 5)[0]).view(-1, 3, 32, 32) / 255
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    own = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    for options, used in (({}, own), (given, given)):
        batch, _ = next(iter(read(tmp_path, **options)[0].test_loader(PER_FILE)))
        mean, std = (torch.tensor(used[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(batch, (pixels - mean) / std)


def test_leading_images_only(tmp_path: Path) -> None:
    write_python(tmp_path, PER_FILE)
    _, train, test = read(tmp_path, train_samples=3, test_samples=2)
    assert train.labels.tolist() == images(PER_FILE, 0)[1][:3]
    assert test.labels.tolist() == images(PER_FILE, 5)[1][:2]


def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    write_python(tmp_path, PER_FILE)
    touched = tmp_path / "touched"
    batch = hostile_batch(touched)
    pickle.loads(batch)  # the attack works where anything is unpickled
    assert touched.exists()
    touched.unlink()
    (tmp_path / "data_batch_1").write_bytes(batch)
    with pytest.raises(
        ResolveError, match=r"data_batch_1 is not a batch.*it wants .*, which no array needs\. It was not run"
    ):
        read(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize("named", ["builtins eval", "os system", "numpy fromfile", "builtins getattr"])
def test_pickle_that_names_anything_but_arrays_is_refused(tmp_path: Path, named: str) -> None:
    write_python(tmp_path, PER_FILE)
    module, name = named.split()
    (tmp_path / "test_batch").write_bytes(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    with pytest.raises(ResolveError, match=rf"it wants {module}\.{name}, which no array needs"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data_batch_1", b"\x80\x04.", "data_batch_1 is not a batch of CIFAR-10's Python version"),
        ("data_batch_1", pickle.dumps([1]), "expected 'data', bytes .n, 3072., and 'labels', a list of n"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "expected 'data', bytes"),
        ("test_batch", pickle.dumps({"data": np.zeros((1, 3072), "u1"), "labels": [10]}), "labels in 0..9, got 10"),
        ("test_batch", pickle.dumps({"data": np.zeros((2, 3072), "u1"), "labels": [1]}), "a list of n"),
    ],
)
def test_broken_python_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    write_python(tmp_path, PER_FILE)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ResolveError, match=message):
        read(tmp_path)


def test_broken_binary_files_are_named(tmp_path: Path) -> None:
    write_binary(tmp_path, PER_FILE)
    whole = binary_batch(*images(2))
    for data, message in (
        (whole[:-1], "expected rows of 3073 bytes, got 6145 bytes"),
        (b"\xff" + whole[1:], "expected labels in 0..9, got 255"),
    ):
        (tmp_path / "data_batch_2.bin").write_bytes(data)
        with pytest.raises(ResolveError, match=rf"data_batch_2\.bin: {message}"):
            read(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(ResolveError, match=r"lacks data_batch_2\.bin"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar10", {}, "no CIFAR-10 files at ''. Expected cifar-10-batches-py"),
        ("cifar10:no/such", {}, "no CIFAR-10 files at 'no/such'"),
        ("cifar10:HERE", {"std": [1, 1, 0]}, "std: expected three numbers above 0"),
        ("cifar10:HERE", {"mean": [1]}, "mean: expected three numbers, one for each channel"),
    ],
)
def test_wrong_place_or_option(tmp_path: Path, name: str, options: dict[str, object], message: str) -> None:
    write_binary(tmp_path, PER_FILE)
    with pytest.raises(ResolveError, match=message):
        resolve_dataset(name.replace("HERE", str(tmp_path)), options)


def test_archive_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "cifar.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ResolveError, match=r"cifar\.tar\.gz cannot be read"):
        read(tmp_path / "cifar.tar.gz")
