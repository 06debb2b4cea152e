"""Re-fits of networks that take no images: words with a mask, sounds, films, rows of features; what is generated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.data_free import randn, with_statistics_of
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.data_free import LayerInputs, SingleInput, operations
from nncf_compactprune.algorithms.data_free.generation import dead_leaves
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.sources import Generation, layer_inputs
from nncf_compactprune.errors import DataFreeError


class Words(nn.Module):
    """Words and a mask to class scores. Of 32 hidden channels, 16 are the others again, twice as large."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down, self.head = (
            nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3),
        )  # fmt: skip
        with torch.no_grad():
            self.up.weight[16:] = self.up.weight[:16] * 2
            self.up.bias[16:] = self.up.bias[:16] * 2

    def forward(self, words: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.down(self.up(self.words(words)).relu())
        mask = mask.unsqueeze(2)
        return self.head((x * mask).sum(1) / mask.sum(1) * scale)


def sentences(length: int = 6, seed: int = 0, count: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 20, (count, length), generator=generator)
    return {"words": words, "mask": (words != 3).float(), "labels": words[:, 0] % 3}


def stacked(dims: int) -> nn.Module:
    convolution, norm, pool = (
        getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool")
    )  # fmt: skip
    return nn.Sequential(
        convolution(2, 16, 3, padding=1), norm(16), nn.ReLU(), convolution(16, 16, 3, padding=1), norm(16), nn.ReLU(),
        pool(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def rows() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 3),
    )  # fmt: skip


def compressed(model, entry, loader=None, example=None):
    document = {"compression": {"budget": {"macs": 0.6}, "params": {"schedule": "one_shot"}, **entry}}
    ctrl, _ = create_compressed_model(copy.deepcopy(model), document, loader, example_inputs=example)
    return ctrl.strip().eval()


def error(model, dense, inputs) -> float:
    with torch.no_grad():
        got, expected = (m(**inputs) if isinstance(inputs, dict) else m(inputs) for m in (model, dense))
    return float((got - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize(
    "entry",
    [
        {"algorithm": "fbnet_pruning", "initializer": {"refit": {}}},
        {"algorithm": "data_free_layerwise", "generation": {"source": "dataset"}},
    ],
)
def test_words_with_a_mask(entry) -> None:
    torch.manual_seed(0)
    dense = Words().eval()
    entry = {**entry, "target_scopes": ["{re}.*up.*"], "params": {"schedule": "one_shot", "min_channels": 16}}
    loader = [sentences(seed=seed) for seed in range(8)]
    example = {name: loader[0][name][:2] for name in ("words", "mask")}
    left = {**sentences(seed=99)}
    left.pop("labels")
    again = compressed(dense, entry, loader, example)
    assert 16 <= again.up.out_features < 20
    assert error(again, dense, left) < 0.05
    if entry["algorithm"] == "fbnet_pruning":
        entry.pop("initializer")
        assert error(compressed(dense, entry, loader, example), dense, left) > 0.2


@pytest.mark.parametrize(
    ("build", "shape"),
    [(partial(stacked, 1), (2, 40)), (partial(stacked, 3), (2, 4, 8, 8)), (rows, (12,))],
    ids=["1d", "3d", "rows"],
)
def test_sounds_films_and_rows(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    data = randn(256, *shape)
    dense = with_statistics_of(build(), data)
    loader = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in data.split(64)]
    fresh = randn(64, *shape, seed=7)
    plain = error(compressed(dense, {"algorithm": "fbnet_pruning"}, None, data[:2]), dense, fresh)
    for entry, most in (
        ({"algorithm": "fbnet_pruning", "initializer": {"refit": {}}}, 0.75),
        ({"algorithm": "data_free_layerwise", "generation": {"source": "dataset"}}, 0.75),
        ({"algorithm": "data_free_layerwise", "generation": {"samples": 64, "steps": 5}}, 1.0),
    ):
        assert error(compressed(dense, entry, loader, data[:2]), dense, fresh) < most * plain


@pytest.mark.parametrize("shape", [(3, 8, 9), (2, 50), (1, 4, 6, 5), (12,)])
def test_what_is_generated_has_the_shape_and_structure(shape: tuple[int, ...]) -> None:
    made = dead_leaves(32, shape, torch.Generator().manual_seed(0))
    assert made.shape == (32, *shape)
    assert float(made.mean()) == pytest.approx(0, abs=1e-5)
    assert float(made.std()) == pytest.approx(1, abs=1e-5)
    places = range(1 if len(shape) == 1 else 2, made.dim())
    assert all(float(made.diff(dim=dim).square().mean()) < 1.5 for dim in places)  # of noise it is 2


# -- batches of a loader -----------------------------------------------------------------------------------------------


def found(batches, example, samples: int | None = None) -> LayerInputs:
    model = nn.Linear(2, 2)
    return layer_inputs(model, example, Generation("dataset", samples), iter(batches))


def test_batches_are_joined_example_by_example() -> None:
    batches = [{**sentences(seed=seed, count=5), "table": torch.arange(3)} for seed in range(4)]
    inputs = found(batches, {name: batches[0][name] for name in ("words", "mask", "table")}, samples=12)
    assert len(inputs) == 12
    assert torch.equal(inputs.batch["words"][5:10], batches[1]["words"])
    assert torch.equal(inputs.batch["table"], torch.arange(3))
    parts = list(inputs.split(5))
    assert [len(part["mask"]) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part["mask"] for part in parts]), inputs.batch["mask"])


def test_a_number_in_front_belongs_to_all_examples() -> None:
    batches = [{"step": torch.tensor(3), "x": randn(4, 5, seed=seed)} for seed in range(2)]
    inputs = found(batches, {"step": torch.tensor(3), "x": randn(2, 5)})
    assert len(inputs) == 8
    assert inputs.rows(0, 3)["x"].shape == (3, 5)
    assert int(inputs.rows(0, 3)["step"]) == 3


def test_batches_of_another_shape_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    batches = [sentences(length, seed) for seed, length in enumerate((6, 6, 4, 6))]
    inputs = found(batches, {name: batches[0][name] for name in ("words", "mask")})
    assert len(inputs) == 48
    assert "16 examples of 64 are left out" in caplog.text


def test_the_tensor_that_the_model_takes_is_looked_up_by_name() -> None:
    batch = {"pixel_mask": torch.ones(4, 5), "pixel_values": randn(4, 3, 5)}
    inputs = found([batch], {"pixel_values": randn(1, 3, 5), "return_dict": True})
    assert torch.equal(inputs.batch["pixel_values"], batch["pixel_values"])
    assert inputs.batch["return_dict"] is True
    assert set(inputs.batch) == {"pixel_values", "return_dict"}


def test_batches_without_a_tensor_are_refused() -> None:
    with pytest.raises(DataFreeError, match="the train_loader gives str without a tensor"):
        found(["words"], torch.zeros(1, 3))


def test_words_are_not_generated_and_that_is_said_before_any_work() -> None:
    example = {name: sentences()[name][:2] for name in ("words", "mask")}
    with pytest.raises(DataFreeError, match=r"takes \[2, 6\] int64, \[2, 6\] float32"):
        create_compressed_model(
            Words(), {"compression": {"algorithm": "data_free_quantization"}}, example_inputs=example
        )
    assert SingleInput.of(nn.Linear(3, 4), torch.zeros(2, 3)).shape == (3,)


def test_layers_of_too_many_inputs_are_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MOST_INPUTS", 17)
    layers = refittable(stacked(1).eval(), torch.zeros(2, 2, 8))
    assert layers.left == {"3": "its 48 inputs (channels times taps) are too many for least squares"}
    assert layers.found == ("0", "8")
