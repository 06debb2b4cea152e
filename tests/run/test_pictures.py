"""Pictures without labels serve wherever no label is asked for, and what needs one is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nncf_compactprune.errors import ConfigError, ResolveError
from nncf_compactprune.host.packages import load_function
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.run import pipeline, prepare
from nncf_compactprune.run.datasets import ArrayImages, ResolvedDataset, only_classes, resolve_dataset
from nncf_compactprune.run.families.check import check
from nncf_compactprune.run.families.settings import read_family
from nncf_compactprune.run.settings import read_settings
from nncf_compactprune.run.verifying import verify

image = pytest.importorskip("PIL.Image")

NET_SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    image.fromarray(pixels).save(path)


def pictures(folder: Path, **options: Any) -> ResolvedDataset:
    return resolve_dataset(f"pictures:{folder}", {"image_size": 16, **options})


def test_pictures_in_the_folder_and_below_count_and_nothing_else(tmp_path: Path) -> None:
    for at, name in enumerate(("b.png", "a.JPG", "below/deep/c.bmp", ".hidden.png", ".cache/d.png")):
        draw(tmp_path / name, at)
    (tmp_path / "notes.txt").write_text("no picture")
    dataset = pictures(tmp_path)
    assert not dataset.labelled
    assert dataset.input_shape == (3, 16, 16)
    images, labels = next(iter(dataset.test_loader(8)))
    assert images.shape == (3, 3, 16, 16)
    assert labels is None
    # the second by name, a PNG: the same pixels, normalised by ImageNet's figures
    (tmp_path / "below" / "deep" / "c.bmp").unlink()
    (tmp_path / "a.JPG").unlink()
    (alone, _), *_ = pictures(tmp_path, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]).test_loader(1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(images[1], (alone[0] - mean) / std)


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    """28 of the 32 pixels of the short side, as an image folder does."""
    for name, across in (("wide.png", False), ("high.png", True)):
        pixels = np.zeros((32, 48, 3), dtype=np.uint8)
        pixels[2:30, 10:38, 1] = 255
        image.fromarray(pixels.transpose(1, 0, 2) if across else pixels).save(tmp_path / name)
    dataset = pictures(tmp_path, image_size=28)
    for at in range(2):
        pixels, label = dataset.test[at]
        assert label is None
        torch.testing.assert_close(pixels, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 28, 28))


def test_every_picture_is_in_a_batch_and_batches_are_alike(tmp_path: Path) -> None:
    for at in range(9):
        draw(tmp_path / f"{at}.png", at)
    loader = pictures(tmp_path).train_loader(8, seed=3)
    assert [len(images) for images, _ in loader] == [5, 4]
    together = torch.cat([images for images, _ in loader])
    (ordered, _), *_ = pictures(tmp_path).test_loader(9)
    torch.testing.assert_close(together.flatten(1).unique(dim=0), ordered.flatten(1).unique(dim=0))


def test_of_many_pictures_some_are_taken_evenly(tmp_path: Path) -> None:
    for at in range(9):
        draw(tmp_path / f"{at}.png", at)
    (few, _), *_ = pictures(tmp_path, samples=3).test_loader(9)
    (every, _), *_ = pictures(tmp_path).test_loader(9)
    torch.testing.assert_close(few, every[[0, 4, 8]])


def test_pictures_stand_for_all_classes_of_a_network_that_was_cut_to_some(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    dataset = pictures(tmp_path)
    assert only_classes(dataset, [3, 1]) is dataset


def test_what_is_wrong_with_the_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match=r"no such folder: '.*absent'\. Expected pictures:DIR"):
        pictures(tmp_path / "absent")
    with pytest.raises(ResolveError, match=r"no such folder: ''\. Expected pictures:DIR"):
        resolve_dataset("pictures:")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ResolveError, match=r"no picture in '.*' \(looked for \.bmp, .*, in all folders below\)"):
        pictures(tmp_path)
    draw(tmp_path / "good.png")
    draw(tmp_path / "below" / "broken.png", size=(200, 200))
    whole = (tmp_path / "below" / "broken.png").read_bytes()
    for content in (b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "below" / "broken.png").write_bytes(content)
        with pytest.raises(ResolveError, match=r"cannot read .*broken\.png: .*\. Remove it from the folder"):
            pictures(tmp_path)


@pytest.mark.parametrize("key", ["image_size", "samples"])
@pytest.mark.parametrize("value", [0, "32", 1.5])
def test_options_that_are_no_counts_are_told(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ResolveError, match=f"pictures: {key}: expected a whole number above 0, got {value!r}"):
        pictures(tmp_path, **{key: value})


def write_config(folder: Path, compression: Any, **changes: Any) -> Path:
    """A network with weights, nine pictures, and a config."""
    (folder / "net.py").write_text(NET_SOURCE)
    torch.manual_seed(0)
    model = load_function(f"{folder / 'net.py'}:Net")()
    model.train()
    for _ in range(20):  # BatchNorm statistics of something
        model(torch.randn(8, 3, 16, 16))
    save_file(model.state_dict(), folder / "weights.safetensors")
    for at in range(9):
        draw(folder / "photos" / f"{at}.png", at)
    config = {
        "model": f"python:{folder / 'net.py'}:Net", "weights": str(folder / "weights.safetensors"),
        "dataset": f"pictures:{folder / 'photos'}", "dataset_options": {"image_size": 16}, "batch_size": 4, "epochs": 0,
        "compression": compression, "export": {"formats": ["openvino"], "precisions": ["fp32"]},
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config | changes))
    return path


SCHEDULED = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"round_to": 1}}
AT_ONCE = {**SCHEDULED, "params": {"schedule": "one_shot", "round_to": 1}}


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        (SCHEDULED, {"epochs": 2}, "json: epochs: expected 0, got 2: "),
        (SCHEDULED, {"pretrain_epochs": 1}, "pretrain_epochs: expected 0, got 1: "),
        (SCHEDULED, {"weights": None}, "weights: missing. Name a file of trained weights: "),
        (
            SCHEDULED,
            {
                "accuracy_aware_training": {
                    "mode": "early_exit",
                    "params": {"maximal_total_epochs": 2, "maximal_relative_accuracy_degradation": 1},
                }
            },
            "accuracy_aware_training: leave it out: ",
        ),
        ({**SCHEDULED, "algorithm": "catro"}, {}, "compression[0].algorithm: 'catro' needs labelled images"),
        (
            {**SCHEDULED, "params": {"importance": "taylor"}},
            {},
            "compression[0].params.importance: 'fbnet_pruning' needs labelled",
        ),
        (
            {**AT_ONCE, "initializer": {"search": {}}},
            {},
            "compression[0].initializer.search: 'fbnet_pruning' needs labelled",
        ),
        (
            {"algorithm": "filter_pruning", "params": {"interlayer_ranking_type": "learned_ranking"}},
            {},
            "compression[0].params.interlayer_ranking_type: 'filter_pruning' needs",
        ),
        (
            {"algorithm": "quantization", "accuracy_control": {"max_drop": 0.01}},
            {},
            "compression[0].accuracy_control: 'quantization' needs labelled images",
        ),
    ],
)
def test_what_needs_labels_is_refused_before_anything_runs(
    tmp_path: Path, entry: Any, changes: dict[str, Any], message: str
) -> None:
    path = write_config(tmp_path, entry, **changes)
    with pytest.raises(ConfigError) as caught:
        pipeline.run(path, say=lambda _: None)
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert f"'pictures:{tmp_path / 'photos'}' has no labels" in line
    assert not (tmp_path / "out").exists()


def test_what_needs_labels_is_refused_without_any_dataset_too(tmp_path: Path) -> None:
    catro = {**SCHEDULED, "algorithm": "catro"}
    path = write_config(tmp_path, catro, dataset=None, input_info={"sample_size": [1, 3, 16, 16]})
    with pytest.raises(
        ConfigError, match=r"\.algorithm: 'catro' needs labelled images for this, and there is no dataset"
    ):
        pipeline.run(path, say=lambda _: None)


def test_a_family_is_refused(tmp_path: Path) -> None:
    family = read_family(write_config(tmp_path, SCHEDULED, family=[0.8, 0.6]))
    with pytest.raises(ConfigError, match=r"dataset: 'pictures:.*' has no labels\. A family is compared by accuracy"):
        check(family, default_plugins())


def test_no_fine_tuning_is_asked_for_and_the_number_of_pictures_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    settings = read_settings(write_config(tmp_path, SCHEDULED))
    run = prepare.prepare(settings, default_plugins(), said.append)
    assert run.dataset is not None
    assert run.labelled is None
    name = f"pictures:{tmp_path / 'photos'}"
    assert said == [f"9 images of '{name}', without labels: nothing is trained and no accuracy measured"]


def test_a_network_that_gives_no_class_scores_has_its_pictures_too(tmp_path: Path) -> None:
    source = NET_SOURCE.replace("return self.head(", "return {'boxes': self.head(").replace(
        "mean((2, 3)))", "mean((2, 3)))}"
    )
    path = write_config(tmp_path, SCHEDULED)
    (tmp_path / "net.py").write_text(source)
    assert prepare.prepare(read_settings(path), default_plugins(), lambda _: None).dataset is not None


def test_a_function_of_ones_own_may_give_images_without_labels() -> None:
    images = ArrayImages(torch.rand(5, 1, 8, 8), None)
    dataset = ResolvedDataset("own", images, images, (), (1, 8, 8))
    assert [(len(batch), labels) for batch, labels in dataset.train_loader(3)] == [(3, None), (2, None)]


DATA_FREE = {"algorithm": "data_free_layerwise", "budget": {"macs": 0.7}, "params": {"round_to": 1}}


@pytest.mark.parametrize(
    "compression",
    [
        [{**AT_ONCE, "initializer": {"refit": {}}}, {"algorithm": "quantization"}],
        [{**DATA_FREE, "generation": {"source": "dataset"}}],
    ],
    ids=["refit and quantization", "data-free pruning"],
)
def test_a_run_on_pictures(tmp_path: Path, compression: Any) -> None:
    said: list[str] = []
    outcome = pipeline.run(write_config(tmp_path, compression), say=said.append)
    assert outcome.comparison.dense.accuracy is outcome.comparison.pruned.accuracy is None
    assert not [line for line in said if "ccuracy " in line.replace("no accuracy measured", "") or "Warning" in line]
    report = (outcome.directory / "report.md").read_text()
    assert f"Dataset `pictures:{tmp_path / 'photos'}`, without labels, algorithm" in report
    assert "ccuracy" not in report
    assert "No accuracy was measured." in (outcome.directory / "model_card.md").read_text()
    summary = json.loads((outcome.directory / "summary.json").read_text())
    assert {one["samples"] for one in summary["served"]} == {9}
    assert [one["problems"] for one in summary["served"]] == [[], []]
    checks = verify(outcome.directory)
    assert [(one.samples, one.accuracy, one.problems) for one in checks] == [(9, None, ())] * 2
