"""Layers in a ``ModuleList``, as detectors' necks and heads have them: NNCF's names of operations miss the list."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.data_free import randn, with_statistics_of
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.data_free.preconditioning import find_pairs
from nncf_compactprune.algorithms.data_free.quantizers import GridQuantizer
from nncf_compactprune.decide.scopes import layers_by_operation, operations_out_of_scope
from nncf_compactprune.host.nncf_hooks import hooks
from nncf_compactprune.host.nncf_quantization import ends_of

X = (4, 3, 16, 16)


def conv_bn(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Detector(nn.Module):
    """Two levels; a lateral layer and a head for each; class scores with a sigmoid beside boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 12, 2), conv_bn(12, 16, 2)])
        self.laterals = nn.ModuleList([nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)])
        self.heads = nn.ModuleList([nn.Sequential(conv_bn(8, 8), nn.Conv2d(8, 7, 1)) for _ in range(2)])

    def forward(self, x):
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        coarse = self.laterals[1](levels[1])
        fine = self.laterals[0](levels[0]) + F.interpolate(coarse, scale_factor=2.0)
        out = [head(level).flatten(2) for head, level in zip(self.heads, (fine, coarse), strict=True)]
        scores, boxes = torch.cat(out, 2).split([3, 4], 1)
        return scores.sigmoid(), boxes


def detector() -> nn.Module:
    torch.manual_seed(0)
    model = Detector()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # filters of unlike size: one scale for a whole weight would show
            module.weight.data *= torch.logspace(-1, 1, len(module.weight)).view(-1, 1, 1, 1)
    return with_statistics_of(model, randn(*X))


