"""Data-free compression of networks that pad as TensorFlow does, in each way to write that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.data_free import randn, with_statistics_of
from torch import nn

from nncf_compactprune import apply_plan, create_compressed_model
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.cut.surgery import plan_of

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)


class SameConv2d(nn.Conv2d):
    """Pads inside its own forward, as timm's Conv2dSame does."""

    def forward(self, x):
        return F.conv2d(tensorflow_same(x, self), self.weight, self.bias, self.stride, 0, 1, self.groups)


def tensorflow_same(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    total = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
    return F.pad(x, (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2))


class MobileNetV1(nn.Module):
    """MobileNetV1, its first blocks.

    :param padding: who pads: ``"forward"`` (the network), ``"layer"`` (a subclass), ``"word"`` (where strides are 1).
    :param depth: number of blocks.
    """

    def __init__(self, padding: str, width: float, depth: int = 13, classes: int = 1000) -> None:
        super().__init__()
        self.padding, self.depth = padding, depth
        channels = int(32 * width)
        self.conv1, self.conv1_bn = self.conv(3, channels, 3, 2), nn.BatchNorm2d(channels, eps=1e-3)
        for at, (wide, stride) in enumerate(zip(WIDTHS[:depth], STRIDES[:depth], strict=True), 1):
            out = int(wide * width)
            self.add_module(f"conv_dw_{at}", self.conv(channels, channels, 3, stride, groups=channels))
            self.add_module(f"conv_dw_{at}_bn", nn.BatchNorm2d(channels, eps=1e-3))
            self.add_module(f"conv_pw_{at}", nn.Conv2d(channels, out, 1, bias=False))
            self.add_module(f"conv_pw_{at}_bn", nn.BatchNorm2d(out, eps=1e-3))
            channels = out
        self.conv_preds = nn.Conv2d(channels, classes, 1)

    def conv(self, channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
        make = SameConv2d if self.padding == "layer" else nn.Conv2d
        word = {"padding": "same"} if self.padding == "word" and stride == 1 else {}
        return make(channels, out, kernel, stride, groups=groups, bias=False, **word)

    def step(self, name: str, x: torch.Tensor) -> torch.Tensor:
        conv = self.get_submodule(name)
        if conv.kernel_size[0] > 1 and self.padding != "layer" and conv.padding != "same":
            x = tensorflow_same(x, conv)
        return F.relu6(self.get_submodule(f"{name}_bn")(conv(x)))

    def forward(self, x):
        x = self.step("conv1", x)
        for at in range(1, self.depth + 1):
            x = self.step(f"conv_pw_{at}", self.step(f"conv_dw_{at}", x))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


def compress(model: nn.Module, size: int, entry: dict, samples: int = 32) -> nn.Module:
    entry = {"generation": {"samples": samples, "steps": 2}, **entry}
    config = {"input_info": {"sample_size": [1, 3, size, size]}, "compression": entry}
    ctrl, _ = create_compressed_model(model, config)
    ctrl.strip()
    assert "layers left" not in ctrl.algorithms[0].statistics()
    assert len(ctrl.algorithms[0].refits.layers) == len(refittable(model, torch.zeros(1, 3, size, size)).found)
    return model


def pruning(budget: float) -> dict:
    return {"algorithm": "data_free_layerwise", "budget": {"macs": budget}, "params": {"round_to": 1}}


QUANTIZATION = {"algorithm": "data_free_quantization"}


@torch.no_grad()
def distance(dense: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    """Squared difference of the scores, over their variance."""
    expected = dense(x)
    found = model.eval()(x)
    assert bool(torch.isfinite(found).all())
    return float((found - expected).square().mean() / expected.var(0).mean())


def check(
    dense: nn.Module, x: torch.Tensor, budget: float = 0.8, quantized_below: float = 0.1, pruned_below: float = 1.0
) -> list[float]:
    """Prunes and quantizes copies; returns how far both are from the dense network, and the cut alone."""
    pruned = compress(copy.deepcopy(dense), x.shape[-1], pruning(budget))
    only_cut = copy.deepcopy(dense)
    apply_plan(only_cut, plan_of(pruned))
    quantized = compress(copy.deepcopy(dense), x.shape[-1], QUANTIZATION)
    found = [distance(dense, model, x) for model in (pruned, only_cut.eval(), quantized)]
    assert found[0] < pruned_below * found[1]
    assert found[2] < quantized_below
    return found


def test_each_way_to_write_the_padding_gives_the_same_networks() -> None:
    torch.manual_seed(0)
    x = F.avg_pool2d(randn(48, 3, 64, 64), 2) * 3
    first = with_statistics_of(MobileNetV1("forward", 0.5, depth=3, classes=6), x)
    found = []
    for padding in ("forward", "layer", "word"):
        model = MobileNetV1(padding, 0.5, depth=3, classes=6).eval()
        model.load_state_dict(first.state_dict())
        assert torch.allclose(model(x), first(x), atol=1e-5)
        found.append(check(model, x))
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[2] == pytest.approx(found[0], rel=0.05)


@pytest.mark.slow
def test_a_timm_network_with_tensorflow_padding() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    x = F.avg_pool2d(randn(32, 3, 128, 128), 2) * 3
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10)
    # 36 untrained layers, 32 images: nothing that these say of each other is worth much
    check(with_statistics_of(model, x), x, budget=0.9, quantized_below=1.0, pruned_below=1.5)
