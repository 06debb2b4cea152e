"""Rotated streams: the network computes the same, few channels hold nearly all, and the cut takes the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nncf_compactprune import create_compressed_model, load_pruned, prune, rotate, save_pruned
from nncf_compactprune.algorithms.rotation import rotate as carried_out
from nncf_compactprune.algorithms.rotation.basis import helmert
from nncf_compactprune.algorithms.rotation.rotate import Rotation
from nncf_compactprune.algorithms.rotation.streams import streams_of
from nncf_compactprune.errors import BudgetError, ConfigError, DataError, NothingPrunableError, SelfCheckError

WIDTH = 16
WORDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(n)) for n in range(1, 9)]


class RMSNorm(nn.Module):
    """Llama's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-9))


class PlusOne(RMSNorm):
    """Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * (x / (x * x).mean(-1, keepdim=True).add(1e-9).sqrt())


class LayerNorm(nn.LayerNorm):
    """With a weight and a bias as training makes them, zeros among the weights."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-9)
        self.weight.data = torch.rand(width) * (torch.arange(width) > 1)
        self.bias.data = torch.randn(width)


def plain(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-9)


class Blocks(nn.Module):
    """A stream that two blocks add to: words and places make it, a head without a bias reads it."""

    def __init__(self, norm: Callable[[int], nn.Module], *, rank: int = WIDTH, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, WIDTH), nn.Parameter(torch.randn(9, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 24, bias=bool(n)) for n in range(2))
        self.narrow = nn.ModuleList(nn.Linear(24, WIDTH, bias=bool(n)) for n in range(2))
        self.head = nn.Linear(WIDTH, 40, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.double()
        room = torch.linalg.qr(torch.randn(WIDTH, rank, dtype=torch.float64)).Q  # the stream never leaves it
        with torch.no_grad():
            for written in (self.words.weight, self.places, self.narrow[1].bias):
                written.copy_(written @ room @ room.T)
            for layer in self.narrow:
                layer.weight.copy_(room @ room.T @ layer.weight)
        self.eval()

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=False):
            x = x + narrow(wide(norm(x)).relu())
        return self.head(self.norms[2](x))


NORMS = {"RMSNorm": RMSNorm, "1 + weight": PlusOne, "nn.RMSNorm": plain, "LayerNorm": LayerNorm}


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Callable[[int], nn.Module]:
    return NORMS[request.param]


def loader() -> list[tuple[Tensor, None]]:
    return [(batch, None) for batch in BATCHES]


def to_width(width: int, hidden: int = 24) -> dict[str, Any]:
    """Options of ``prune`` that make the stream so wide, and what is between two layers of a block."""

    def allocation(problem: Any, scores: Any) -> Any:
        return np.where(np.asarray(problem.sizes) == WIDTH, float(width), float(hidden))

    return {"allocation": allocation, "budget": {"params": 1.0}, "round_to": 1, "allow_approximate": True}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(batch)[:2] for batch in BATCHES])


def distance(model: nn.Module, expected: Tensor) -> float:
    return float((outputs(model) - expected).norm() / expected.norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rotated_network_computes_the_same_in_another_basis(norm: Callable[[int], nn.Module]) -> None:
    model = Blocks(norm)
    before, expected = state(model), outputs(model)
    found = rotate(model, WORDS, BATCHES)
    assert (found.error < 1e-12) & (distance(model, expected) < 1e-12)
    assert [stream.name for stream in found.streams] == ["words"]
    assert not found.refused
    assert not torch.allclose(model.words.weight, before["words.weight"])
    assert all((one.weight + isinstance(one, PlusOne) == 1).all() for one in model.norms)
    (stream,) = found.streams
    assert (stream.scores.diff() < 0).all()
    assert "'words' (16 channels), error" in str(found)


def test_channels_hold_what_their_scores_say() -> None:
    model = Blocks(plain)
    (stream,) = rotate(model, WORDS, BATCHES).streams
    seen: list[Tensor] = []
    for one in model.norms:
        one.register_forward_hook(lambda module, args, out: seen.append(out))
    outputs(model)
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    share = torch.stack([x.flatten(0, 1).square().mean(0) for x in seen]).mean(0)
    torch.testing.assert_close((share / share.sum()).sqrt(), stream.scores, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("rank", [6, 11])
def test_directions_that_are_empty_go_without_a_trace(norm: Callable[[int], nn.Module], rank: int) -> None:
    model = Blocks(norm, rank=rank)
    expected = outputs(model)
    left = rank + (norm is LayerNorm)  # whose mean takes one
    by_size = copy.deepcopy(model)
    result = prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, **to_width(left))
    assert model.head.in_features == left
    assert result.self_check.error < 1e-5
    assert distance(model, expected) < 1e-6
    prune(by_size, WORDS, **to_width(left))
    assert distance(by_size, expected) > 0.1


def test_what_is_empty_inside_the_blocks_goes_along(norm: Callable[[int], nn.Module]) -> None:
    model = Blocks(norm, rank=6)
    for layer in model.wide:
        layer.weight.data[12:] = 0
    model.wide[1].bias.data[12:] = 0
    expected = outputs(model)
    prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, **to_width(7, hidden=12))
    assert (model.head.in_features, model.wide[0].out_features) == (7, 12)
    assert distance(model, expected) < 1e-6


