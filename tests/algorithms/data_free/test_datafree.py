"""The parts of data-free compression against formulas, brute force and laws."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.data_free import calls_of, randn, state, unchanged, with_statistics_of
from support.networks import conv_bn, images, trained
from torch import nn

from nncf_compactprune.algorithms.data_free import (
    Generation,
    Inversion,
    LayerInputs,
    Reconstruction,
    SingleInput,
    gram,
    layer_inputs,
    least_squares,
    sources,
)
from nncf_compactprune.algorithms.data_free.generation import dead_leaves, invert, labels_in_turn, statistics_loss
from nncf_compactprune.algorithms.data_free.gram import Moments, Sums
from nncf_compactprune.algorithms.data_free.importance import Consumer, surgeon_scores
from nncf_compactprune.algorithms.data_free.network import batch_norms
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.pacing import Paced
from nncf_compactprune.algorithms.data_free.reconstruction import relative_error, solve
from nncf_compactprune.algorithms.data_free.resampling import resampling
from nncf_compactprune.algorithms.data_free.rounding import round_in_turn, rounded, search_scales
from nncf_compactprune.algorithms.data_free.thinning import shares, sparsify
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.tensors import named_modules

X = images(torch.float32)


# -- generation --------------------------------------------------------------------------------------------------------


def test_statistics_loss_is_zero_on_its_own_batch_and_free_of_scale() -> None:
    norm, x = nn.BatchNorm2d(3, eps=0.0), randn(8, 3, 5, 5)
    norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    assert float(statistics_loss(x, norm)) < 1e-10
    other = randn(8, 3, 5, 5, seed=1) * 2 + 1
    loss = float(statistics_loss(other, norm))
    norm.running_mean, norm.running_var = norm.running_mean * 10, norm.running_var * 100
    assert float(statistics_loss(other * 10, norm)) == pytest.approx(loss, rel=1e-4)


def test_inversion_brings_the_statistics_nearer_and_leaves_the_model_alone() -> None:
    model = with_statistics_of(trained("residual", dtype=torch.float32), F.avg_pool2d(randn(64, 3, 24, 24), 2) * 3)
    before, network = state(model.train()), SingleInput.of(model, X)
    start = dead_leaves(32, network.shape, torch.Generator().manual_seed(0))

    def distance(x: torch.Tensor) -> float:
        terms: list[float] = []
        handles = [
            norm.register_forward_pre_hook(lambda m, args: terms.append(float(statistics_loss(args[0], m))))
            for norm in batch_norms(model).values()
        ]
        with evaluating(model):
            model(x)
        for handle in handles:
            handle.remove()
        return sum(terms)

    made = invert(model, network, start, Inversion(steps=15))
    assert distance(made) < 0.5 * distance(start)
    assert unchanged(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_few_images_are_of_classes_from_all_over() -> None:
    labels = labels_in_turn(1500, 1000, torch.Generator().manual_seed(0))
    assert sorted(labels[:1000].tolist()) == list(range(1000))
    assert len(set(labels[1000:].tolist())) == 500
    assert labels[:32].max() > 500


def test_resampled_rows_are_drawn_from_gamma_and_beta_and_cut_copies_see_the_same() -> None:
    model = conv_bn(3, 6).eval()
    norm = model[1]
    norm.weight.data, norm.bias.data = torch.linspace(0.5, 3, 6), torch.linspace(-2, 2, 6)
    x = randn(200, 3, 8, 8)
    with torch.no_grad(), resampling(model, 150, {}):
        drawn = norm(model[0](x))
    assert torch.equal(drawn[:50], norm(model[0](x))[:50])
    assert torch.allclose(drawn[50:].mean((0, 2, 3)), norm.bias, atol=0.15)
    assert torch.allclose(drawn[50:].std((0, 2, 3)), norm.weight, rtol=0.05)
    cut, kept = copy.deepcopy(model), torch.tensor([1, 4])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(cut[1], name).data = getattr(cut[1], name).data[kept]
    with torch.no_grad(), resampling(cut, 150, {"1.running_mean": {0: kept}}):
        assert torch.equal(cut[1](model[0](x)[:, kept])[50:], drawn[50:, kept])


def test_a_killed_generation_goes_on_from_its_cache(tmp_path, monkeypatch) -> None:
    model = trained("plain", dtype=torch.float32)
    settings = Generation(samples=24, inversion=Inversion(steps=2), cache=str(tmp_path / "images.safetensors"))
    monkeypatch.setattr(sources, "BATCH", 8)
    monkeypatch.setattr(sources, "LEAST_BATCH", 8)
    whole = layer_inputs(model, X, Generation(samples=24, inversion=Inversion(steps=2)))
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return invert(*args, **kwargs)

    monkeypatch.setattr(sources, "invert", dying)
    with pytest.raises(KeyboardInterrupt):
        layer_inputs(model, X, settings)
    assert torch.equal(layer_inputs(model, X, settings).batch, whole.batch)
    assert len(calls) == 4
    model.head.bias.data += 1
    layer_inputs(model, X, settings)  # other weights: the cache does not count
    assert len(calls) == 7


def test_what_cannot_work_is_refused_and_the_model_is_untouched() -> None:
    model = trained("plain", dtype=torch.float32)
    fresh = copy.deepcopy(model)
    for norm in batch_norms(fresh).values():
        norm.reset_running_stats()
    with pytest.raises(DataFreeError, match=r"all 3 BatchNorms have the statistics of an untrained network"):
        layer_inputs(fresh, X, Generation())
    broken = copy.deepcopy(model)
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(DataFreeError, match=r"'head.weight': 1 of 80 values are NaN or infinite"):
        layer_inputs(broken, X, Generation())
    without = copy.deepcopy(model)
    without.features[0][1] = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(DataFreeError, match=r"'features.0.1': BatchNorm without running statistics"):
        layer_inputs(without, X, Generation())
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(DataFreeError, match=r"Sequential has no BatchNorm to draw from"):
        layer_inputs(bare, X, Generation("bn_sampling"))
    with pytest.raises(DataFreeError, match=r"neither BatchNorm statistics nor class scores"):
        layer_inputs(bare[:1], X, Generation())
    with pytest.raises(DataFreeError, match=r'"dataset", but no train_loader'):
        layer_inputs(model, X, Generation("dataset"))
    with pytest.raises(DataFreeError, match=r"one floating tensor .* takes \[2, 3\] int64, \[2, 3\] float32"):
        layer_inputs(model, (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), Generation())


def test_a_classifier_without_batch_norm_is_inverted_from_its_classes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    network = SingleInput.of(net, X)
    made = layer_inputs(net, X, Generation(samples=16, inversion=Inversion(steps=30, class_weight=1.0)))
    start = dead_leaves(16, network.shape, torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 4
    assert F.cross_entropy(net(made.batch), labels) < F.cross_entropy(net(start), labels)


# -- moments, least squares, importance --------------------------------------------------------------------------------


def moments_of(layer: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[Moments, torch.Tensor]:
    """Moments of a layer as it runs, and its weight as rows."""
    (call,) = calls_of(layer, x)
    y = call.run(call.weight, call.bias) if y is None else y
    rows = call.operation.rows(call.weight)
    sums = Sums(call.operation, len(call.input))
    sums.add(call.input, y.detach())
    return sums.moments(rows), rows


LAYERS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(2, 0), bias=False),
    nn.Conv2d(4, 8, 3, groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=2),
    nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2),
    nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=1),
    nn.ConvTranspose1d(4, 6, 3, stride=3),
    nn.ConvTranspose2d(4, 6, (4, 3), stride=2, padding=1, output_padding=(1, 0)),
    nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=3, groups=2),
    nn.ConvTranspose3d(4, 4, 2, groups=4, bias=False),
    nn.Linear(5, 3),
]
PLACES = {nn.Conv1d: (9,), nn.ConvTranspose1d: (9,), nn.Conv3d: (5, 6, 7), nn.ConvTranspose3d: (3, 4, 3)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch says that it is slow
@pytest.mark.parametrize("layer", LAYERS, ids=lambda m: str(m)[:80])
def test_moments_are_those_of_the_layer_whatever_the_chunks(layer: nn.Module, monkeypatch) -> None:
    """The layer's output is linear in its patches, so every moment of it follows from the inputs' and the weight."""
    linear = isinstance(layer, nn.Linear)
    x = randn(7, 11, 5) if linear else randn(7, 4, *PLACES.get(type(layer), (9, 8)))
    with torch.no_grad():
        y = layer(x)
    whole, rows = moments_of(layer, x)
    monkeypatch.setattr(gram, "CHUNK_ELEMENTS", 1)
    parts, _ = moments_of(layer, x)
    flat = y.double().reshape(-1, 3) if linear else y.double().movedim(1, -1).reshape(-1, y.shape[1])
    assert torch.allclose(whole.inputs, parts.inputs, atol=1e-5)
    assert whole.rows == parts.rows == len(flat)
    assert torch.allclose(whole.inputs @ rows.transpose(1, 2), whole.cross, atol=1e-5)
    assert relative_error(rows, whole) < 1e-5
    assert torch.allclose(whole.energy.ravel(), flat.var(0, unbiased=False), atol=1e-5)
    assert torch.allclose(whole.mean_out.ravel(), flat.mean(0), atol=1e-5)
    offset = 0 if layer.bias is None else layer.bias.double()
    assert torch.allclose((rows @ whole.mean_in.unsqueeze(2)).ravel() + offset, flat.mean(0), atol=1e-5)
    assert torch.equal(whole.operation.weight(rows).float(), layer.weight)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


def test_padding_means_the_same_wherever_it_is_written() -> None:
    plain, x = nn.Conv2d(4, 6, 3, padding=1), randn(5, 4, 9, 8)
    inside, word, outside = PadsItself(4, 6, 3), nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, 3)
    expected, _ = moments_of(plain, x)
    for layer in (inside, word, outside):
        layer.load_state_dict(plain.state_dict())
        found, _ = moments_of(nn.Sequential(nn.ZeroPad2d(1), layer) if layer is outside else layer, x)
        for name in ("inputs", "cross", "energy", "mean_in", "mean_out"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


class Odd(nn.Module):
    """Layers that can be re-fitted beside layers that cannot, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3)
        self.functional = nn.Conv2d(4, 4, 1)  # never called, its weight is used all the same
        self.twice = nn.Conv2d(4, 4, 1)
        self.tied, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other.weight = self.tied.weight
        self.never = nn.Conv2d(4, 4, 1)
        self.standardised = nn.Conv2d(4, 4, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.apart = nn.Linear(4, 4)
        self.kernel = nn.Parameter(randn(4, 4, 1, 1))
        self.attention, self.steps, self.pairs = nn.MultiheadAttention(4, 2), nn.GRU(4, 4), nn.Bilinear(4, 4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.conv2d(self.plain(x), self.functional.weight, self.functional.bias)
        x = self.other(self.tied(self.twice(self.twice(x))))
        weight = self.standardised.weight
        x = self.normed(F.conv2d(x, weight - weight.mean(), self.standardised.bias))
        x = F.conv2d(x, self.kernel).mean((2, 3))
        x = self.pairs(x, self.steps(x + self.attention(x, x, x, need_weights=False)[0])[0])
        return self.head(F.linear(x, self.apart.weight) + self.apart.bias)


def test_what_cannot_be_refitted_is_left_and_named(caplog) -> None:
    model = Odd().eval()
    found = refittable(model, X)
    assert found.found == ("plain", "functional", "head")
    assert {name: reason.split(",")[0] for name, reason in found.left.items()} == {
        "twice": "its weight is used 2 times",
        "tied": "its weight is used 2 times",
        "other": "its weight is used 2 times",
        "never": "it does not run",
        "standardised": "it does not run",
        "normed": "its weight is computed from other parameters",
        "apart": "its bias is added apart",
        "kernel": "it is a weight of 'Odd' under a name of its own",
        "attention": "MultiheadAttention is no single convolution or linear map",
        "attention.out_proj": "it does not run",
        "steps": "GRU is no single convolution or linear map",
        "pairs": "Bilinear is no single convolution or linear map",
    }
    before, dense = state(model), copy.deepcopy(model)
    model.functional.weight.data += 1
    run = Reconstruction(dense, model, LayerInputs(randn(32, 3, 12, 12)), step=least_squares(1e-6))
    with evaluating(model, changes=True), evaluating(dense):
        refits = run.run()
    assert [r.name for r in refits] == list(found.found)
    assert run.left == found.left
    with torch.no_grad():
        assert torch.allclose(model(X), dense(X), atol=1e-3)  # the layer that was spoilt came back
    after = model.state_dict()
    left = [name for name in before if name.rpartition(".")[0] not in found.found]
    assert left
    assert all(torch.equal(after[name], before[name]) for name in left)
    assert "'apart': its bias is added apart" in caplog.text


def test_solve_is_ridge_regression() -> None:
    layer, x, y = nn.Linear(6, 3), randn(50, 6), randn(50, 3, seed=1)
    (found, prior), ridge = moments_of(layer, x, y), 0.2
    found.doubt = found.chance = 0.0
    xc, yc = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    strength = ridge * xc.square().mean()
    left = torch.cat([xc / 50**0.5, strength.sqrt() * torch.eye(6, dtype=torch.float64)])
    right = torch.cat([yc / 50**0.5, strength.sqrt() * prior[0].T])
    assert torch.allclose(solve(prior, found, ridge)[0].T, torch.linalg.lstsq(left, right).solution, atol=1e-6)
    assert torch.allclose(solve(prior, found, 1e9), prior, atol=1e-6)


def test_what_few_images_say_of_many_channels_is_doubted() -> None:
    layer = nn.Linear(64, 8)
    few, _ = moments_of(layer, randn(32, 64))
    many, _ = moments_of(layer, randn(8192, 64))
    assert few.doubt > 0.9
    assert many.doubt > 0.9  # independent inputs: all that is seen of their correlations is chance, however little
    shared = randn(8192, 1) + randn(8192, 64)
    assert moments_of(layer, shared)[0].doubt < 0.01
    # 32 images of equal places are 32 examples, whatever the number of places
    convolution = nn.Conv2d(64, 8, 1)
    flat = randn(32, 64, 1, 1).expand(32, 64, 9, 9)
    assert moments_of(convolution, flat)[0].doubt > 0.9
    assert moments_of(layer, randn(1, 64))[0].doubt == 0  # nothing to hold it against


def test_few_images_do_not_make_channels_look_redundant() -> None:
    layer = nn.Linear(64, 8)
    found, rows = moments_of(layer, randn(32, 64))
    columns = np.arange(64)[:, None]
    taken_at_its_word = surgeon_scores([Consumer(rows, found.inputs, columns, 1.0)], 1e-3)
    doubted = surgeon_scores([Consumer(rows, found.trusted, columns, 1.0)], 1e-3)
    alone = rows.square().sum((0, 1))  # of independent inputs with variance 1, a channel loses what it gives
    assert int((taken_at_its_word < 0.01 * alone).sum()) >= 30
    assert bool((doubted > 0.3 * alone).all())


def test_solve_learns_nothing_that_only_few_images_say() -> None:
    layer = nn.Linear(64, 8)
    x, more = randn(32, 64), randn(512, 64, seed=1)
    found, prior = moments_of(layer, x, layer(x) + randn(32, 8, seed=2))
    assert found.chance > 0.9
    fitted = solve(prior, found, 0.03)
    moved = (more.double() @ (fitted - prior)[0].T).square().mean()
    found.doubt = found.chance = 0.0
    at_its_word = (more.double() @ (solve(prior, found, 0.03) - prior)[0].T).square().mean()
    assert float(moved) < 0.05 * float(at_its_word)
    # what every image says is learned, though inputs are independent
    halved, prior = moments_of(layer, more / 2, layer(more))
    assert halved.doubt > 0.9
    assert halved.chance < 0.2


def test_surgeon_scores_are_what_refitting_leaves() -> None:
    layer, x = nn.Linear(5, 4), randn(200, 5).double()
    x[:, 3] = 0.7 * x[:, 0] + 0.01 * randn(200, seed=1)  # 3 repeats 0
    found, rows = moments_of(layer, x.float())
    consumer = Consumer(rows, found.inputs, np.arange(5)[:, None], 1.0)
    scores = surgeon_scores([consumer], 1e-9)
    first = int(scores.argmin())
    assert first in (0, 3)
    twin = 3 - first
    assert scores[twin] > 50 * scores[first]  # once one is gone, the other is needed
    losses = []
    for gone in range(5):
        rest = [k for k in range(5) if k != gone]
        h = found.inputs[0]
        w = rows[0]
        left_over = h[gone, gone] - h[gone, rest] @ torch.linalg.solve(h[rest][:, rest], h[rest, gone])
        losses.append((left_over * w[:, gone].square().sum()).item())
    assert float(scores[first]) == pytest.approx(min(losses), rel=1e-4)


# -- two runs in step --------------------------------------------------------------------------------------------------


def test_a_run_is_met_layer_by_layer_and_its_thread_ends() -> None:
    model = conv_bn(3, 4).eval()
    x, threads = randn(2, 3, 6, 6), threading.active_count()
    expected = model[0](x)
    with Paced(model, lambda m: m(x), {id(model[0].weight): "0"}, {"1"}) as run:
        met = run.meet("0").output
        assert met is not None
        assert torch.equal(met, expected)
        with pytest.raises(RuntimeError, match="'0' runs in one model where the other runs '1'"):
            run.meet("0")
        with pytest.raises(RuntimeError, match="'2' runs in one model where the other ends"):
            run.meet("2")
    assert threading.active_count() == threads
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_run_reaches_the_caller() -> None:
    model = conv_bn(3, 4).eval()
    with (
        Paced(model, lambda m: m(randn(2, 5, 6, 6)), {}, {"1"}) as run,
        pytest.raises(RuntimeError, match="5 channels"),
    ):
        run.meet("1")


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "grouped", "squeeze_excite", "flatten", "tied"])
@pytest.mark.parametrize("resampled", [0, 16])
def test_reconstructing_what_was_not_compressed_changes_nothing(name: str, resampled: int) -> None:
    dense = trained(name, dtype=torch.float32)
    model = copy.deepcopy(dense)
    inputs = LayerInputs(randn(32, 3, 12, 12), resampled)
    with evaluating(model, changes=True), evaluating(dense):
        refits = Reconstruction(dense, model, inputs, step=least_squares(0.01)).run()
        assert refits
        assert max(r.after for r in refits) < 1e-6
        expected, got = dense(X), model(X)
    assert (expected - got).abs().max() / expected.abs().max() < 1e-3


