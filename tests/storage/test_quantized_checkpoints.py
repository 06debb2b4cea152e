"""A quantized network on disk: what is loaded computes the same, bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.networks import model32
from support.quantizers import QUANTIZATION, quantized
from torch import Tensor, nn

from nncf_compactprune import load_pruned, save_pruned
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_hooks import hook_parameter, hooks
from nncf_compactprune.storage.checkpoint import WEIGHTS_FILE, is_quantized_checkpoint

PRUNING = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.6}, "params": {"schedule": "one_shot", "round_to": 1}}
FEWER_BITS = {"algorithm": "data_free_quantization", "params": {"weight_bits": 4, "activation_bits": 5}}
FEWER_BITS |= {"generation": {"source": "dataset", "samples": 12}}
IMAGES = torch.randn(5, 3, 12, 12)


def content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


class Block(nn.Module):
    """Attention, in front of which SmoothQuant multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        result: Tensor = self.head(x.mean(1))
        return result


CASES: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "quantized": (lambda: model32("residual"), [QUANTIZATION]),
    "pruned and quantized": (lambda: model32("residual"), [PRUNING, QUANTIZATION]),
    "four and five bits, no data needed": (lambda: model32("residual"), [FEWER_BITS]),
    "SmoothQuant": (Block, [{**QUANTIZATION, "params": {"start_epoch": None, "model_type": "transformer"}}]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_computes_the_same(case: str, tmp_path: Path) -> None:
    build, entries = CASES[case]
    torch.manual_seed(0)
    dense = build().eval()
    fresh = build().eval()
    fresh.load_state_dict(dense.state_dict())
    model = quantized(dense, *entries)
    save_pruned(model, tmp_path)
    assert is_quantized_checkpoint(tmp_path)
    loaded = load_pruned(fresh, tmp_path, example_inputs=IMAGES)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert [(one.before, one.operation, one.port) for one in hooks(loaded, shared=True)] == [
        (one.before, one.operation, one.port) for one in hooks(model, shared=True)
    ]
    save_pruned(loaded, tmp_path / "again")
    (header, tensors), (same_header, same) = (
        content(folder / WEIGHTS_FILE) for folder in (tmp_path, tmp_path / "again")
    )
    assert (header, tensors.keys()) == (same_header, same.keys())
    assert all(torch.equal(tensors[key], same[key]) for key in tensors)


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pruned(quantized(model32("residual"), QUANTIZATION), tmp_path_factory.mktemp("saved"))


def test_smooth_quant_is_in_the_case_that_names_it() -> None:
    kinds = {type(one.module).__name__ for one in hooks(quantized(Block().eval(), *CASES["SmoothQuant"][1]))}
    assert kinds == {"StoredQuantizer", "SQMultiply"}


def test_other_hooks_are_no_part_of_it(tmp_path: Path) -> None:
    model = quantized(model32("residual"), QUANTIZATION)
    hook_parameter(model, "fc.weight", nn.Identity())
    with pytest.raises(CompactPruneError, match=r"carries NNCF hooks .*Strip it first"):
        save_pruned(model, tmp_path)
    assert not list(tmp_path.iterdir())


def place(said: dict[str, Any], at: int, value: Any) -> None:
    said["places"][0][at] = value


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "a place of no module": lambda said, _: place(said, 0, 99),
    "a place that is no operation": lambda said, _: place(said, 2, 7),
    "a place with a word for a port": lambda said, _: place(said, 3, "1"),
    "a missing option": lambda said, _: said["modules"][0].pop("bits"),
    "no modules": lambda said, _: said.pop("modules"),
    "another shape": lambda _, tensors: tensors.update({"__nncf_hooks.0.scale": torch.ones(3, 2)}),
    "a missing tensor": lambda _, tensors: tensors.pop("__nncf_hooks.0.zero_point"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_quantizers_are_refused_and_the_model_is_as_it_was(name: str, saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path, dirs_exist_ok=True)) / WEIGHTS_FILE
    header, tensors = content(path)
    said = json.loads(header["quantizers"])
    FORGERIES[name](said, tensors)
    save_file(tensors, path, {**header, "quantizers": json.dumps(said)})
    model = model32("residual")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CompactPruneError, match="what it says of its quantizers does not fit together"):
        load_pruned(model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_names_of_hooks_mean_nothing_where_no_header_says_so(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path, dirs_exist_ok=True)) / WEIGHTS_FILE
    header, tensors = content(path)
    del header["quantizers"]
    save_file(tensors, path, header)
    with pytest.raises(CompactPruneError, match="Tensors unknown: '__nncf_hooks"):
        load_pruned(model32("residual"), tmp_path)
