"""Convolutions, matrix products, look-up tables and attention: operations that consume channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nncf_compactprune.channels.labels import LabelArray
from nncf_compactprune.channels.rules.base import argument, name_of, rule
from nncf_compactprune.channels.rules.elementwise import broadcast
from nncf_compactprune.channels.terms import AttributeTerm, goes_by_groups
from nncf_compactprune.host.torch_internals import Convolution

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule("convolution", "_convolution")
def convolution(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Convolutions of any dimensionality, grouped, depthwise and transposed.

    Grouped: the same position of every group is one channel, so that all groups keep the same width. Depthwise: the
    output channel is the input channel. Where each group makes one channel of several, these go together.
    """
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    batched = x.dim() == weight.dim()
    labels_in = tracer.width(x, 1 if batched else 0)
    labels_weight = tracer.labels(weight)
    for array in labels_weight[2:]:
        tracer.pin(array, "kernel size", kind="structural")
    first, second = labels_weight[0], labels_weight[1]
    if first is None and weight.shape[0] == groups > 1 and weight.stride(0) == 0:
        first = labels_in  # one filter, stretched over all channels
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
        tracer.mark(weight_out, "producer")
        tracer.mark(weight_in, "consumer")
        tracer.same(weight_in, labels_in, "consumes a fixed input")
        result = weight_out
    else:
        channels, other = (weight_in, weight_out) if transposed else (weight_out, weight_in)
        if channels is not None and other is None and weight.shape[1] == 1:
            result = _depthwise(tracer, groups, labels_in, channels)  # a weight that was squeezed on its way
        else:
            result = _grouped(tracer, groups, labels_in, weight_in, weight_out, transposed)
    if bias is not None:
        bias_labels = tracer.labels(bias)[0]
        tracer.mark(bias_labels, "producer")
        tracer.same(result, bias_labels, "has a fixed bias")
    labels: list[LabelArray | None] = [None] * out.dim()
    labels[1 if batched else 0] = result
    tracer.set(out, labels)


def _depthwise(tracer: Tracer, groups: int, labels_in: LabelArray | None, channels: LabelArray) -> LabelArray:
    """A group is a channel, with one output or several: they go together."""
    tracer.mark(channels, "producer")
    per_group = channels.reshape(groups, -1)
    if per_group.shape[1] > 1:
        tracer.unify(per_group[:, 1:], per_group[:, :1])
    of_groups = np.ascontiguousarray(per_group[:, 0])
    _counted(tracer, groups, of_groups)
    tracer.same(of_groups, labels_in, "consumes a fixed input")
    return channels


