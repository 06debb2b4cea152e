"""What each ATen operation does with channel labels: one rule an operation.

A rule receives the tracer, the operation, its arguments and its result. It passes labels on (``tracer.set``), declares
labels equal (``tracer.unify``), pins them with a reason (``tracer.pin``) and adds the operation's cost
(``tracer.count_macs``). Rules decide nothing about pruning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nncf_compactprune.channels.labels import DimLabels, LabelArray
from nncf_compactprune.channels.views import reshape_labels
from nncf_compactprune.hookspecs import hookimpl

if TYPE_CHECKING:
    from nncf_compactprune.channels.trace import Tracer

Rule = Callable[["Tracer", Any, Sequence[Any], Mapping[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operations (``"aten.cat"``, or one overload: ``"aten.mean.dim"``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name if name == "pointwise" else f"aten.{name}"] = function
        return function

    return register


@hookimpl
def compactprune_op_rules() -> Mapping[str, Rule]:
    """The built-in rules."""
    return RULES


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any = None) -> Any:
    """An operation's argument, given by position or by keyword."""
    return args[index] if len(args) > index else kwargs.get(name, default)


def dims_of(value: Any, rank: int) -> list[int]:
    """Normalises a dim argument (int, list or None for all) to non-negative dims."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v % rank if rank else 0 for v in values]


@functools.cache
def name_of(func: Any) -> str:
    """``aten.mean`` for any overload."""
    return str(func.overloadpacket)


# -- elementwise --------------------------------------------------------------------------------------------------


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
    stretch.
    """
    rank = len(shape)
    result: list[LabelArray | None] = [None] * rank
    for d in range(rank):
        joined: LabelArray | None = None
        fixed = False
        for tensor in tensors:
            own = d - (rank - tensor.dim())
            if own < 0:
                continue
            array = tracer.labels(tensor)[own]
            if tensor.shape[own] != shape[d]:
                kind = "structural" if tracer.is_constant(tensor) else "pinned"
                tracer.pin(array, "a single channel is broadcast over many", kind=kind)
            elif array is None:
                fixed = fixed or shape[d] != 1
            elif joined is None:
                joined = array
            else:
                tracer.unify(joined, array)
        if joined is not None and fixed:
            tracer.pin(joined, reason)
        result[d] = joined
    return tuple(result)


