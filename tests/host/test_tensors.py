"""What the package relies on in torch's modules."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nncf_compactprune.host.tensors import (
    children,
    computed_tensors,
    model_tensors,
    named_modules,
    own_tensors,
    temporary_buffers,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.same = self.conv
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_parameter("none", None)


def test_own_tensors_are_a_modules_alone() -> None:
    net = Net()
    assert list(own_tensors(net)) == ["kept", "passing"]
    assert own_tensors(net.conv)["weight"] is net.conv.weight


def test_temporary_buffers_are_what_the_state_dict_leaves_out() -> None:
    net = Net()
    assert [id(buffer) for buffer in temporary_buffers(net)] == [id(net.passing)]
    assert "passing" not in net.state_dict()
    assert "kept" in net.state_dict()


def test_names_are_torchs_own() -> None:
    net = Net()
    assert [name for name, _ in named_modules(net)] == [name for name, _ in net.named_modules()]
    assert list(model_tensors(net).parameters) == [name for name, _ in net.named_parameters()]
    assert list(model_tensors(net).buffers) == [name for name, _ in net.named_buffers()]
    assert model_tensors(net).tied == {}  # a module under two names is met once, as in torch


def test_children_is_where_a_module_looks_them_up() -> None:
    net = Net()
    children(net)["conv"] = replacement = nn.Conv2d(3, 4, 1)
    assert net.conv is replacement


def test_computed_parameters_name_their_parts() -> None:
    new = weight_norm(nn.Linear(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(3, 4))
    assert [tuple(part.shape) for part in computed_tensors(new)["weight"]] == [(4, 1), (4, 3)]
    assert [tuple(part.shape) for part in computed_tensors(old)["weight"]] == [(4, 1), (4, 3)]
    assert computed_tensors(nn.Linear(3, 4)) == {}