def test_batch_norm_statistics_follow_a_change_of_the_layer_before() -> None:
    dense = trained("plain", dtype=torch.float32)
    model = copy.deepcopy(dense)
    conv = model.features[0][0]
    scale = torch.linspace(0.5, 2, 16)
    conv.weight.data *= scale.view(-1, 1, 1, 1)
    with evaluating(model, changes=True), evaluating(dense):
        Reconstruction(dense, model, LayerInputs(randn(64, 3, 12, 12))).run()
        assert torch.allclose(dense(X), model(X), atol=2e-3)
    assert torch.allclose(model.features[0][1].running_var, dense.features[0][1].running_var * scale**2, rtol=1e-3)


# -- rounding and zeros ------------------------------------------------------------------------------------------------


def correlated(d: int) -> torch.Tensor:
    root = randn(d, d).double() + 1.5
    return (root @ root.T / d).unsqueeze(0)


def output_error(w: torch.Tensor, other: torch.Tensor, h: torch.Tensor) -> float:
    return float((((w - other) @ h) * (w - other)).sum())


@pytest.mark.parametrize("high", [7, 127])
def test_rounding_in_turn_stays_on_the_grid_and_beats_nearest(high: int) -> None:
    w, h = randn(1, 12, 20).double(), correlated(20)
    scale = search_scales(w, h, high, per_channel=True)
    result = round_in_turn(w, scale, h, high, 0.01)
    levels = result / scale
    assert torch.allclose(levels, levels.round(), atol=1e-6)
    assert levels.abs().max() <= high + 1e-6
    assert output_error(w, result, h) < output_error(w, rounded(w, scale, high), h)
    plain = (w.abs().amax(2, keepdim=True) / high).float().double()  # what a quantizer stores
    assert output_error(w, rounded(w, scale, high), h) <= output_error(w, rounded(w, plain, high), h)


