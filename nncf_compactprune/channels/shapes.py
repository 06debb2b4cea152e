"""Results of the expensive operations by shape alone.

Channel analysis looks at shapes, never at values, so the arithmetic of convolutions and matrix products can be left
out: their results are zeros of the right shape. Where a network reads values (``.item()``, a boolean mask), the
analysis starts again with real arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_READS_VALUES = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.topk.default,
    _aten.sort.default,
    _aten.argmax.default,
}


class ValuesNeeded(Exception):
    """The network's shapes or control flow depend on values."""


def without_arithmetic(func: Any, args: Sequence[Any], *, unchanged: bool = False) -> Tensor | None:
    """The result of a convolution or matrix product as zeros of the right shape; None: run the operation.

    :param func: the operation.
    :param args: its arguments.
    :param unchanged: no operand carries channels. Then the operation is run: its result may be a table that the
        network keeps.
    :raises ValuesNeeded: the operation reads values.
    """
    shape = None if unchanged else _SHAPES.get(func)
    if shape is not None:
        size = shape(args)
        return None if size is None else args[0].new_zeros(size)
    if func in _READS_VALUES:
        raise ValuesNeeded(str(func))
    return None


def _convolution(args: Sequence[Any]) -> list[int] | None:
    """Output size of a plain (not transposed) convolution whose operands fit; None leaves it to torch to complain."""
    x, weight, _, stride, padding, dilation, transposed, _, groups = args
    if transposed or x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * groups or x.dtype != weight.dtype:
        return None
    size = [x.shape[0], weight.shape[0]]
    for d in range(x.dim() - 2):
        span = x.shape[d + 2] + 2 * _at(padding, d) - _at(dilation, d) * (weight.shape[d + 2] - 1) - 1
        if span < 0:
            return None
        size.append(span // _at(stride, d) + 1)
    return size


def _at(values: Sequence[int], d: int) -> int:
    return values[d] if len(values) > 1 else values[0]


def _product(a: Tensor, b: Tensor) -> list[int] | None:
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2] or a.dtype != b.dtype:
        return None
    return [*a.shape[:-1], b.shape[-1]]


def _added_product(args: Sequence[Any]) -> list[int] | None:
    size = _product(args[1], args[2])
    return size if size is not None and args[0].dim() == 1 and args[0].shape[0] == size[-1] else None


_SHAPES = {
    _aten.convolution.default: _convolution,
    _aten.mm.default: lambda args: _product(args[0], args[1]),
    _aten.bmm.default: lambda args: _product(args[0], args[1]),
    _aten.addmm.default: _added_product,
}
