"""Elementwise operations, and those that pass every dimension on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nncf_compactprune.channels.labels import DimLabels, LabelArray
from nncf_compactprune.channels.rules.base import name_of, rule

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule("pointwise", "hardswish", "where", "masked_fill", "addcmul", "addcdiv", "lerp", "silu", "_prelu_kernel", "copy")
def pointwise(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Elementwise with broadcasting: equal positions are the same channel."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    for result in out if isinstance(out, (tuple, list)) else (out,):
        if len(tensors) == 1 and tensors[0].dim() == result.dim():
            tracer.set(result, tracer.labels(tensors[0]))
        else:
            tracer.set(result, broadcast(tracer, tensors, result.shape, f"meets a fixed tensor in {name_of(func)}"))


def broadcast(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], reason: str) -> DimLabels:
    """Labels of tensors combined elementwise.

    A dimension of size 1 stretched over several positions is a channel that cannot go: without it nothing is left to
    stretch. A tensor of one value throughout, as ``torch.zeros`` makes it, fits any width, and so does one that was
    stretched before, as by ``gate.expand_as(x)``; where its code does not, the trial cut fails.

    :param tracer: knows the tensors' labels.
    :param tensors: the operands.
    :param shape: of the result.
    :param reason: why channels that meet an unlabelled dimension are pinned.
    :return: the result's labels, one entry a dimension.
    """
    rank = len(shape)
    result: list[LabelArray | None] = [None] * rank
    for d in range(rank):
        joined: LabelArray | None = None
        fixed = False
        filled = []
        for tensor in tensors:
            own = d - (rank - tensor.dim())
            if own < 0:
                continue
            array = tracer.labels(tensor)[own]
            if tensor.shape[own] != shape[d]:
                kind = "structural" if tracer.is_constant(tensor) else "pinned"
                tracer.pin(array, "a single channel is broadcast over many", kind=kind)
            elif array is None:
                if tracer.is_uniform(tensor) and shape[d] > 1:
                    filled.append(tensor)
                else:
                    fixed = fixed or (shape[d] > 1 and tensor.stride(own) > 0)
            elif joined is None:
                joined = array
            else:
                tracer.unify(joined, array)
        if joined is not None and fixed:
            tracer.pin(joined, reason)
        for tensor in filled if joined is not None else ():
            tracer.same(joined, tracer.width(tensor, d - (rank - tensor.dim())), reason)
        result[d] = joined
    return tuple(result)


@rule("copy_")
def copy_into(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Writing into part of a tensor that exists: the part's labels meet the source's."""
    target, source = args[0], args[1]
    tracer.not_uniform(target)
    if target._is_view() or target.shape != source.shape:
        broadcast(tracer, [target, source], target.shape, "written into a tensor of fixed size")
    else:
        tracer.set(target, tracer.labels(source))


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "bernoulli",
    "clone", "detach", "alias", "_to_copy", "lift_fresh", "native_dropout", "nan_to_num", "as_strided", "as_strided_",
    "_conj", "fill", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "set_", "resize_", "squeeze_copy",
)  # fmt: skip
def passed_on(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Same shape, same channels."""
    source = args[0]
    results = [r for r in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(r, Tensor)]
    for result in results:
        if result.shape == source.shape:
            tracer.set(result, tracer.labels(source))
    if name_of(func) in ("aten.as_strided", "aten.as_strided_") and results[0].shape != source.shape:
        tracer.pin_tensor(source, "re-strided to another shape by aten.as_strided")


@rule("new_zeros", "new_ones", "new_empty", "new_full")
def made_like(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A tensor of a size that the code says, with another at hand: ``dropout2d`` makes its noise so, ``[N, C, 1, 1]``.

    A dimension of the same size has the same channels, unless a number that the code reads says that size.
    """
    source = args[0]
    sizes = list(zip(out.shape, source.shape, strict=False))
    if out.dim() == source.dim() and all(made in (1, own) for made, own in sizes):
        labels = list(tracer.labels(source))
        for d, (made, own) in enumerate(sizes):
            if made != own or tracer.makers(out, d):
                labels[d] = None
        tracer.set(out, labels)


@rule("_local_scalar_dense", "equal", "is_same_size", "_is_all_true", "_is_any_true")
def read_out(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A value leaves the graph: its channels decide control flow."""
    for tensor in args:
        if isinstance(tensor, Tensor):
            tracer.pin_tensor(tensor, f"its value is read by Python through {name_of(func)}")