@rule("copy_")
def copy_into(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Writing into part of a tensor that exists: the part's labels meet the source's."""
    target, source = args[0], args[1]
    if target._is_view() or target.shape != source.shape:
        broadcast(tracer, [target, source], target.shape, "written into a tensor of fixed size")
    else:
        tracer.set(target, tracer.labels(source))


@rule(
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "bernoulli", "clone", "detach", "alias", "_to_copy", "lift_fresh",
    "contiguous", "native_dropout", "nan_to_num", "as_strided", "as_strided_", "resolve_conj", "resolve_neg",
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


@rule("_local_scalar_dense", "item", "equal", "is_same_size", "_is_all_true", "_is_any_true")
def read_out(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """A value leaves the graph: its channels decide control flow."""
    for tensor in args:
        if isinstance(tensor, Tensor):
            tracer.pin_tensor(tensor, f"its value is read by Python through {name_of(func)}")


# -- convolutions and matrix products -------------------------------------------------------------------------------


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Convolutions of any dimensionality, grouped, depthwise and transposed.

    Grouped: the same position of every group is one channel, so that all groups keep the same width. Depthwise: the
    output channel is the input channel.
    """
    x, weight, bias = args[0], args[1], args[2]
    if name_of(func) == "aten.convolution" or name_of(func) == "aten._convolution":
        transposed, groups = bool(args[6]), int(args[8])
    else:
        tracer.no_rule(func, args, kwargs, "no rule for this use of the operation")
        return
    batched = x.dim() == weight.dim()
    labels_in = tracer.labels(x)[1 if batched else 0]
    labels_weight = tracer.labels(weight)
    for array in labels_weight[2:]:
        tracer.pin(array, "kernel size", kind="structural")
    first, second = labels_weight[0], labels_weight[1]
    kernel = int(np.prod(weight.shape[2:]))
    if transposed:
        positions = int(np.prod(x.shape)) // x.shape[1 if batched else 0]
        weight_in, weight_out = first, second
    else:
        positions = int(np.prod(out.shape)) // out.shape[1 if batched else 0]
        weight_in, weight_out = second, first
    tracer.count_macs(positions * kernel * weight.shape[0] * weight.shape[1], first, second)
    result: LabelArray | None
    if groups == 1:
        tracer.mark(weight_out, "out")
        tracer.mark(weight_in, "in")
        tracer.same(weight_in, labels_in, "consumes a fixed input")
        result = weight_out
    else:
        result = _grouped(tracer, groups, labels_in, weight_in, weight_out, transposed)
    if bias is not None:
        bias_labels = tracer.labels(bias)[0]
        tracer.mark(bias_labels, "out")
        tracer.same(result, bias_labels, "has a fixed bias")
    labels: list[LabelArray | None] = [None] * out.dim()
    labels[1 if batched else 0] = result
    tracer.set(out, labels)


def _grouped(
    tracer: Tracer,
    groups: int,
    labels_in: LabelArray | None,
    weight_in: LabelArray | None,
    weight_out: LabelArray | None,
    transposed: bool,
) -> LabelArray | None:
    """Unifies a grouped convolution's labels and returns those of its output channels.

    A plain weight is ``[out, in / groups, ...]``, a transposed one ``[in, out / groups, ...]``: one side runs over all
    groups (``full``), the other over one (``part``).
    """
    full, part = (weight_in, weight_out) if transposed else (weight_out, weight_in)
    if full is None or part is None:
        for array in (labels_in, full, part):
            tracer.pin(array, "grouped convolution with a computed weight")
        return None
    per_group = full.reshape(groups, -1)
    if (full.size if transposed else part.size * groups) == groups:
        # depthwise (with a channel multiplier): a group is a channel
        tracer.mark(full, "out")
        tracer.pin(part, "depthwise", kind="structural")
        if transposed:
            tracer.same(full, labels_in, "consumes a fixed input")
            return np.repeat(full, part.size)
        if per_group.shape[1] > 1:
            tracer.unify(per_group[:, 1:], per_group[:, :1])
        tracer.same(np.ascontiguousarray(per_group[:, 0]), labels_in, "consumes a fixed input")
        return full
    tracer.unify(per_group[1:], per_group[:1])
    tracer.mark(weight_out, "out")
    tracer.mark(weight_in, "in")
    if transposed:
        tracer.same(full, labels_in, "consumes a fixed input")
        return np.tile(part, groups)
    if labels_in is None:
        tracer.pin(part, "consumes a fixed input")
    else:
        tracer.unify(labels_in.reshape(groups, -1), part[None, :])
    return full


@rule("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "_addmm_activation")
def matrix_product(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Matrix products: the contracted dimensions are the same channels, the outer ones pass on."""
    name = name_of(func).removeprefix("aten.")
    if name in ("mv", "addmv", "dot") or (name == "matmul" and min(args[0].dim(), args[1].dim()) < 2):
        tracer.no_rule(func, args, kwargs, "no rule for this use of the operation")
        return
    bias, a, b = (args[0], args[1], args[2]) if "add" in name else (None, args[0], args[1])
    labels_a, labels_b = tracer.labels(a), tracer.labels(b)
    if name == "linear":
        bias = argument(args, kwargs, 2, "bias")
        labels_b = labels_b[::-1]
    inner_a, inner_b = labels_a[-1], labels_b[-2]
    outer = labels_b[-1]
    if tracer.is_constant(b):
        tracer.mark(inner_b, "in")
        tracer.mark(outer, "out")
    tracer.same(inner_a, inner_b, f"multiplied with a fixed matrix in {name_of(func)}")
    batch: list[LabelArray | None] = [None] * (out.dim() - 2)
    for d in range(len(batch)):
        pair = [
            labels[d - (out.dim() - len(labels))]
            for labels in (labels_a, labels_b)
            if d - (out.dim() - len(labels)) >= 0 and len(labels) > 2
        ]
        batch[d] = (
            pair[0] if len(pair) == 1 else tracer.same(pair[0], pair[1], f"batched with a fixed tensor in {name}")
        )
    inner = inner_a if inner_a is not None else inner_b
    tracer.count_macs(int(np.prod(out.shape)) * a.shape[-1], *batch, labels_a[-2], inner, outer)
    result = [*batch, labels_a[-2], outer]
    tracer.set(out, result)
    if bias is not None:
        if bias.dim() == 1:
            tracer.mark(tracer.labels(bias)[0], "out")
        broadcast(tracer, [bias, out], out.shape, f"meets a fixed tensor in {name_of(func)}")


@rule("embedding")
def embedding(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A table look-up: the width passes on, the rows stay."""
    rows, width = tracer.labels(args[0])
    tracer.pin(rows, "rows of a look-up table", kind="structural")
    tracer.mark(width, "out")
    tracer.set(out, [None] * (out.dim() - 1) + [width])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Fused attention: two matrix products, head by head.

    Query and key meet in the head dimension, whose width sets the scale, so it stays; the value's width passes on,
    and so do whole heads, a key's together with those of the queries that share it.
    """
    query, key, value = args[0], args[1], args[2]
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None)
    result: list[LabelArray | None] = []
    for d in range(query.dim() - 2):
        heads = []
        for tensor in (query, key, value):
            array = tracer.labels(tensor)[d]
            shared_by = query.shape[d] // tensor.shape[d]
            if tensor.shape[d] == 1 < query.shape[d]:
                tracer.pin(array, "the one head of keys and values that all queries share")
            else:
                heads.append(None if array is None else np.repeat(array, shared_by))
        if mask is not None:
            own = d - query.dim() + mask.dim()
            if own >= 0 and mask.shape[own] > 1:
                heads.append(tracer.labels(mask)[own])
        result.append(join(tracer, heads, "attention heads that meet fixed ones"))
    for tensor in (query, key, value):
        tracer.pin(tracer.labels(tensor)[-2], "positions of attention")
    for tensor in (query, key):
        tracer.pin(tracer.labels(tensor)[-1], "width of an attention head, which sets its scale")
    heads_of = next((array for array in result if array is not None), None)
    tracer.count_macs(int(np.prod(query.shape)) * key.shape[-2], heads_of)
    tracer.count_macs(int(np.prod(query.shape[:-1])) * key.shape[-2] * value.shape[-1], heads_of)
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, [*result, None, tracer.labels(value)[-1]])


def join(tracer: Tracer, arrays: Sequence[LabelArray | None], reason: str) -> LabelArray | None:
    """Declares dimensions of equal size the same; where one of them is fixed, all are pinned."""
    labelled = [array for array in arrays if array is not None]
    for array in labelled[1:]:
        tracer.unify(labelled[0], array)
    if labelled and len(labelled) < len(arrays):
        tracer.pin(labelled[0], reason)
    return labelled[0] if labelled else None


# -- normalisation ---------------------------------------------------------------------------------------------------


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
def batch_norm(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Per-channel affine: parameters and statistics follow dimension 1.

    Of a weight (weight standardisation), the statistics run over its input channels, and change with every removal.
    """
    x = args[0]
    labels = tracer.labels(x)
    if tracer.is_constant(x):
        for array in labels[2:]:
            tracer.pin(array, "weights standardised over their input channels", kind="approximate")
    channel = labels[1]
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor) and tensor.dim() == 1:
            own = tracer.labels(tensor)[0]
            tracer.mark(own, "norm")
            channel = tracer.same(channel, own, "normalises a fixed tensor") if own is not None else channel
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, [labels[0], channel, *labels[2:]])


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Statistics over the channels themselves: removal changes them, so it is offered only by consent."""
    x, shape = args[0], args[1]
    labels = list(tracer.labels(x))
    kind = name_of(func).removeprefix("aten.")
    affine = [t for t in (*args[2:4], kwargs.get("weight"), kwargs.get("bias")) if isinstance(t, Tensor)]
    for offset in range(len(shape)):
        d = x.dim() - len(shape) + offset
        joined = labels[d]
        for tensor in affine:
            own = tracer.labels(tensor)[offset]
            tracer.mark(own, "norm")
            joined = tracer.same(joined, own, "normalises a fixed tensor")
        labels[d] = joined
        if joined is not None:
            if not affine or "rms" in kind:
                tracer.pin(joined, f"normalised over its channels by {kind} without a weight of its own")
            else:
                tracer.pin(joined, f"normalised over its channels by {kind}", kind="approximate")
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, labels)


@rule("native_group_norm", "group_norm")
def group_norm(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Statistics per group: a whole group goes or stays, which is exact; one group over all channels is approximate."""
    x = args[0]
    if name_of(func) == "aten.group_norm":
        groups, weight, bias = int(args[1]), argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    else:
        weight, bias, groups = args[1], args[2], int(args[6])
    labels = list(tracer.labels(x))
    channel = labels[1]
    for tensor in (weight, bias):
        if tensor is not None:
            own = tracer.labels(tensor)[0]
            tracer.mark(own, "norm")
            channel = tracer.same(channel, own, "normalises a fixed tensor")
    if channel is not None:
        if weight is None:
            tracer.pin(channel, "group normalisation without a weight")
        elif groups == 1:
            tracer.pin(channel, "normalised over its channels by group_norm of one group", kind="approximate")
        else:
            rows = channel.reshape(groups, -1)
            tracer.unify(rows[:, 1:], rows[:, :1])
    labels[1] = channel
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, labels)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Weight normalisation: the magnitude's long dimension is the direction's."""
    direction, magnitude = args[0], args[1]
    labels = list(tracer.labels(direction))
    for d, array in enumerate(tracer.labels(magnitude)):
        if magnitude.shape[d] == direction.shape[d]:
            labels[d] = tracer.same(labels[d], array, "scaled by a fixed tensor")
        else:
            tracer.pin(array, "size 1", kind="structural")
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, labels)


# -- pooling, resampling, padding --------------------------------------------------------------------------------------


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "upsample_linear1d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d",
    "grid_sampler_3d",
    "fractional_max_pool2d",
)  # fmt: skip
def spatial(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Works inside each channel: batch and channel pass, positions change."""
    x = args[0]
    labels = tracer.labels(x)
    for result in out if isinstance(out, (tuple, list)) else (out,):
        passed: list[LabelArray | None] = [None] * result.dim()
        for d, array in enumerate(labels):
            if array is not None:
                if x.shape[d] == result.shape[d] and (d < 2 or x.dim() == 3):
                    passed[d] = array
                else:
                    tracer.pin(array, f"resampled as a spatial dimension by {name_of(func)}")
        tracer.set(result, passed)


