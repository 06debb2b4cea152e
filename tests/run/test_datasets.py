"""Names lead to data sets with fixed splits, seeded batches and honest errors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run import datasets
from nncf_compactprune.run.datasets import (
    ArrayImages,
    ResolvedDataset,
    crop_and_flip,
    jitter,
    only_classes,
    resized_crop_and_flip,
    resolve_dataset,
)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    registry = Plugins()
    registry.register(datasets)
    return registry


@pytest.fixture(scope="module")
def digits(plugins: Plugins) -> ResolvedDataset:
    return resolve_dataset("digits", plugins=plugins)


def labels_of(dataset: ResolvedDataset, part: str) -> torch.Tensor:
    source = getattr(dataset, part)
    assert isinstance(source, ArrayImages)
    return source.labels


def test_digits_split_is_fixed_stratified_and_complete(digits: ResolvedDataset) -> None:
    train, test = labels_of(digits, "train"), labels_of(digits, "test")
    assert (len(train), len(test)) == (1197, 600)
    # a third of each class
    assert ((test.bincount() - train.bincount() / 2).abs() < 2).all()
    everything = torch.cat([part.images.flatten(1) for part in (digits.train, digits.test)])  # type: ignore[attr-defined]
    assert len(everything.unique(dim=0)) == 1797
    assert digits.input_shape == (1, 16, 16)


def test_digits_batches_are_normalised(digits: ResolvedDataset) -> None:
    images, labels = next(iter(digits.train_loader(2000, augment=False)))
    assert images.shape == (1197, 1, 16, 16)
    assert labels.dtype == torch.int64
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_equal_seeds_give_equal_epochs_and_epochs_differ(digits: ResolvedDataset) -> None:
    def two_epochs(seed: int) -> list[torch.Tensor]:
        loader = digits.train_loader(64, seed=seed)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first, again, other = two_epochs(0), two_epochs(0), two_epochs(1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert len(first[0]) == 1197 // 64 * 64


def test_training_images_are_shuffled_each_epoch_and_keep_their_labels(digits: ResolvedDataset) -> None:
    loader = digits.train_loader(2000, augment=False)
    (first, first_labels), (second, second_labels) = (next(iter(loader)) for _ in range(2))
    assert not torch.equal(first_labels, labels_of(digits, "train"))
    assert not torch.equal(first_labels, second_labels)

    def sorted_rows(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.flatten(1), labels[:, None].float()], 1).unique(dim=0)

    torch.testing.assert_close(sorted_rows(first, first_labels), sorted_rows(second, second_labels))


def test_test_loader_keeps_order_and_every_image(digits: ResolvedDataset) -> None:
    labels = torch.cat([labels for _, labels in digits.test_loader(64)])
    torch.testing.assert_close(labels, labels_of(digits, "test"), rtol=0, atol=0)


@pytest.mark.parametrize("augment", [jitter, crop_and_flip, resized_crop_and_flip])
def test_augmentation_keeps_shape_and_range_and_follows_its_generator(augment: datasets.Augment) -> None:
    images = torch.rand(8, 3, 16, 16)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_crops_keep_the_share_of_the_area_that_is_asked_for() -> None:
    """On a ramp, the widest difference of a crop is its side."""
    ramp = torch.linspace(0, 1, 65).expand(200, 1, 65, 65)
    sides = {}
    for smallest in (0.35, 0.8):
        crops = resized_crop_and_flip(ramp, torch.Generator().manual_seed(0), smallest)
        sides[smallest] = float((crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))).min())
    assert sides == {0.35: pytest.approx(0.35**0.5, abs=0.03), 0.8: pytest.approx(0.8**0.5, abs=0.03)}


@pytest.mark.parametrize("smallest", [0, 1.5])
def test_a_crop_that_cannot_be_is_refused(smallest: float, plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match=f"smallest_crop: a share of .* up to 1; got {smallest}"):
        resolve_dataset(f"imagefolder:{tmp_path}", {"smallest_crop": smallest}, plugins)


def test_crop_and_flip_only_moves_pixels() -> None:
    """Every result is one of the 9 x 9 crops of the padded image or the mirror of one."""
    image = torch.rand(1, 2, 5, 5)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    crops = [padded[..., i : i + 5, j : j + 5] for i in range(9) for j in range(9)]
    generator = torch.Generator().manual_seed(0)
    results = crop_and_flip(image.repeat(40, 1, 1, 1), generator).split(1)
    matches = [[torch.equal(y, crop), torch.equal(y, crop.flip(3))] for y in results for crop in crops]
    assert all(any(torch.equal(y, crop) or torch.equal(y, crop.flip(3)) for crop in crops) for y in results)
    assert any(plain for plain, _ in matches)
    assert any(mirrored for _, mirrored in matches)


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (48, 32)) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, colour).save(path)


def write_folder(folder: Path) -> str:
    """One red image to train on, one to test on; returns the dataset's name."""
    for part in ("train", "val"):
        write_image(folder / part / "red" / "0.png", (255, 0, 0))
    return f"imagefolder:{folder}"


