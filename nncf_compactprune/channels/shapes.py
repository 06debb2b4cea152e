"""Results of the expensive operations by shape alone.

Channel analysis looks at shapes, never at values, so the arithmetic can be left out where the shape of the result is
plain: of convolutions, matrix products, norms, elementwise operations and concatenations. Where a network reads values
(``.item()``, a boolean mask), the analysis starts again with real arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class ShapesOnly:
    """Gives the results of operations without their arithmetic: hollow tensors, which all share one block of zeros."""

    def __init__(self) -> None:
        self._blocks: dict[torch.device, torch.UntypedStorage] = {}
        self._addresses: set[int] = set()

    def result(self, func: Any, args: Sequence[Any], *, unchanged: bool = False) -> Any:
        """The result of an operation as zeros of the right shape; None: run the operation.

        :param func: the operation.
        :param args: its arguments.
        :param unchanged: no operand carries channels. Then the operation is run: its result may be a table that the
            network keeps.
        :raises ValuesNeeded: the operation reads values.
        """
        if not unchanged:
            if (shape := _SHAPES.get(func)) is not None:
                like = args[0][0] if func is _aten.cat.default else args[0]
                size = shape(args)
                return None if size is None else self._hollow(like, size)
            if func in _NORMS and args[0].is_contiguous() and not _NORMS[func](args):
                nothing = args[0].new_empty(0)
                return self._hollow(args[0], args[0].shape), nothing, nothing
            if _writes_its_first(func) and self._is_hollow(args[0]):
                return args[0]  # all others share the block
        if func in _READS_VALUES:
            raise ValuesNeeded(str(func))
        return None

    def _hollow(self, like: Tensor, size: Sequence[int]) -> Tensor:
        """A contiguous tensor of that size, of the dtype and on the device of another."""
        result = like.new_empty(0)
        numel = 1
        for n in size:
            numel *= n
        block = self._blocks.get(like.device)
        if block is None or block.nbytes() < numel * like.element_size():
            block = like.new_zeros(numel).untyped_storage()
            self._blocks[like.device] = block
            self._addresses.add(block.data_ptr())
        # No view: rules ask for these. The overload without strides is not in torch's type stubs.
        return result.set_(block, 0, size)  # type: ignore[call-overload, no-any-return]

    def _is_hollow(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._addresses


def _writes_its_first(func: Any) -> bool:
    """Whether an operation writes its result into its first argument, and keeps its shape."""
    found = _IN_PLACE.get(func)
    if found is None:
        arguments = func._schema.arguments
        alias = arguments[0].alias_info if arguments else None
        writes = alias is not None and alias.is_write and len(func._schema.returns) == 1
        found = _IN_PLACE[func] = writes and torch.Tag.inplace_view not in func.tags
    return found


_IN_PLACE: dict[Any, bool] = {}


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


def _elementwise(args: Sequence[Any]) -> Sequence[int] | None:
    """Of one tensor, or of two of one shape and type; memory formats are left to torch."""
    x, *others = args
    for other in others[:1]:
        if isinstance(other, Tensor) and (other.shape != x.shape or other.dtype != x.dtype or not _plain(other)):
            return None
    return x.shape if _plain(x) else None


def _scaled(args: Sequence[Any]) -> Sequence[int] | None:
    """Of a tensor and one with a value for each channel, ``[N, C, 1, 1]``; or as any elementwise operation."""
    x, other = args[:2]
    if isinstance(other, Tensor) and x.dim() == other.dim() == 4 and other.shape == (*x.shape[:2], 1, 1):
        return x.shape if _plain(x) and _plain(other) and x.dtype == other.dtype else None
    return _elementwise(args)


def _concatenation(args: Sequence[Any]) -> list[int] | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0]
    rest = [n for d, n in enumerate(first.shape) if d != dim % first.dim()]
    for x in tensors:
        if not _plain(x) or x.dtype != first.dtype or x.dim() != first.dim():
            return None
        if [n for d, n in enumerate(x.shape) if d != dim % first.dim()] != rest:
            return None
    size = list(first.shape)
    size[dim] = sum(x.shape[dim] for x in tensors)
    return size


def _plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.is_contiguous() and x.dim() > 0


_OF_ONE = (
    *("relu", "leaky_relu", "elu", "silu", "gelu", "sigmoid", "tanh"),
    *("hardtanh", "hardswish", "hardsigmoid", "_softmax"),
)
_SHAPES: dict[Any, Callable[[Sequence[Any]], Sequence[int] | None]] = {
    _aten.convolution.default: _convolution,
    _aten.mm.default: lambda args: _product(args[0], args[1]),
    _aten.bmm.default: lambda args: _product(args[0], args[1]),
    _aten.addmm.default: _added_product,
    _aten.cat.default: _concatenation,
    _aten.mul.Tensor: _scaled,
    _aten.add.Tensor: _elementwise,
    _aten.sub.Tensor: _elementwise,
    **{getattr(_aten, name).default: _elementwise for name in _OF_ONE},
}

#: norms, to whether this call of one does more than to compute its result
_NORMS: dict[Any, Callable[[Sequence[Any]], bool]] = {
    _aten.native_batch_norm.default: lambda args: bool(args[5]),
    _aten._native_batch_norm_legit_no_training.default: lambda args: False,
    _aten.native_layer_norm.default: lambda args: False,
}
