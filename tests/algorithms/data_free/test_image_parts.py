"""Layers re-fitted on more images than memory has room for at once."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from support.data_free import randn
from support.networks import images, trained
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.data_free import Generation, LayerInputs, Reconstruction
from nncf_compactprune.algorithms.data_free import quantizers as quantizers_module
from nncf_compactprune.algorithms.data_free import reconstruction as reconstruction_module
from nncf_compactprune.algorithms.data_free.gram import Sums, damped
from nncf_compactprune.algorithms.data_free.pacing import Part, parts_of, twin
from nncf_compactprune.algorithms.data_free.quantizers import GridQuantizer
from nncf_compactprune.algorithms.data_free.reconstruction import dense_moments
from nncf_compactprune.host.calls import evaluating

X = images(torch.float32)


def everywhere(*ends):
    """Parts that count at every place."""

    def parts(count, sizes, memory=0):
        return [Part(begin, end, 0, len(sizes) - 1) for begin, end in zip((0, *ends), (*ends, count), strict=True)]

    return parts


def by_the_book(name, rows, found):
    """Ridge least squares that does not look at how halves of the images disagree: what they are depends on parts."""
    right = found.cross - found.inputs @ rows.transpose(1, 2)
    return rows + torch.linalg.solve(damped(found.inputs, 0.01), right).transpose(1, 2)


def refitted(dense, inputs, step=by_the_book):
    """A copy with changed weights, re-fitted."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for at, p in enumerate(model.parameters()):
            p.mul_(1 + 0.3 * randn(*p.shape, seed=at)) if p.dim() > 1 else None
    with evaluating(model, changes=True), evaluating(dense):
        Reconstruction(dense, model, LayerInputs(inputs), step=step).run()
    return model


