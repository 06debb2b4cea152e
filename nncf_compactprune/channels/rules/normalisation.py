"""Normalisation: exact per channel, exact per group, approximate over channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nncf_compactprune.channels.rules.base import name_of, rule

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
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


@rule("native_layer_norm", "_fused_rms_norm")
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


@rule("native_group_norm")
def group_norm(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Statistics per group: a whole group goes or stays, which is exact; one group over all channels is approximate."""
    x = args[0]
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


@rule("_weight_norm_interface")
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