def test_rounding_with_independent_inputs_is_nearest() -> None:
    w, h = randn(1, 4, 9).double(), torch.eye(9).double().unsqueeze(0)
    scale = search_scales(w, h, 7, per_channel=False)
    assert len(scale.unique()) == 1
    assert torch.allclose(round_in_turn(w, scale, h, 7, 0.01), rounded(w, scale, 7))


def test_sparsify_zeroes_the_share_and_beats_magnitude() -> None:
    w, h = randn(1, 10, 24).double(), correlated(24)
    result = sparsify(w, h, 0.01, ratio=0.5)
    assert int((result == 0).sum()) == 120
    threshold = w.abs().flatten().kthvalue(120).values
    assert output_error(w, result, h) < 0.5 * output_error(w, w * (w.abs() > threshold), h)


def test_two_of_four_has_two_zeros_in_every_four() -> None:
    w, h = randn(2, 6, 16).double(), correlated(16).expand(2, 16, 16)
    result = sparsify(w, h, 0.01, pattern=(2, 4))
    assert bool(((result == 0).view(2, 6, 4, 4).sum(3) == 2).all())
    odd = randn(1, 6, 15).double()
    assert torch.equal(sparsify(odd, correlated(15), 0.01, pattern=(2, 4)), odd)


@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.97])
def test_shares_add_up_over_layers(ratio: float) -> None:
    model = trained("plain", dtype=torch.float32)
    layers = {n: m for n, m in named_modules(model) if isinstance(m, nn.Conv2d)}
    both = {name: moments_of(layer, randn(8, layer.in_channels, 9, 9)) for name, layer in layers.items()}
    found, weights = {name: m for name, (m, _) in both.items()}, {name: rows for name, (_, rows) in both.items()}
    result = shares(weights, found, ratio, 0.01)
    assert all(0 <= r <= 0.98 + 1e-9 for r in result.values())
    total = sum(w.numel() for w in weights.values())
    assert sum(result[n] * weights[n].numel() for n in weights) / total == pytest.approx(ratio, abs=1 / total)