def test_images_join_where_there_is_room() -> None:
    assert [(p.end, p.first) for p in parts_of(64, [8, 4, 2, 1], 128)] == [(16, 0), (32, 1), (48, 2), (64, 2)]
    assert all(part.last == 3 for part in parts_of(64, [8, 4, 2, 1], 128))
    assert parts_of(64, [1, 1], 1024) == [Part(0, 64, 0, 1)]
    # they leave before it gets narrow again, and the longest stay counts
    assert parts_of(32, [8, 4, 8, 4, 4, 8], 128) == [Part(0, 16, 0, 5), Part(16, 32, 3, 4)]
    # nowhere room for more than the fewest
    assert parts_of(64, [1024], 1) == [Part(0, 16, 0, 0)]
    assert parts_of(5, [1024], 1) == [Part(0, 5, 0, 0)]


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "grouped", "squeeze_excite", "flatten"])
def test_parts_give_what_all_images_at_once_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = trained(name, dtype=torch.float32), randn(40, 3, 12, 12)
    whole = refitted(dense, inputs)
    monkeypatch.setattr(reconstruction_module, "parts_of", everywhere(16, 30))
    parted = refitted(dense, inputs)
    for (key, one), other in zip(whole.state_dict().items(), parted.state_dict().values(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-4), key
    assert not any(m._forward_pre_hooks for m in [*dense.modules(), *parted.modules()])


class Remembering(nn.Module):
    """Keeps something of a run in itself, as many networks do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = x.mean((1, 2, 3)).unsqueeze(1)
        return self.inside(x) + self.mean


def test_parts_do_not_see_what_others_keep_in_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Remembering(trained("plain", dtype=torch.float32)).eval()
    monkeypatch.setattr(reconstruction_module, "parts_of", everywhere(16, 30))
    parted = refitted(dense, randn(40, 3, 12, 12))  # a mean of 16 images added to 14 would be an error
    assert all(torch.isfinite(p).all() for p in parted.parameters())
    assert not hasattr(parted, "mean")


def test_a_twin_has_modules_of_its_own_and_the_same_tensors() -> None:
    model = trained("residual", dtype=torch.float32)
    other = twin(model)
    tensors = dict(model.state_dict(keep_vars=True))
    assert all(tensor is tensors[name] for name, tensor in other.state_dict(keep_vars=True).items())
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}


def test_later_layers_see_more_images_and_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = trained("plain", dtype=torch.float32), randn(60, 3, 12, 12)
    seen: Counter[tuple[int, ...]] = Counter()
    monkeypatch.setattr(Sums, "__init__", _counting(Sums.__init__, seen))
    sizes: list[list[int]] = []

    def parts(count, found):
        sizes.append(found)
        return parts_of(count, found, 20 * max(found))

    monkeypatch.setattr(reconstruction_module, "parts_of", parts)
    refitted(dense, inputs)
    counts = list(seen.values())
    assert counts[0] <= 20
    assert counts[-1] == 60
    assert counts == sorted(counts)
    assert max(sizes[0]) > 4 * min(sizes[0])


def _counting(init, seen):
    def counting(self, operation, count):
        seen[operation.shape] += count
        init(self, operation, count)

    return counting


def test_moments_of_a_dense_model_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = trained("plain", dtype=torch.float32), LayerInputs(randn(40, 3, 12, 12))
    names = [name for name, module in dense.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    with evaluating(dense):
        whole = dense_moments(dense, inputs, names)
        monkeypatch.setattr(reconstruction_module, "room_for", lambda size: 16)
        parted = dense_moments(dense, inputs, names)
    for name in names:
        assert whole[name].rows == parted[name].rows
        assert torch.allclose(whole[name].inputs, parted[name].inputs, rtol=1e-4, atol=1e-6)
        assert torch.allclose(whole[name].cross, parted[name].cross, rtol=1e-4, atol=1e-6)


def test_models_with_hooks_run_on_all_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: Counter[int] = Counter()
    search = quantizers_module.search_range
    monkeypatch.setattr(quantizers_module, "search_range", lambda x, high: searched.update([len(x)]) or search(x, high))
    monkeypatch.setattr(reconstruction_module, "parts_of", everywhere(16, 30))
    model = trained("residual", dtype=torch.float32)
    expected = model.eval()(X)
    loader = [(randn(20, 3, 12, 12, seed=at), torch.zeros(20)) for at in range(2)]
    entry = {"algorithm": "data_free_quantization", "generation": {"source": "dataset", "samples": 40}}
    ctrl, model = create_compressed_model(model, {"compression": [entry]}, loader, example_inputs=X)
    model = ctrl.strip()
    found = [m for m in model.modules() if isinstance(m, GridQuantizer)]
    activations = [m for m in found if not m.signed]
    assert found
    assert not any(m.pending for m in found)
    assert searched == {40: len(activations)}
    assert (model(X) - expected).abs().max() < 0.1 * expected.abs().max()


class LastTwice(nn.Module):
    """Its last layer is not re-fitted, as it runs twice, and is quantized all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.last(self.norm(self.first(x)).relu()).relu()).mean((2, 3))


def test_quantizers_behind_the_last_layer_that_is_re_fitted_find_their_ranges() -> None:
    torch.manual_seed(0)
    model = LastTwice().eval()
    expected = model(X)
    loader = [(X, torch.zeros(len(X)))]
    entry = {"algorithm": "data_free_quantization", "generation": {"source": "dataset"}}
    ctrl, model = create_compressed_model(model, {"compression": [entry]}, loader, example_inputs=X)
    model = ctrl.strip()
    assert not any(m.pending for m in model.modules() if isinstance(m, GridQuantizer))
    assert (model(X) - expected).abs().max() < 0.05 * expected.abs().max()


def test_how_many_images_by_their_size_and_source() -> None:
    inverted, real = Generation(), Generation("dataset")
    assert [inverted.count((3, size, size)) for size in (32, 64, 224)] == [512, 128, 64]
    assert [real.count((3, size, size)) for size in (32, 64, 224)] == [2000, 2000, 300]
    assert Generation("dataset", 50).count((3, 224, 224)) == 50