def test_image_folder_labels_resizes_and_cuts_the_centre(plugins: Plugins, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "val"):
        write_image(tmp_path / part / "blue" / "0.png", (0, 0, 255), size=(32, 48))
    # 48 x 32: green centre, black sides that the centre cut at 28 of 28 * 256 / 224 = 32 pixels removes
    centred = np.zeros((32, 48, 3), dtype=np.uint8)
    centred[:, 8:40, 1] = 255
    pytest.importorskip("PIL.Image").fromarray(centred).save(tmp_path / "val" / "red" / "1.png")
    dataset = resolve_dataset(f"imagefolder:{tmp_path}", {"image_size": 28}, plugins)
    assert dataset.class_names == ("blue", "red")
    assert dataset.input_shape == (3, 28, 28)
    samples = [dataset.test[index] for index in range(3)]
    assert [int(label) for _, label in samples] == [0, 1, 1]
    for (pixels, _), colour in zip(samples, [(0, 0, 1), (1, 0, 0), (0, 1, 0)], strict=True):
        torch.testing.assert_close(pixels, torch.tensor(colour).float().view(3, 1, 1).expand(3, 28, 28))
    images, labels = next(iter(dataset.train_loader(2)))
    assert images.shape == (2, 3, 28, 28)
    assert sorted(labels.tolist()) == [0, 1]


def test_image_folder_errors_name_the_folder(plugins: Plugins, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    name = f"imagefolder:{tmp_path}"
    with pytest.raises(ResolveError, match=r"no such folder: .*train\. Expected DIR/train/CLASS"):
        resolve_dataset(name, plugins=plugins)
    (tmp_path / "train").mkdir()
    with pytest.raises(ResolveError, match=r"train: Couldn't find any class folder .*train\. Expected DIR/train/CLASS"):
        resolve_dataset(name, plugins=plugins)
    (tmp_path / "train" / "red").mkdir()
    with pytest.raises(ResolveError, match=r"train: Found no valid file for the classes red\. Supported .*\. Expected"):
        resolve_dataset(name, plugins=plugins)
    write_image(tmp_path / "train" / "red" / "0.png", (255, 0, 0))
    write_image(tmp_path / "val" / "green" / "0.png", (0, 255, 0))
    with pytest.raises(ResolveError, match="they differ in: green, red"):
        resolve_dataset(name, plugins=plugins)


def test_broken_image_is_named(plugins: Plugins, tmp_path: Path) -> None:
    name = write_folder(tmp_path)
    (tmp_path / "val" / "red" / "0.png").write_text("no image")
    dataset = resolve_dataset(name, plugins=plugins)
    with pytest.raises(ResolveError, match=r"Cannot read the image .*0\.png"):
        dataset.test[0]


def test_without_torchvision_image_folders_say_what_to_install(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "torchvision":
                raise ModuleNotFoundError(name, name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ResolveError, match=r"^torchvision is not .*: pip install 'nncf-compactprune\[images\]'$"):
        resolve_dataset(f"imagefolder:{tmp_path}", plugins=plugins)


def test_some_classes_of_an_image_folder_are_found_without_reading_images(plugins: Plugins, tmp_path: Path) -> None:
    write_folder(tmp_path)
    for part in ("train", "val"):
        write_image(tmp_path / part / "blue" / "0.png", (0, 0, 255))
        (tmp_path / part / "broken").mkdir()
        (tmp_path / part / "broken" / "0.png").write_text("no image")
    dataset = only_classes(resolve_dataset(f"imagefolder:{tmp_path}", plugins=plugins), [2, 0])
    assert dataset.class_names == ("blue", "red")
    assert [int(label) for _, label in (dataset.test[at] for at in range(2))] == [0, 1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, r"Unknown dataset 'digit'\. Did you mean 'digits'\?"),
        ("digits:here", {}, "takes no path, got 'here'"),
        ("digits", {"size": 8}, "unexpected keyword argument 'size'"),
        ("python:json:dumps", {"obj": 1}, "expected a ResolvedDataset, got str"),
    ],
)
def test_wrong_name_or_option(plugins: Plugins, name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ResolveError, match=message):
        resolve_dataset(name, options, plugins)


def test_python_function_gives_a_dataset(plugins: Plugins, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\n"
        "from nncf_compactprune.run.datasets import ArrayImages, ResolvedDataset\n"
        "def ones(n):\n"
        "    part = ArrayImages(torch.ones(n, 1, 2, 2), torch.zeros(n))\n"
        "    return ResolvedDataset('ones', part, part, ('one',), (1, 2, 2))\n"
    )
    dataset = resolve_dataset(f"python:{source}:ones", {"n": 3}, plugins)
    images, labels = next(iter(dataset.train_loader(8)))
    assert images.shape == (3, 1, 2, 2)
    assert labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("options", "asks_the_model"), [({}, True), ({"mean": [0.5] * 3, "std": [0.25] * 3}, False)])
def test_image_folders_are_normalised_as_told_or_leave_it_to_the_model(
    plugins: Plugins, tmp_path: Path, options: dict[str, list[float]], asks_the_model: bool
) -> None:
    dataset = resolve_dataset(write_folder(tmp_path), options, plugins)
    assert dataset.model_normalises is asks_the_model
    assert dataset.mean == tuple(options.get("mean", datasets.IMAGENET_MEAN))
    assert dataset.std == tuple(options.get("std", datasets.IMAGENET_STD))
