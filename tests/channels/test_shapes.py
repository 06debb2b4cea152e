"""Results by shape alone have the shape, the type and the layout that the arithmetic would give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nncf_compactprune.channels.shapes import ShapesOnly, ValuesNeeded

aten = torch.ops.aten
X = torch.randn(2, 6, 5, 4)
CALLS = {
    "convolution": (
        aten.convolution.default,
        (X, torch.randn(8, 3, 3, 3), None, [2, 1], [1], [1], False, [0], 2),
    ),
    "mm": (aten.mm.default, (torch.randn(3, 4), torch.randn(4, 5))),
    "bmm": (aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
    "addmm": (aten.addmm.default, (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5))),
    "cat": (aten.cat.default, ([X, X[:, :2].contiguous()], 1)),
    "cat of the last": (aten.cat.default, ([X, X], -1)),
    "add": (aten.add.Tensor, (X, X)),
    "add a number": (aten.add.Tensor, (X, 1)),
    "scale channels": (aten.mul.Tensor, (X, torch.randn(2, 6, 1, 1))),
    "relu": (aten.relu.default, (X,)),
    "softmax": (aten._softmax.default, (X, -1, False)),
    "batch norm": (
        aten.native_batch_norm.default,
        (X, torch.ones(6), torch.ones(6), torch.zeros(6), torch.ones(6), False, 0.1, 1e-5),
    ),
    "layer norm": (aten.native_layer_norm.default, (X, [4], torch.ones(4), None, 1e-5)),
}


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", CALLS)
def test_a_result_is_zeros_of_the_right_shape(name):
    operation, args = CALLS[name]
    hollow, real = first(ShapesOnly().result(operation, args)), first(operation(*args))
    assert (hollow.shape, hollow.dtype, hollow.stride()) == (real.shape, real.dtype, real.stride())
    assert not hollow.any()
    assert not hollow._is_view()


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        (aten.add.Tensor, (X, X[0])),
        (aten.add.Tensor, (X, X.double())),
        (aten.relu.default, (X.to(memory_format=torch.channels_last),)),
        (aten.cat.default, ([X, X[:, :, :3]], 1)),
        (aten.native_batch_norm.default, (X, None, None, None, None, True, 0.1, 1e-5)),
        (aten.mm.default, (X[0, 0], X[0, 0])),
    ],
)
def test_what_is_not_plain_is_left_to_torch(operation, args):
    assert ShapesOnly().result(operation, args) is None


def test_nothing_is_written_into_what_all_share():
    shapes = ShapesOnly()
    small, large = shapes.result(aten.relu.default, (X[:1],)), shapes.result(aten.relu.default, (X,))
    assert shapes.result(aten.add_.Tensor, (large, 1)) is large
    assert shapes.result(aten.add_.Tensor, (small[0], 1)) is not None
    assert shapes.result(aten.add_.Tensor, (X, 1)) is None
    assert shapes.result(aten.unsqueeze_.default, (large, 0)) is None
    assert not small.any()
    assert not large.any()


def test_values_are_asked_for():
    with pytest.raises(ValuesNeeded):
        ShapesOnly().result(aten.nonzero.default, (X,))
    assert ShapesOnly().result(aten.relu.default, (X,), unchanged=True) is None
