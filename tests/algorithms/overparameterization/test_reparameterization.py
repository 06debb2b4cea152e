"""Merged = chain or branches = the layer itself, in function and gradients, for every kind of layer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nncf.torch.function_hook import register_post_function_hook, wrap_model
from support import oracles
from torch import nn

from nncf_compactprune.algorithms.overparameterization.branches import BranchedWeight
from nncf_compactprune.algorithms.overparameterization.factor_hooks import FactorizedWeight
from nncf_compactprune.algorithms.overparameterization.factors import Factors, Geometry, factorise, merge
from nncf_compactprune.algorithms.overparameterization.reparameterization import Reparameterization, fold
from nncf_compactprune.errors import CompactPruneError

KINDS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "conv no bias, stride, wide input": (lambda: nn.Conv2d(7, 3, 3, 2, bias=False), (2, 7, 9, 8)),
    "conv reflect, dilation": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 3, 8, 8)),
    "conv circular": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0), padding_mode="circular"), (2, 3, 6, 6)),
    "conv replicate": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (2, 3, 6, 6)),
    "conv same": (lambda: nn.Conv2d(3, 4, (1, 3), padding="same", dilation=2), (2, 3, 6, 6)),
    "conv same reflect": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 6)),
    "conv valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(5, 8, 1), (2, 5, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 6, 6)),
    "depthwise multiplier": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), (2, 4, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), (2, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), 2, groups=2, dilation=2), (2, 4, 5, 5)),
    "transposed depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 4, 2), (2, 3, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 2, 2, 2), (1, 3, 3, 3, 3)),
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear of tokens": (lambda: nn.Linear(6, 3, bias=False), (2, 4, 6)),
}
OPERATIONS = {nn.Linear: "linear"} | {
    getattr(nn, f"Conv{t}{n}d"): f"conv_{t.lower()}{n}d" if t else f"conv{n}d"
    for t in ("", "Transpose")
    for n in (1, 2, 3)
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def built(kind, dtype=torch.float64):
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    return Net(make()).to(dtype), torch.randn(shape, dtype=dtype)


def expand(net, *, mode="merged", expansion=3, core_scale=1.0):
    """With three factors, merged or in a chain, or with branches."""

    def make(geometry):
        return (
            BranchedWeight(geometry) if mode == "branches" else FactorizedWeight(geometry, expansion, mode, core_scale)
        )

    operations = {"layer.weight": [f"layer/{OPERATIONS[type(net.layer)]}/0"]} if mode == "chain" else None
    return Reparameterization(net, {"layer.weight": net.layer}, make, operations=operations)


def disturb(weights):
    """Away from the start, where the factors are special."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, factor in weights.factors:
            factor += 0.3 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)