def _counted(tracer: Tracer, groups: int, labels: LabelArray) -> None:
    """Where code of its own gives the number of groups (``groups=self.channels``), it follows. A layer's own does."""
    if not isinstance(tracer.running, Convolution):
        for number in tracer.numbers_in_code():
            if number.value == groups:
                tracer.note_attribute(AttributeTerm(number.module, number.attribute, 1, labels))


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
    outputs = part.size * groups if transposed else full.size
    inputs = full.size if transposed else part.size * groups
    if inputs == groups:
        # depthwise (with a channel multiplier): a group is a channel
        tracer.pin(part, "depthwise", kind="structural")
        if not transposed:
            return _depthwise(tracer, groups, labels_in, full)
        tracer.mark(full, "producer")
        _counted(tracer, groups, full)
        tracer.same(full, labels_in, "consumes a fixed input")
        return np.repeat(full, part.size)
    if goes_by_groups(groups, inputs, outputs):
        # a group makes one channel of several: these go together
        tracer.pin(part, "one channel of a group", kind="structural")
        tracer.mark(full, "producer")
        tracer.unify(per_group[:, 1:], per_group[:, :1])
        made = np.ascontiguousarray(per_group[:, 0])
        _counted(tracer, groups, made)
        tracer.same(np.repeat(made, inputs // groups), labels_in, "consumes a fixed input")
        return made
    tracer.unify(per_group[1:], per_group[:1])
    tracer.mark(weight_out, "producer")
    tracer.mark(weight_in, "consumer")
    if transposed:
        tracer.same(full, labels_in, "consumes a fixed input")
        return np.tile(part, groups)
    if labels_in is None:
        tracer.pin(part, "consumes a fixed input")
    else:
        tracer.unify(labels_in.reshape(groups, -1), part[None, :])
    return full


@rule("mm", "addmm", "bmm", "baddbmm", "linear", "_addmm_activation")
def matrix_product(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Matrix products: the contracted dimensions are the same channels, the outer ones pass on."""
    name = name_of(func).removeprefix("aten.")
    bias, a, b = (args[0], args[1], args[2]) if "add" in name else (None, args[0], args[1])
    labels_a, labels_b = tracer.labels(a), tracer.labels(b)
    if name == "linear":
        bias = argument(args, kwargs, 2, "bias")
        labels_b = labels_b[::-1]
    inner_a, inner_b = tracer.width(a, -1) if tracer.is_constant(b) else labels_a[-1], labels_b[-2]
    outer = labels_b[-1]
    if tracer.is_constant(b):
        tracer.mark(inner_b, "consumer")
        tracer.mark(outer, "producer")
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
            tracer.mark(tracer.labels(bias)[0], "producer")
        broadcast(tracer, [bias, out], out.shape, f"meets a fixed tensor in {name_of(func)}")


@rule("mv", "dot", "vdot")
def vector_product(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A vector is contracted: its channels are those of the other's last dimension."""
    a, vector = tracer.labels(args[0]), tracer.labels(args[1])
    if tracer.is_constant(args[0]):
        tracer.mark(a[-1], "consumer")
        tracer.mark(a[0] if len(a) > 1 else None, "producer")
    inner = tracer.same(a[-1], vector[0], f"multiplied with a fixed vector in {name_of(func)}")
    tracer.count_macs(args[0].numel(), *a[:-1], inner)
    tracer.set(out, a[:-1])


@rule("_grouped_mm")
def product_of_groups(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Rows of the first operand meet one of several matrices each, ``[groups, in, out]``: the experts of a mixture.

    The matrices keep the same widths. They stay themselves: what goes where is decided by values. The operation wants
    rows of a multiple of 16 bytes.
    """
    rows, matrices = args[0], args[1]
    if rows.dim() != 2 or matrices.dim() != 3:
        tracer.no_rule(func, args, kwargs, "no rule for these shapes of the operation")
        return
    groups, inner, outer = tracer.labels(matrices)
    tracer.pin(groups, "experts of a mixture, among which the router chooses")
    tracer.mark(inner, "consumer")
    tracer.mark(outer, "producer")
    for dim in (inner, outer):
        tracer.align(dim, max(1, 16 // matrices.element_size()))
    across, width = tracer.labels(rows)
    tracer.same(width, inner, f"multiplied with a fixed matrix in {name_of(func)}")
    tracer.count_macs(rows.numel() * matrices.shape[2], across, inner, outer)
    tracer.set(out, [across, outer])


@rule("embedding")
def embedding(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A table look-up: the width passes on, the rows stay."""
    rows, width = tracer.labels(args[0])
    tracer.pin(rows, "rows of a look-up table", kind="structural")
    tracer.mark(width, "producer")
    tracer.set(out, [None] * (out.dim() - 1) + [width])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Look-ups, reduced over each bag."""
    rows, width = tracer.labels(args[0])
    tracer.pin(rows, "rows of a look-up table", kind="structural")
    tracer.mark(width, "producer")
    tracer.set(out[0], [None, width])


@rule("_trilinear")
def trilinear(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """``nn.Bilinear``: three tensors are stretched to one shape, multiplied, and summed over some dimensions."""
    weight = args[1]
    shape = [0] * (weight.dim() + len(args[4]))
    stretched = []
    for tensor, added in zip(args[:3], args[3:6], strict=True):
        labels = iter(zip(tracer.labels(tensor), tensor.shape, strict=True))
        dims = [(None, 1) if d in added else next(labels) for d in range(len(shape))]
        shape = [max(n, size) for n, (_, size) in zip(shape, dims, strict=True)]
        stretched.append(dims)
    result: list[LabelArray | None] = []
    for d, size in enumerate(shape):
        arrays = [dims[d][0] for dims in stretched if dims[d][1] == size > 1]
        result.append(join(tracer, arrays, f"meets a fixed tensor in {name_of(func)}"))
    if tracer.is_constant(weight):
        out_features, left, right = tracer.labels(weight)
        tracer.mark(out_features, "producer")
        tracer.mark(left, "consumer")
        tracer.mark(right, "consumer")
    tracer.count_macs(int(np.prod(shape)), *result)
    tracer.set(out, [array for d, array in enumerate(result) if d not in args[6]])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Fused attention: two matrix products, head by head.

    Query and key meet in the head dimension. Its width sets the scale unless the code gives one, and stays then. The
    value's width passes on, and so do whole heads, a key's together with those of the queries that share it.
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
    width = join(
        tracer, [tracer.labels(query)[-1], tracer.labels(key)[-1]], "multiplied with a fixed matrix in attention"
    )
    if kwargs.get("scale") is None:
        tracer.pin(width, "width of an attention head, which sets its scale")
    heads_of = next((array for array in result if array is not None), None)
    tracer.count_macs(int(np.prod(query.shape)) * key.shape[-2], heads_of, width)
    tracer.count_macs(
        int(np.prod(query.shape[:-1])) * key.shape[-2] * value.shape[-1], heads_of, tracer.labels(value)[-1]
    )
    tracer.set(out[0] if isinstance(out, (tuple, list)) else out, [*result, None, tracer.labels(value)[-1]])


def join(tracer: Tracer, arrays: Sequence[LabelArray | None], reason: str) -> LabelArray | None:
    """Declares dimensions of equal size the same; where one of them is fixed, all are pinned.

    :param tracer: receives equalities and pins.
    :param arrays: labels of each dimension, None where it is fixed.
    :param reason: why they are pinned.
    :return: the labels of all, or None where there are none.
    """
    labelled = [array for array in arrays if array is not None]
    for array in labelled[1:]:
        tracer.unify(labelled[0], array)
    if labelled and len(labelled) < len(arrays):
        tracer.pin(labelled[0], reason)
    return labelled[0] if labelled else None