@rule("constant_pad_nd", "pad")
def constant_pad(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Padding a channel dimension inserts channels that must stay (their count is written in the code)."""
    x, pad = args[0], args[1]
    labels = list(tracer.labels(x))
    for k in range(len(pad) // 2):
        d = x.dim() - 1 - k
        array = labels[d]
        low, high = int(pad[2 * k]), int(pad[2 * k + 1])
        if array is None or (low == 0 and high == 0):
            continue
        if low < 0 or high < 0:
            tracer.pin(array, "cropped by a constant")
            labels[d] = array[max(-low, 0) : array.size - max(-high, 0)]
            array = labels[d]
        parts = [tracer.space.fresh(max(low, 0)), array, tracer.space.fresh(max(high, 0))]
        tracer.pin(parts[0], "channels inserted by padding")
        tracer.pin(parts[2], "channels inserted by padding")
        labels[d] = np.concatenate([p for p in parts if p is not None])
    tracer.set(out, labels)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """r × r channels become one of r × r as many positions, or the reverse."""
    labels = list(tracer.labels(args[0]))
    square = int(args[1]) ** 2
    array = labels[-3]
    if array is not None:
        if name_of(func) == "aten.pixel_shuffle":
            rows = array.reshape(-1, square)
            tracer.unify(rows[:, 1:], rows[:, :1])
            labels[-3] = np.ascontiguousarray(rows[:, 0])
        else:
            labels[-3] = np.repeat(array, square)
    tracer.set(out, labels)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Transposes (groups, width): every group keeps the same positions."""
    labels = list(tracer.labels(args[0]))
    array = labels[1]
    if array is not None:
        rows = array.reshape(int(args[1]), -1)
        tracer.unify(rows[1:], rows[:1])
        labels[1] = np.ascontiguousarray(rows.T).reshape(-1)
    tracer.set(out, labels)


@rule("im2col")
def im2col(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Patches stacked into channels: each channel repeats for every kernel position."""
    labels = tracer.labels(args[0])
    array = labels[-3]
    result: list[LabelArray | None] = [None] * out.dim()
    if array is not None:
        result[-2] = np.repeat(array, out.shape[-2] // array.size)
    tracer.set(out, result)


@rule("col2im")
def col2im(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """The reverse: a channel's kernel positions go or stay together."""
    array = tracer.labels(args[0])[-2]
    result: list[LabelArray | None] = [None] * out.dim()
    if array is not None:
        rows = array.reshape(out.shape[-3], -1)
        tracer.unify(rows[:, 1:], rows[:, :1])
        result[-3] = np.ascontiguousarray(rows[:, 0])
    tracer.set(out, result)


# -- shape -------------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy")
def reshape(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Reshape: see :mod:`nncf_compactprune.channels.views`."""
    x = args[0]
    if out.dtype != x.dtype or 0 in x.shape:
        tracer.pin_tensor(x, "reinterpreted by a view")
        return
    labels = reshape_labels(tracer.labels(x), x.shape, out.shape, tracer.unify, tracer.pin, tracer.head_axis)
    tracer.set(out, labels)


@rule("permute", "transpose", "t", "movedim", "numpy_T", "swapaxes")
def permute(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Dimensions change places and take their labels along."""
    labels = list(tracer.labels(args[0]))
    name = name_of(func)
    if name == "aten.permute":
        labels = [labels[d] for d in dims_of(args[1], len(labels))] if args[1] else labels
    elif name == "aten.t":
        labels = labels[::-1]
    elif name in ("aten.transpose", "aten.swapaxes"):
        a, b = args[1] % len(labels), args[2] % len(labels)
        labels[a], labels[b] = labels[b], labels[a]
    else:
        tracer.no_rule(func, args, kwargs, "no rule for this use of the operation")
        return
    tracer.set(out, labels)


@rule("unsqueeze", "squeeze")
def squeeze(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Dimensions of size 1 come and go."""
    x = args[0]
    labels = list(tracer.labels(x))
    if name_of(func) == "aten.unsqueeze":
        labels.insert(args[1] % (x.dim() + 1), None)
    else:
        gone = [d for d in dims_of(args[1] if len(args) > 1 else None, x.dim()) if x.shape[d] == 1]
        for d in gone:
            tracer.pin(labels[d], "a single channel squeezed away")
        labels = [array for d, array in enumerate(labels) if d not in gone]
    tracer.set(out, labels)


@rule("expand", "repeat", "tile")
def expand(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Repeats whole dimensions; a repeated channel is one channel."""
    x = args[0]
    result: list[LabelArray | None] = [None] * out.dim()
    for d, array in enumerate(tracer.labels(x)):
        at = d + out.dim() - x.dim()
        if array is None:
            continue
        if x.shape[d] == out.shape[at]:
            result[at] = array
        elif name_of(func) == "aten.expand":
            kind = "structural" if tracer.is_constant(x) else "pinned"
            tracer.pin(array, "a single channel is broadcast over many", kind=kind)
        else:
            result[at] = np.tile(array, out.shape[at] // x.shape[d])
    tracer.set(out, result)


@rule("cat", "concat")
def concatenate(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Channels side by side; a part without channels is fixed."""
    tensors = [t for t in args[0] if t.dim() == out.dim()]
    dim = argument(args, kwargs, 1, "dim", 0) % out.dim()
    result: list[LabelArray | None] = []
    for d in range(out.dim()):
        arrays = [tracer.labels(t)[d] for t in tensors]
        if all(array is None for array in arrays):
            result.append(None)
        elif d == dim:
            parts = []
            for tensor, array in zip(tensors, arrays, strict=True):
                if array is None:
                    array = tracer.space.fresh(tensor.shape[d])
                    tracer.pin(array, "concatenated with a fixed part")
                parts.append(array)
            result.append(np.concatenate(parts))
        else:
            joined = arrays[0]
            for array in arrays[1:]:
                joined = tracer.same(joined, array, "concatenated beside a fixed tensor")
            result.append(joined)
    tracer.set(out, result)


@rule("stack")
def stack(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A new dimension; along the others equal positions are the same channel."""
    dim = argument(args, kwargs, 1, "dim", 0) % out.dim()
    labels = list(tracer.labels(args[0][0]))
    for tensor in args[0][1:]:
        for d, array in enumerate(tracer.labels(tensor)):
            if labels[d] is not None or array is not None:
                labels[d] = tracer.same(labels[d], array, "stacked with a fixed tensor")
    labels.insert(dim, None)
    tracer.set(out, labels)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split")
def split(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Tensor]) -> None:
    """Equal parts lose the same positions, so that the cut stays where it is; unequal parts are cut by constants."""
    x = args[0]
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    labels = list(tracer.labels(x))
    array = labels[dim]
    sizes = [part.shape[dim] for part in out]
    if array is not None and len(sizes) > 1:
        if len(set(sizes)) == 1 and "with_sizes" not in name_of(func):
            rows = array.reshape(len(sizes), -1)
            tracer.unify(rows[1:], rows[:1])
        else:
            tracer.pin(array, f"split into constant sizes {sizes}")
    offset = 0
    for part, size in zip(out, sizes, strict=True):
        tracer.set(part, [a if d != dim or a is None else a[offset : offset + size] for d, a in enumerate(labels)])
        offset += size


@rule("glu")
def glu(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A gated linear unit: both halves are the same channels."""
    labels = list(tracer.labels(args[0]))
    dim = argument(args, kwargs, 1, "dim", -1) % out.dim()
    array = labels[dim]
    if array is not None:
        first, second = array.reshape(2, -1)
        tracer.unify(first, second)
        labels[dim] = first
    tracer.set(out, labels)


@rule("slice", "narrow", "select", "unbind")
def cut(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Picks a range or one position; picking among channels is done by constants, so they stay."""
    x = args[0]
    name = name_of(func).removeprefix("aten.")
    dim = argument(args, kwargs, 1, "dim", 0) % x.dim()
    labels = list(tracer.labels(x))
    array = labels[dim]
    if name in ("select", "unbind"):
        tracer.pin(array, f"one channel picked by {name}")
        del labels[dim]
        for result in out if isinstance(out, (tuple, list)) else (out,):
            tracer.set(result, labels)
        return
    if array is not None and out.shape[dim] != x.shape[dim]:
        start = argument(args, kwargs, 2, "start") or 0
        tracer.pin(array, f"sliced by constants by aten.{name}")
        start = max(start + array.size, 0) if start < 0 else start
        step = argument(args, kwargs, 4, "step", 1) if name == "slice" else 1
        labels[dim] = array[start::step][: out.shape[dim]]
    tracer.set(out, labels)


@rule("index", "index_select", "gather", "index_put", "scatter", "scatter_add", "take_along_dim", "_unsafe_index")
def pick(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Picks by index tensors: dimensions that are indexed must not carry channels, the others pass."""
    x = args[0]
    labels = tracer.labels(x)
    name = name_of(func).removeprefix("aten.")
    if name in ("index", "_unsafe_index"):
        indices = list(args[1]) + [None] * (x.dim() - len(args[1]))
        used = [d for d, index in enumerate(indices) if index is not None]
        contiguous = used == list(range(used[0], used[-1] + 1))
        width = out.dim() - (x.dim() - len(used))
        for d in used:  # of a parameter: rows of a look-up table, which never were channels
            kind = "structural" if tracer.is_constant(x) else "pinned"
            tracer.pin(labels[d], "picked by an index tensor", kind=kind)
        rest_before = list(labels[: used[0]]) if contiguous else []
        rest = [labels[d] for d in range(x.dim()) if d not in used]
        bool_index = any(i is not None and not i.is_floating_point() and str(i.dtype) == "torch.bool" for i in indices)
        if bool_index or width < 0:
            tracer.pin_tensor(x, "picked by a mask")
            return
        at = len(rest_before)
        tracer.set(out, [*rest[:at], *[None] * width, *rest[at:]])
    elif name == "index_select":
        dim = args[1] % x.dim()
        tracer.pin(labels[dim], "picked by an index tensor")
        tracer.set(out, [None if d == dim else array for d, array in enumerate(labels)])
    else:
        tracer.no_rule(func, args, kwargs, "no rule for this use of the operation")


@rule("roll", "flip", "rot90", "tril", "triu", "unfold")
def positions(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Moves positions of some dimensions; those must not be channels."""
    x = args[0]
    name = name_of(func).removeprefix("aten.")
    labels = list(tracer.labels(x))
    if name == "roll":
        moved = dims_of(argument(args, kwargs, 2, "dims", []), x.dim())
    elif name in ("flip", "unfold"):
        moved = dims_of(args[1], x.dim())
    elif name == "rot90":
        moved = dims_of(argument(args, kwargs, 2, "dims", [0, 1]), x.dim())
    else:
        moved = [x.dim() - 2, x.dim() - 1]
    for d in moved:
        tracer.pin(labels[d], f"reordered by aten.{name}")
        labels[d] = None
    tracer.set(out, labels + [None] * (out.dim() - x.dim()))


# -- reductions and order --------------------------------------------------------------------------------------------


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "argmax",
    "argmin", "max.dim", "min.dim", "max", "min", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero",
)  # fmt: skip
def reduce(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Reductions over positions pass channels on; over channels they would change with every removal."""
    x = args[0]
    labels = tracer.labels(x)
    results = [r for r in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(r, Tensor)]
    if func._overloadname == "other":  # max(a, b), min(a, b)
        pointwise(tracer, func, args, kwargs, out)
        return
    vector_norm = name_of(func) in ("aten.linalg_vector_norm", "aten.norm")
    dims = dims_of(argument(args, kwargs, 2 if vector_norm else 1, "dim"), x.dim())
    if func._overloadname in ("default", "dtype") and not vector_norm and name_of(func) not in (
        "aten.amax", "aten.amin", "aten.logsumexp", "aten.argmax", "aten.argmin",
    ):  # fmt: skip
        dims = list(range(x.dim()))
    for d in dims:
        tracer.pin(labels[d], f"reduced over its channels by {name_of(func)}")
    for result in results:
        if result.dim() == x.dim():
            tracer.set(result, [None if d in dims else array for d, array in enumerate(labels)])
        else:
            tracer.set(result, [array for d, array in enumerate(labels) if d not in dims])


@rule(
    "_softmax",
    "softmax",
    "_log_softmax",
    "log_softmax",
    "cumsum",
    "sort",
    "argsort",
    "topk",
    "logcumsumexp",
    "kthvalue",
)
def along(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Works along one dimension, which must not be the channels."""
    x = args[0]
    at = 2 if name_of(func) in ("aten.topk", "aten.kthvalue") else 1
    dim = argument(args, kwargs, at, "dim", -1) % max(x.dim(), 1)
    labels = list(tracer.labels(x))
    tracer.pin(labels[dim], f"{name_of(func)} runs over its channels")
    labels[dim] = None
    for result in out if isinstance(out, (tuple, list)) else (out,):
        tracer.set(result, labels)
