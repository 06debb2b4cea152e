"""Pooling, resampling, padding and shuffles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nncf_compactprune.channels.labels import LabelArray
from nncf_compactprune.channels.rules.base import name_of, rule

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
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


@rule("max_unpool2d", "max_unpool3d")
def unpool(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Puts the values of each channel where that channel's maxima were: the indices have the same channels."""
    x, indices = args[0], args[1]
    labels = tracer.labels(x)
    passed: list[LabelArray | None] = [None] * out.dim()
    for d, (own, other) in enumerate(zip(labels, tracer.labels(indices), strict=True)):
        if d <= out.dim() - (3 if name_of(func) == "aten.max_unpool2d" else 4):
            passed[d] = tracer.same(own, other, "unpooled by fixed indices")
        else:
            tracer.pin(own, f"resampled as a spatial dimension by {name_of(func)}")
    tracer.set(out, passed)


@rule("constant_pad_nd")
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