def layers_of(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_every_operation_belongs_to_the_layer_whose_weight_it_uses() -> None:
    model = detector()
    found = layers_by_operation(model, randn(*X))
    assert layers_of(model) <= set(found.values())
    assert len(set(found.values())) == len(found)
    assert found["/conv2d/0"] == "laterals.1"  # the first of its list to run


@pytest.mark.parametrize("bits", [8, 6])
def test_every_weight_has_the_quantizer_of_a_weight(bits: int) -> None:
    model, x = detector(), randn(*X)
    dense = copy.deepcopy(model)
    entry = {
        "algorithm": "data_free_quantization",
        "params": {"weight_bits": bits, "activation_bits": bits},
        "generation": {"samples": 32, "steps": 2},
    }
    ctrl, model = create_compressed_model(model, {"compression": entry}, example_inputs=x[:1])
    ctrl.strip()
    quantizers = [hook for hook in hooks(model) if isinstance(hook.module, GridQuantizer)]
    used = layers_by_operation(dense, x[:1])
    scales = {used[hook.operation]: hook.module.scale.numel() for hook in quantizers if hook.module.signed}
    assert scales == {name: dense.get_submodule(name).out_channels for name in layers_of(dense)}
    assert not any(hook.port == 1 and not hook.module.signed for hook in quantizers if hook.operation in used)
    for new, old in zip(model.eval()(x), dense.eval()(x), strict=True):
        assert (new - old).norm() < (0.1 if bits == 8 else 0.4) * old.norm()


class Decoding(nn.Module):
    """The detector with what deployed ones do at the end: distances become boxes in pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = detector()
        self.register_buffer("centres", torch.arange(80.0) * 8)

    def forward(self, x):
        scores, distances = self.net(x)
        low, high = (distances.exp() * 8).chunk(2, 1)
        boxes = torch.cat([self.centres - low, self.centres + high], 1)
        corners = (boxes[:, :2] + boxes[:, 2:]) / 2
        return torch.cat([corners, boxes[:, 2:] - boxes[:, :2], scores], 1)


def operations_quantized(model: nn.Module, x: torch.Tensor, algorithm: str) -> set[str]:
    """Quantizes a model in place; NNCF's names of the operations that quantizers sit at."""
    entry = {"algorithm": algorithm}
    if algorithm == "data_free_quantization":
        entry["generation"] = {"samples": 32, "steps": 2}
    loader = [(x, torch.zeros(len(x)))]
    create_compressed_model(model, {"compression": entry}, loader, example_inputs=x[:1])[0].strip()
    return {hook.operation for hook in hooks(model)}


@pytest.mark.parametrize("algorithm", ["data_free_quantization", "quantization"])
def test_what_comes_behind_the_last_layers_stays_in_float(algorithm: str) -> None:
    model, x = Decoding().eval(), randn(*X)
    with torch.no_grad():
        raw = model.net(x)
    quantized = operations_quantized(model, x, algorithm)
    assert sum("conv2d" in name for name in quantized) >= 8
    assert not {name for name in quantized if any(kind in name for kind in ("/mul/", "/sub/", "/truediv/", "/exp/"))}
    with torch.no_grad():
        seen = []
        handle = model.net.register_forward_hook(lambda module, args, out: seen.append(out))
        out = model.eval()(x)
        handle.remove()
    (scores, distances), centres = seen[0], model.centres
    low, high = (distances.exp() * 8).chunk(2, 1)
    torch.testing.assert_close(out[:, :2], (centres - low + centres + high) / 2)  # not rounded to steps of the whole
    assert (scores - raw[0]).abs().max() < 0.2


class LinearAttention(nn.Module):
    """As in EfficientViT: one tensor holds products and the sums that divide them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 24, 4, stride=4), nn.BatchNorm2d(24))
        self.qkv = nn.Conv2d(24, 48, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x)).flatten(2).transpose(1, 2).chunk(3, 2)
        q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
        out = q @ (k.transpose(1, 2) @ v)
        out = out[..., :-1] / (out[..., -1:] + 1e-15)
        return self.head(out.transpose(1, 2)[..., None]).flatten(1)


@pytest.mark.parametrize("algorithm", ["data_free_quantization", "quantization"])
def test_divisors_stay_in_float(algorithm: str) -> None:
    torch.manual_seed(0)
    x = randn(8, 3, 32, 32)
    model = with_statistics_of(LinearAttention(), x).eval()
    dense = copy.deepcopy(model)
    quantized = operations_quantized(model, x, algorithm)
    assert {"/matmul/0", "qkv/conv2d/0"} <= quantized
    assert not quantized & {"/matmul/1", "/add/0"}
    with torch.no_grad():
        assert (model.eval()(x) - dense(x)).norm() < 0.15 * dense(x).norm()


def test_a_detectors_last_layers_are_all_edges() -> None:
    model, x = Decoding().eval(), randn(*X)
    used = layers_by_operation(model, x[:1])
    ends = ends_of(model, x[:1])
    assert used[ends.first] == "net.stages.0.0"
    assert {used[name] for name in ends.last} == {"net.heads.0.1", "net.heads.1.1"}
    assert not any(name in used for name in ends.in_float)


def test_scopes_reach_operations_in_a_list() -> None:
    model, x = detector(), randn(*X)
    used = layers_by_operation(model, x[:1])
    out = operations_out_of_scope(model, x[:1], ["heads.1"], None)
    assert {used[name] for name in out if name in used} >= {"heads.1.0.0", "heads.1.1"}
    assert not any(used.get(name, "").startswith(("heads.0", "laterals", "stages")) for name in out)


def test_pairs_are_found_in_a_list() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    pairs = find_pairs(Chain().eval(), randn(*X))
    assert [(pair.first, pair.second, pair.norm) for pair in pairs] == [
        ("blocks.0.0", "blocks.1.0", "blocks.0.1"),
        ("blocks.1.0", "blocks.2.0", "blocks.1.1"),
    ]


def test_a_chain_of_factors_runs_in_a_list() -> None:
    model, x = detector(), randn(*X)
    expected = model(x)[1].detach()
    entry = {
        "algorithm": "linear_overparameterization",
        "params": {"form": "factors", "mode": "chain", "expansion": 2},
        "distillation": {"similarity_weight": 0.0},
    }
    ctrl, model = create_compressed_model(model, {"compression": entry}, example_inputs=x[:1])
    torch.testing.assert_close(model.eval()(x)[1], expected, rtol=1e-4, atol=1e-4)
    ctrl.strip()
