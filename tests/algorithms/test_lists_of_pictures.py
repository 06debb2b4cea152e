"""Networks that take a list of pictures, each of its own size, as torchvision's detectors do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import conv_bn
from torch import Tensor, nn

from nncf_compactprune import ExportError, analyse, create_compressed_model, export_model, prune
from nncf_compactprune.algorithms.base import model_inputs

SIZES = ((16, 20), (12, 16), (20, 12), (16, 16), (8, 24))


class Detector(nn.Module):
    """Pads pictures to one batch, and in training mode asks for targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32), nn.Conv2d(32, 6, 1))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> list[dict[str, Tensor]]:
        if self.training and targets is None:
            msg = "targets should not be None when in training mode"
            raise ValueError(msg)
        batch = torch.stack([F.pad(one, (0, 24 - one.shape[2], 0, 20 - one.shape[1])) for one in images])
        return [{"scores": one.mean((1, 2))} for one in self.body(batch)]


def pictures(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *SIZES[at % len(SIZES)], generator=generator) for at in range(count)]


def network() -> Detector:
    torch.manual_seed(0)
    net = Detector()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()
    with torch.no_grad():
        net(pictures(16, seed=5), [])
    return net.eval()


def loader(*counts: int):
    """As torchvision's training scripts collate: a tuple of pictures and a tuple of targets."""
    return [
        (tuple(pictures(count, seed=at)), tuple({"labels": torch.ones(1)} for _ in range(count)))
        for at, count in enumerate(counts)
    ]


@torch.no_grad()
def scores(net: nn.Module, images: list[Tensor]) -> Tensor:
    return torch.stack([one["scores"] for one in net(images)])


def distance(net: nn.Module, images: list[Tensor], expected: Tensor) -> float:
    return float((scores(net, images) - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_costs_are_those_of_one_picture(count: int) -> None:
    expected = 20 * 24 * (27 * 16 + 9 * 16 * 32 + 32 * 6)
    assert analyse(network(), (pictures(count),)).macs == expected
    assert analyse(network(), {"images": pictures(count)}).macs == expected


def test_the_cut_network_takes_lists_too() -> None:
    net = network()
    plan = prune(net, (pictures(2),), budget={"macs": 0.5}).plan
    assert plan.after.macs <= 0.5 * plan.before.macs
    assert [len(one["scores"]) for one in net(pictures(3))] == [6, 6, 6]


@pytest.mark.parametrize("initializer", [{}, {"refit": {"num_samples": 14}}])
def test_a_loader_of_lists_brings_statistics_and_layers_nearer(initializer) -> None:
    dense, held_out = network(), pictures(8, seed=9)
    without, through = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(without, (pictures(2),), budget={"macs": 0.5})
    config = {
        "algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"schedule": "one_shot"},
        "initializer": initializer,
    }  # fmt: skip
    controller, through = create_compressed_model(through, {"compression": config}, loader(8, 3, 5))
    through = controller.strip().eval()

    expected = scores(dense, held_out)
    errors = [distance(net, held_out, expected) for net in (without, through)]
    assert errors[1] < 0.9 * errors[0]


def test_several_inputs_of_few_examples_are_no_list_of_pictures() -> None:
    pair = torch.zeros(4, 7, 5), torch.zeros(4, 7, 5)
    for labels in (torch.zeros(4), (torch.zeros(4), torch.zeros(4)), None):
        assert model_inputs((pair, labels)) is pair
    assert model_inputs((pair, ({}, {}))) == ([*pair],)


def test_ranges_are_measured_on_lists() -> None:
    net, held_out = network(), pictures(4, seed=9)
    expected = scores(net, held_out)
    controller, net = create_compressed_model(net, {"compression": {"algorithm": "quantization"}}, loader(4, 4))
    assert 0 < distance(controller.strip().eval(), held_out, expected) < 0.1


def test_files_of_them_are_refused_with_the_way_out(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"got list\. Files take batches of pictures of one size: export the part"):
        export_model(network(), (pictures(2),), tmp_path)
    assert not list(tmp_path.iterdir())
