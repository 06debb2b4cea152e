"""Networks that write a width into their code: guilty groups are pinned with module and line, the rest goes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.networks import STRUCTURES, conv_bn, images, trained
from torch import nn

from nncf_compactprune import analyse, create_compressed_model, prune
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import BudgetError, NothingPrunableError


class Block(nn.Module):
    """Its ``cut`` only works at the dense width of ``inner``."""

    def __init__(self, cut) -> None:
        super().__init__()
        self.inner, self.middle, self.outer = conv_bn(8, 16), conv_bn(16, 16), nn.Conv2d(16, 8, 1)
        self.cut = cut

    def forward(self, x):
        return x + self.outer(self.middle(self.cut(self.inner(x))))


class Net(nn.Module):
    def __init__(self, cut) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), Block(cut), Block(cut)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))


def view_by_constant(y):
    return y.view(y.shape[0], 16, y.shape[2], y.shape[3]) * 2


def split_by_constant(y):
    return torch.cat(y.split(8, 1)[::-1], 1)


def slope_by_width(y):
    """Runs at any width, but means something else."""
    return F.leaky_relu(y - 0.5, 1 / y.shape[1])


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (view_by_constant, "aten.view"),
        (split_by_constant, "aten."),
        (slope_by_width, "computes something else on fewer channels"),
    ],
)
def test_guilty_groups_are_pinned_with_their_line_and_the_rest_goes(cut, words):
    torch.manual_seed(0)
    model = Net(cut).eval()
    state = copy.deepcopy(model.state_dict())
    before = trace(model, images(torch.float32))
    graph = analyse(model, images(torch.float32))
    assert {g.name for g in before.groups} - {g.name for g in graph.groups} == {"a.inner.0", "b.inner.0"}
    assert {g.name for g in graph.groups} == {"stem.0", "a.middle.0", "b.middle.0"}
    pinned = next(p for p in graph.pinned if p.name == "a.inner.0")
    assert words in pinned.reason
    assert pinned.location.startswith("test_diagnosis.py:")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    result = prune(model, images(torch.float32), budget={"macs": 0.8}, round_to=1)
    assert result.self_check.error <= 1e-5
    assert model.a.inner[0].out_channels == 16


def test_the_least_that_is_told_is_one_that_the_code_allows():
    """Before the trial, widths that are written in the code look as if they could go."""
    torch.manual_seed(0)
    x, said = images(torch.float32), []
    for share in (0.05, 0.1):
        with pytest.raises(BudgetError, match="cannot be reached") as caught:
            prune(Net(view_by_constant).eval(), x, budget={"macs": share}, round_to=1)
        said.append(float(re.search(r"the least is [\d,]+ \(([\d.]+)%\)", str(caught.value)).group(1)) / 100)
    assert said[0] == said[1]
    result = prune(Net(view_by_constant).eval(), x, budget={"macs": said[0] + 0.01}, round_to=1)
    assert result.self_check.error <= 1e-5


class Mixed(nn.Module):
    """Tokens that are a picture for a while (PVT): a convolution may give them in another memory format."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 128), nn.Linear(128, 32)
        self.middle = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.a, self.b, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2)
        y = self.up(x)
        y = y.transpose(1, 2).view(len(x), y.shape[-1], 8, 8).relu()
        x = x + self.down(self.middle(y).flatten(2).transpose(1, 2).relu())
        return self.head((x + self.b(self.a(x).reshape(len(x), 64, 64).relu())).mean(1))


class NotTooNarrow(nn.Module):
    """Fewer than half of its channels fail, which the trial's share does not come to."""

    def forward(self, x):
        if x.shape[1] < 5:
            raise ValueError(x.shape)
        return x * 1


def test_what_only_fails_at_the_widths_of_the_budget_ends_the_search():
    model = Net(NotTooNarrow()).double().eval()
    assert analyse(model, images()).groups[1].size == 16
    with pytest.raises(BudgetError, match="the least is"):
        prune(model, images(), budget={"macs": 0.02}, round_to=1)


def test_memory_formats_make_no_innocent_group_guilty():
    torch.manual_seed(0)
    graph = analyse(Mixed().eval(), torch.randn(1, 3, 32, 32))
    assert {g.name for g in graph.groups} == {"first", "up"}
    assert {p.name for p in graph.pinned if p.reason != "model output"} == {"a"}


def test_scheduled_runs_find_out_before_training():
    model = Net(view_by_constant)
    config = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.8}, "params": {"round_to": 1}},
    }
    ctrl, _ = create_compressed_model(model, config)
    assert "a.inner.0" not in {g.name for g in ctrl.algorithms[0].graph.groups}


def test_nothing_left_to_prune_says_why():
    class OnlyOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            return self.head(view_by_constant(self.conv(x)))

    with pytest.raises(NothingPrunableError, match=r"(?s)'conv' \(16 channels\): aten.view"):
        prune(OnlyOne(), torch.randn(1, 3, 8, 8), budget={"macs": 0.5})


@pytest.mark.parametrize("name", STRUCTURES)
def test_sound_structures_pass_the_trial(name):
    model, x = trained(name), images()
    assert [g.name for g in analyse(model, x).groups] == [g.name for g in trace(model, x).groups]


class Picks(nn.Module):
    """The strongest positions go on (values choose the path), and a width is written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.score = Net(view_by_constant), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        y = self.net.a(self.net.stem(x)).flatten(2)
        strongest = self.score(y[..., None]).flatten(1).topk(9).indices
        picked = y.transpose(1, 2)[torch.arange(len(x))[:, None], strongest]
        return self.net.head(picked.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_choose_the_path_are_no_hindrance_to_the_diagnosis(dtype):
    torch.manual_seed(0)
    model = Picks().to(dtype).eval()
    graph = analyse(model, images(dtype))
    assert {g.name for g in graph.groups} == {"net.stem.0", "net.a.middle.0"}
    pinned = next(p for p in graph.pinned if p.name == "net.a.inner.0")
    assert "aten.view" in pinned.reason
    result = prune(model, images(dtype), budget={"macs": 0.8}, round_to=1)
    assert result.self_check.error <= 1e-5