def test_without_the_factors_of_norms_something_is_lost(norm, monkeypatch) -> None:
    monkeypatch.setattr(carried_out.RotatedModel, "rescale", lambda *_: None)
    model = Blocks(norm, rank=6)
    expected = outputs(model)
    prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, **to_width(7))
    assert distance(model, expected) > 1e-2


@pytest.mark.parametrize("width", [14, 10])
def test_rotated_first_the_cut_loses_less_than_by_magnitude(norm: Callable[[int], nn.Module], width: int) -> None:
    lost = []
    for initializer in (None, {"rotate": {}}, {"rotate": {}, "refit": {"num_samples": 64}}):
        model = Blocks(norm)
        expected = outputs(model)
        prune(model, WORDS, train_loader=loader(), initializer=initializer, **to_width(width))
        lost.append(distance(model, expected))
    assert lost[1] < 0.8 * lost[0]
    assert lost[2] < lost[1]


def test_a_checkpoint_holds_a_rotated_network(tmp_path: Any, norm: Callable[[int], nn.Module]) -> None:
    model = Blocks(norm)
    prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, **to_width(10))
    save_pruned(model, tmp_path)
    again = load_pruned(lambda: Blocks(norm), tmp_path, example_inputs=WORDS)
    assert torch.equal(outputs(again), outputs(model))


def test_a_config_rotates_says_so_and_copies_follow() -> None:
    model = Blocks(RMSNorm)
    params = {"schedule": "one_shot", "round_to": 1, "allow_approximate": True}
    entry = {"algorithm": "fbnet_pruning", "budget": {"params": 0.7}, "params": params, "initializer": {"rotate": {}}}
    ctrl, _ = create_compressed_model(model, {"compression": entry}, loader(), example_inputs=WORDS)
    assert "'words' (16 channels), error" in ctrl.statistics().to_str()

    model = Blocks(RMSNorm)
    ema, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(WORDS).square().mean().backward()
    optimizer.step()
    rotate(model, WORDS, BATCHES, optimizer=optimizer, ema=ema)
    assert same(ema, state(model))
    assert model.words.weight not in optimizer.state
    prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, ema=ema, **to_width(10))
    assert torch.equal(outputs(ema), outputs(model))


# -- what cannot be rotated ------------------------------------------------------------------------------------------


def test_tied_weights_are_refused_where_a_norm_would_go_into_one_of_them() -> None:
    model = Blocks(RMSNorm, tied=True)
    before = state(model)
    with pytest.raises(NothingPrunableError, match=r"'words.weight' makes the stream and reads it, behind the norm of"):
        rotate(model, WORDS, BATCHES)
    assert same(model, before)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # as the message says
    assert rotate(model, WORDS, BATCHES).error < 1e-12
    model = Blocks(RMSNorm, tied=True)
    model.norms[2].weight.data.fill_(0.7)
    expected = outputs(model)
    rotate(model, WORDS, BATCHES)
    assert model.head.weight is model.words.weight
    assert (distance(model, expected) < 1e-12) & bool((model.norms[2].weight == 0.7).all())