@pytest.mark.parametrize("mode", ["merged", "chain", "branches"])
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_exact(kind, mode):
    net, x = built(kind, torch.float32)
    expected = net(x)
    expand(net, mode=mode, expansion=4)
    error = (net(x) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6


@pytest.mark.parametrize("mode", ["merged", "chain"])
@pytest.mark.parametrize("kind", KINDS)
def test_function_and_gradients_are_those_of_the_chain_of_layers(kind, mode):
    net, x = built(kind)
    x.requires_grad_()
    weights = expand(net, mode=mode)
    disturb(weights)
    hook = weights.hooks["layer.weight"]
    trained = [*hook.factors, x, *([] if net.layer.bias is None else [net.layer.bias])]
    expected = oracles.chain(net.layer, *hook.factors, x)
    actual = net(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((actual * pull).sum(), trained),
        torch.autograd.grad((expected * pull).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def layer_with(layer, weight, *, middle):
    """A layer of one branch: the same but for its weight, which is 0 except at the kernel's middle if ``middle``."""
    branch = copy.deepcopy(layer).requires_grad_(False)
    branch.weight.zero_()
    places = tuple(size // 2 for size in layer.weight.shape[2:]) if middle else ()
    branch.weight[(slice(None), slice(None), *places)] = weight
    return branch


@pytest.mark.parametrize("kind", KINDS)
def test_branches_are_the_sum_of_layers_that_run_side_by_side(kind):
    """Each branch is run as a layer of its own, and its output scaled channel by channel."""
    net, x = built(kind)
    weights = expand(net, mode="branches")
    disturb(weights)
    hook, layer = weights.hooks["layer.weight"], net.layer
    geometry = hook.geometry

    def scaled(scale, weight, *, middle):
        y = layer_with(layer, weight, middle=middle)(x)
        bias = 0 if layer.bias is None else layer.bias.detach()
        if isinstance(layer, nn.Linear):
            return (y - bias) * scale.flatten()
        shape = (-1, *[1] * (y.dim() - 2))
        return (y - (bias.view(shape) if layer.bias is not None else 0)) * scale.view(shape)

    with torch.no_grad():
        expected = scaled(hook.kernel_scale, geometry.weight(hook.kernel), middle=False)
        point = Geometry(tuple(layer.weight.shape[:2]), geometry.groups, geometry.transposed)
        if hook.point is not None:
            expected = expected + scaled(hook.point_scale, point.weight(hook.point[:, :, None]), middle=True)
        if hook.identity_scale is not None:
            eye = torch.eye(geometry.outs, dtype=torch.float64).expand(geometry.groups, -1, -1)
            expected = expected + scaled(hook.identity_scale, point.weight(eye[:, :, None]), middle=True)
        if layer.bias is not None:
            expected = expected + (
                layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * (expected.dim() - 2))
            )
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    assert (hook.point is not None) == (geometry.taps > 1)
    assert (hook.identity_scale is not None) == (geometry.outs == geometry.ins)


def test_every_branch_and_scale_learns():
    net, x = built("depthwise")
    weights = expand(net, mode="branches")
    net(x).square().mean().backward()
    assert len(list(weights.factors)) == 5
    assert all(factor.grad is not None and factor.grad.abs().max() > 0 for _, factor in weights.factors)


@pytest.mark.parametrize("mode", ["merged", "chain", "branches"])
@pytest.mark.parametrize("kind", KINDS)
def test_end_is_exact_and_leaves_nothing_behind(kind, mode):
    net, x = built(kind, torch.float32)
    keys = list(net.state_dict())
    weights = expand(net, mode=mode)
    disturb(weights)
    assert not net.layer.weight.requires_grad
    expected = net(x)
    weights.remove()
    error = (net(x) - expected).abs().max() / expected.abs().max()
    assert error <= 2e-6  # of the chain in float32; the merge itself is done in float64
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_modules()] == ["", "layer"]
    assert net.layer.weight.requires_grad
    assert "forward" not in vars(net)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_product_tap_by_tap(kind):
    net, _ = built(kind)
    geometry = Geometry.of(net.layer)
    assert torch.equal(geometry.weight(geometry.matrices(net.layer.weight)), net.layer.weight)
    generator = torch.Generator().manual_seed(2)
    factors = Factors(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in geometry.factor_shapes(2)))
    kernel = tuple(net.layer.weight.shape[2:])
    expected = oracles.merged_weight(*factors, transposed=geometry.transposed, kernel=kernel)
    torch.testing.assert_close(geometry.weight(merge(factors)), expected)


@pytest.mark.parametrize("core_scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("expansion", [1, 2, 4])
def test_factorise_keeps_the_weight_at_any_scale_of_the_random_part(expansion, core_scale):
    net, _ = built("grouped")
    geometry, weight = Geometry.of(net.layer), net.layer.weight.detach()
    factors = factorise(weight, geometry, expansion, torch.Generator().manual_seed(0), core_scale=core_scale)
    assert [tuple(factor.shape) for factor in factors] == list(geometry.factor_shapes(expansion))
    torch.testing.assert_close(geometry.weight(merge(factors)), weight)
    first, core, last = factors
    identity = torch.eye(geometry.ins, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(first.mT @ first, identity)
    torch.testing.assert_close(last @ last.mT, torch.eye(geometry.outs, dtype=torch.float64).expand(2, -1, -1))
    if expansion > 1:  # where there is room for it, the random part is there
        full = torch.linalg.matrix_rank(core[0, :, 0]) > min(geometry.outs, geometry.ins)
        assert full == (core_scale > 0)


def sgd_course(expansion, core_scale):
    """The merged weight after some steps with momentum and decay, on a fixed problem."""
    net, x = built("conv")
    weights = expand(net, expansion=expansion, core_scale=core_scale)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return weights.hooks["layer.weight"].merged()


def test_without_a_random_part_sgd_makes_nothing_of_the_expansion():
    """What ``factorise`` says, and the reason why ``core_scale`` is not 0 by default."""
    torch.testing.assert_close(sgd_course(4, 0.0), sgd_course(1, 0.0), rtol=1e-9, atol=1e-9)
    assert (sgd_course(4, 1.0) - sgd_course(1, 1.0)).abs().max() > 1e-3


def test_half_precision_weights_keep_factors_in_float32():
    net, x = built("conv", torch.bfloat16)
    weight = net.layer.weight.detach().clone()
    weights = expand(net)
    assert {factor.dtype for _, factor in weights.factors} == {torch.float32}
    assert net(x).dtype == torch.bfloat16
    weights.remove()
    assert torch.equal(net.layer.weight, weight)


def test_autocast_runs_the_layer_in_half_and_merges_in_float32():
    net, x = built("conv", torch.float32)
    weights = expand(net)
    weights.hooks["layer.weight"].watch = ("w", weights.merged)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert weights.merged["w"].dtype == torch.float32
    torch.testing.assert_close(weights.merged["w"], net.layer.weight, rtol=0, atol=1e-6)
    y.float().sum().backward()
    assert all(torch.isfinite(factor.grad).all() for _, factor in weights.factors)


def test_memory_format_follows_the_weight():
    for form in (torch.contiguous_format, torch.channels_last):
        net, x = built("conv", torch.float32)
        net = net.to(memory_format=form)
        weights = expand(net)
        hook = weights.hooks["layer.weight"]
        assert hook(net.layer.weight).is_contiguous(memory_format=form)
        assert net(x.to(memory_format=form)).is_contiguous(memory_format=form)


def test_a_copy_trains_and_folds_by_itself():
    net, x = built("grouped")
    for mode in ("merged", "chain", "branches"):
        model = copy.deepcopy(net)
        weights = expand(model, mode=mode)
        disturb(weights)
        shadow = copy.deepcopy(model)
        expected = model(x)
        torch.testing.assert_close(shadow(x), expected)
        with torch.no_grad():
            for _, factor in weights.factors:
                factor.zero_()
        torch.testing.assert_close(shadow(x), expected)
        fold(shadow)
        torch.testing.assert_close(shadow(x), expected)
        assert list(shadow.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("mode", ["merged", "branches"])
def test_hook_is_rebuilt_from_its_config_and_state(mode):
    net, _ = built("transposed grouped")
    weights = expand(net, mode=mode)
    disturb(weights)
    hook = weights.hooks["layer.weight"]
    again = type(hook).from_config(json.loads(json.dumps(hook.get_config()))).double()
    again.load_state_dict(hook.state_dict())
    assert torch.equal(again(net.layer.weight), hook(net.layer.weight))


def test_given_up_expansion_leaves_the_weight_bit_for_bit():
    net, _ = built("conv", torch.float32)
    before = net.layer.weight.detach().clone()
    weights = expand(net)
    disturb(weights)
    weights.remove(keep_training=False)
    assert torch.equal(net.layer.weight, before)
    assert "__nncf_hooks" not in net._modules


def test_bare_sequential_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CompactPruneError, match=r"bare nn\.Sequential.*inside a module"):
        Reparameterization(net, {"0.weight": net[0]}, BranchedWeight)


def test_weight_with_another_hook_is_refused():
    net, _ = built("conv")
    register_post_function_hook(wrap_model(net), "layer.weight", 0, nn.Identity())
    with pytest.raises(CompactPruneError, match=r"'layer\.weight' has an NNCF hook already"):
        expand(net)


def test_chain_of_a_weight_that_goes_elsewhere_is_refused():
    net, _ = built("conv")
    with pytest.raises(CompactPruneError, match=r"'layer\.weight' goes into layer/mul/0, expected only its own layer"):
        Reparameterization(
            net,
            {"layer.weight": net.layer},
            lambda geometry: FactorizedWeight(geometry, 2, "chain"),
            operations={"layer.weight": ["layer/mul/0"]},
        )
    assert net.layer.weight.requires_grad
