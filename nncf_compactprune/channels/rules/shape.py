"""Views, permutations, concatenations, splits and slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nncf_compactprune.channels.cuts_by_number import (
    counted_in_view,
    follows_slice,
    follows_split,
    follows_view,
    note_counted,
)
from nncf_compactprune.channels.labels import LabelArray
from nncf_compactprune.channels.rules.base import argument, dims_of, name_of, rule
from nncf_compactprune.channels.running_code import user_location
from nncf_compactprune.channels.views import reshape_labels

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule("view", "_unsafe_view", "_reshape_alias", "view_copy")
def reshape(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Reshape: see :mod:`nncf_compactprune.channels.views`."""
    x = args[0]
    if out.dtype != x.dtype or 0 in x.shape:
        tracer.pin_tensor(x, "reinterpreted by a view")
        return
    sizes = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    free = sizes.index(-1) if -1 in sizes else tracer.free_dimension
    counted, numbers = counted_in_view(tracer, x.shape, out.shape)
    if counted is not None:
        free = counted
    labels = reshape_labels(tracer.labels(x), x.shape, out.shape, tracer.unify, tracer.pin, tracer.head_axis, free=free)
    array = None if counted is None else labels[counted]
    if array is not None:
        note_counted(tracer, numbers, array)
    if tracer.by_number and user_location(1) in tracer.by_number:
        follows_view(tracer, labels)
    tracer.set(out, labels)


@rule("permute", "transpose", "t")
def permute(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Dimensions change places and take their labels along."""
    labels = list(tracer.labels(args[0]))
    name = name_of(func)
    if name == "aten.permute":
        labels = [labels[d] for d in dims_of(args[1], len(labels))] if args[1] else labels
    elif name == "aten.t":
        labels = labels[::-1]
    else:
        a, b = args[1] % len(labels), args[2] % len(labels)
        labels[a], labels[b] = labels[b], labels[a]
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


@rule("expand", "repeat")
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


@rule("cat")
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
            known = [tracer.width(t, d) if tracer.makers(t, d) else tracer.labels(t)[d] for t in tensors]
            result.append(tracer.side_by_side(tensors, known, d))
        else:
            joined = tracer.width(tensors[0], d)
            for tensor in tensors[1:]:
                joined = tracer.same(joined, tracer.width(tensor, d), "concatenated beside a fixed tensor")
            result.append(joined)
    tracer.set(out, result)
    if result[dim] is None:
        tracer.joined(out, tensors, dim)


@rule("stack")
def stack(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """A new dimension; along the others equal positions are the same channel."""
    dim = argument(args, kwargs, 1, "dim", 0) % out.dim()
    labels: list[LabelArray | None] = [None] * (out.dim() - 1)
    for d in range(out.dim() - 1):
        if any(tracer.labels(tensor)[d] is not None for tensor in args[0]):
            labels[d] = tracer.width(args[0][0], d)
            for tensor in args[0][1:]:
                labels[d] = tracer.same(labels[d], tracer.width(tensor, d), "stacked with a fixed tensor")
    labels.insert(dim, None)
    tracer.set(out, labels)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Sequence[Tensor]) -> None:
    """Parts whose sizes the module keeps as numbers go with these; other equal parts lose the same positions, so that
    the cut stays where it is; other unequal parts are cut by constants."""
    x = args[0]
    dim = argument(args, kwargs, 2, "dim", 0) % x.dim()
    labels = list(tracer.labels(x))
    array = labels[dim]
    sizes = [part.shape[dim] for part in out]
    if array is not None and len(sizes) > 1:
        listed = "with_sizes" in name_of(func)
        known = (listed or len(set(sizes)) == 1) and follows_split(tracer, array, sizes)
        if len(set(sizes)) == 1 and not listed:
            rows = array.reshape(len(sizes), -1)
            tracer.unify(rows[1:], rows[:1])
        elif not known:
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


@rule("slice", "select", "unbind")
def cut(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Picks a range, every n-th or one position. Numbers that the module keeps may say where a range is; blocks of n
    go as one for every n-th; other picking among channels is done by constants, so they stay."""
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
        start, end = argument(args, kwargs, 2, "start") or 0, argument(args, kwargs, 3, "end")
        from_end = start < 0 or (end is not None and end < 0)
        start = max(start + array.size, 0) if start < 0 else start
        step = argument(args, kwargs, 4, "step", 1) if name == "slice" else 1
        stop = start + out.shape[dim]
        if 0 <= start < step and step > 1 and array.size == step * out.shape[dim]:
            blocks = array.reshape(-1, step)
            tracer.unify(blocks[:, 1:], blocks[:, :1])
        elif step != 1 or not out.shape[dim] or not follows_slice(tracer, array, start, stop, from_end=from_end):
            tracer.pin(array, f"sliced by constants by aten.{name}")
        labels[dim] = array[start::step][: out.shape[dim]]
    tracer.set(out, labels)


@rule("index", "index_select", "_unsafe_index")
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
        mask = indices[0] if used == [0] and indices[0].dtype == torch.bool else None
        if mask is not None and out.dim() == x.dim() - mask.dim() + 1:  # of leading dimensions; the others pass
            for array in labels[: mask.dim()]:
                tracer.pin(array, "picked by a mask")
            tracer.set(out, [None, *labels[mask.dim() :]])
            return
        if any(i is not None and i.dtype == torch.bool for i in indices) or width < 0:
            tracer.pin_tensor(x, "picked by a mask")
            return
        at = len(rest_before)
        tracer.set(out, [*rest[:at], *[None] * width, *rest[at:]])
    else:
        dim = args[1] % x.dim()
        tracer.pin(labels[dim], "picked by an index tensor")
        tracer.set(out, [None if d == dim else array for d, array in enumerate(labels)])


@rule("gather")
def gather(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Picks along one dimension, which must not carry channels. The index is as wide as the channels elsewhere, which
    its code has to see to."""
    x, dim, index = args[:3]
    labels: list[LabelArray | None] = [None] * out.dim()
    for d, array in enumerate(tracer.labels(x)):
        if d == dim % max(x.dim(), 1) or index.shape[d] != x.shape[d]:
            tracer.pin(array, "picked by an index tensor")
        else:
            labels[d] = array
    tracer.set(out, labels)


@rule("index_add", "index_copy", "index_put", "index_reduce", "scatter", "scatter_add", "scatter_reduce")
def written(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Writes rows to places of a tensor: the dimension of the places must not carry channels, the others agree.

    A tensor without channels is one that was made as wide as they are, which the trial cut has to prove.
    """
    x, name = args[0], name_of(func).removeprefix("aten.").rstrip("_")
    if name == "index_put":
        source, used = args[2], sum(i.dim() if i is not None and i.dtype == torch.bool else 1 for i in args[1])
        if any(i is None for i in args[1]):
            tracer.no_rule(func, args, kwargs, "no rule for these indices of the operation")
            return
        placed = set(range(used))
    else:
        source = args[3] if isinstance(args[3], Tensor) else None
        placed = {args[1] % max(x.dim(), 1)}
    labels = list(tracer.labels(x))
    for d in range(x.dim()):
        own = -1 if source is None else d - x.dim() + source.dim()
        other = tracer.labels(source)[own] if own >= 0 and source.shape[own] == x.shape[d] else None
        if d in placed:
            for array in (labels[d], other):
                tracer.pin(array, "places that an index tensor picks")
            labels[d] = None
        elif (own_labels := labels[d]) is None:
            labels[d] = other
        elif other is not None:
            tracer.unify(own_labels, other)
    tracer.set(out, labels)


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