class Changed(Blocks):
    """With something in the stream."""

    def __init__(self, change: Callable[[Changed, Tensor], Tensor]) -> None:
        super().__init__(RMSNorm)
        self.change, self.scale = change, nn.Parameter(torch.rand(WIDTH).double())
        self.halves = nn.Linear(WIDTH // 2, WIDTH, bias=False).double()
        self.register_buffer("table", torch.randn(9, WIDTH).double(), persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norms[2](self.change(self, self.words(words) + self.places)))


CHANGES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an activation": (lambda m, x: x.relu(), "aten.relu does not commute with a rotation"),
    "layer scale": (lambda m, x: x + m.scale * m.norms[0](x), "scales by .* what '.*' has scaled"),
    "scaled and added": (lambda m, x: x + m.norms[0](x), "adds what 'norms.0.weight' has scaled to the stream"),
    "one number": (lambda m, x: x + 1.0, "adds the same to every channel"),
    "product": (lambda m, x: x * x.roll(1, 1), "multiplies two streams channel by channel|does not commute"),
    "mean": (lambda m, x: x - x.mean(-1, keepdim=True), "as the mean of a LayerNorm that is written out"),
    "attention": (lambda m, x: x + (x @ x.mT).softmax(-1) @ x, "multiplies two streams with each other|another way"),
    "cube": (lambda m, x: x.pow(3), "aten.pow does not commute"),
    "division": (lambda m, x: 1 / x, "does not commute|divides by the channels"),
    "a table that no checkpoint holds": (lambda m, x: x + m.table, "'table' is a buffer that no checkpoint holds"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_commute_is_told(name: str) -> None:
    change, reason = CHANGES[name]
    model = Changed(change)
    before = state(model)
    with pytest.raises(NothingPrunableError, match=reason):
        rotate(model, WORDS, BATCHES)
    assert same(model, before)


def test_a_network_without_norms_over_channels_is_told_what_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(NothingPrunableError, match="no stream of Sequential can be rotated"):
        rotate(model, torch.randn(2, 4), [torch.randn(2, 4)])


def test_a_matrix_that_is_no_rotation_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = carried_out.measured

    def wrong(*args: Any) -> Any:
        return [replace(basis, matrix=basis.matrix * 1.001) for basis in real(*args)]

    monkeypatch.setattr(carried_out, "measured", wrong)
    model = Blocks(RMSNorm)
    model.norms[0] = nn.Identity()  # a norm would take a wrong size away again
    before = state(model)
    with pytest.raises(SelfCheckError, match="the rotated Blocks differs from the given one by"):
        rotate(model, WORDS, BATCHES)
    assert same(model, before)


def test_what_cannot_be_cut_is_not_rotated() -> None:
    model = Blocks(RMSNorm)
    before = state(model)
    with pytest.raises(BudgetError):
        prune(model, WORDS, train_loader=loader(), initializer={"rotate": {}}, allow_approximate=True,
              budget={"params": 0.01})  # fmt: skip
    assert same(model, before)


def test_batches_are_needed_that_take_the_same_way() -> None:
    with pytest.raises(DataError, match="expected at least one batch"):
        rotate(Blocks(RMSNorm), WORDS, [])
    with pytest.raises(DataError, match="no train_loader was given"):
        prune(Blocks(RMSNorm), WORDS, initializer={"rotate": {}}, **to_width(10))

    class Early(Blocks):
        def forward(self, words: Tensor) -> Tensor:
            x = self.words(words)
            return self.head(x) if len(words) == 4 else self.head(self.norms[2](x))

    with pytest.raises(DataError, match="takes other norms on batch 1 than on the example input"):
        rotate(Early(RMSNorm), WORDS, BATCHES)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, '"allow_approximate": true, or leave out'),
        ({"allow_approximate": True, "schedule": "exponential"}, 'params "schedule": "one_shot"'),
    ],
)
def test_a_rotation_without_a_cut_of_streams_is_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prune(Blocks(RMSNorm), WORDS, budget={"params": 0.7}, initializer={"rotate": {}}, **params)


def test_helmerts_rows() -> None:
    rows = helmert(6)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(rows.sum(1), torch.zeros(5, dtype=torch.float64))
    assert (rows.triu(2) == 0).all()
    left = rows[3:, :4]  # of those that reach behind position 3, one number is left
    torch.testing.assert_close(left, left[:, :1].expand(2, 4))


# -- as transformers writes them -------------------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "use_cache": False}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
OF_TRANSFORMERS = {
    "Llama": {**SIZES, **HEADS},
    "Qwen3": {**SIZES, **HEADS, "head_dim": 8},
    "Gemma": {**SIZES, **HEADS, "head_dim": 8},
    "Mixtral": {**SIZES, **HEADS, "num_local_experts": 4},
    "GPTNeoX": {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 32},
    "GPT2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False,
             "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_language_models_of_transformers(name: str) -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(hf, f"{name}Config")(**OF_TRANSFORMERS[name], tie_word_embeddings=False)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    words = {"input_ids": WORDS}
    with torch.no_grad():
        expected = model(**words).logits
    found = rotate(model, words, [{"input_ids": batch} for batch in BATCHES])
    assert isinstance(found, Rotation)
    assert len(found.streams) == 1
    assert found.error < (1e-5 if name == "Mixtral" else 1e-10)  # whose products of groups know no float64
    with torch.no_grad():
        torch.testing.assert_close(model(**words).logits, expected, rtol=1e-4, atol=1e-5)


def test_reasons_name_what_is_in_the_way() -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    model = hf.LlamaModel(hf.LlamaConfig(**SIZES, **HEADS))
    streams, refused = streams_of(model, {"input_ids": WORDS})
    assert not streams
    assert refused["embed_tokens"] == "its 32 channels stay: model output"
