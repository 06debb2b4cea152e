"""Reductions, and operations along one dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nncf_compactprune.channels.rules.base import dims_of, name_of, named, rule
from nncf_compactprune.channels.rules.elementwise import pointwise

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer

MEANS = ("aten.mean", "aten.var", "aten.std", "aten.var_mean", "aten.std_mean")


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "argmax",
    "argmin", "max.dim", "min.dim", "max", "min", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero",
)  # fmt: skip
def reduce(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Reductions over positions pass channels on; over channels they would change with every removal.

    A mean over channels (an RMSNorm, a LayerNorm written out) is offered by consent, as a LayerNorm is: it then runs
    over those that stay.
    """
    x = args[0]
    labels = tracer.labels(x)
    results = [r for r in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(r, Tensor)]
    if func._overloadname == "other":  # max(a, b), min(a, b)
        pointwise(tracer, func, args, kwargs, out)
        return
    given = named(func, args, kwargs, "dim")
    identity = func._overloadname == "dims" and given is not None and not given  # any and all over no dimension
    dims = [] if identity else dims_of(given, x.dim())
    kind = "approximate" if name_of(func) in MEANS else "pinned"
    for d in dims:
        tracer.pin(labels[d], f"reduced over its channels by {name_of(func)}", kind=kind)
    for result in results:
        if result.dim() == x.dim():
            tracer.set(result, [None if d in dims else array for d, array in enumerate(labels)])
        else:
            tracer.set(result, [array for d, array in enumerate(labels) if d not in dims])


@rule(
    "_softmax", "softmax", "_safe_softmax", "_log_softmax", "log_softmax", "cumsum", "sort", "topk",
    "logcumsumexp", "kthvalue",
)  # fmt: skip
def along(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Works along one dimension, which must not be the channels."""
    x = args[0]
    dim = named(func, args, kwargs, "dim") % max(x.dim(), 1)
    labels = list(tracer.labels(x))
    tracer.pin(labels[dim], f"{name_of(func)} runs over its channels")
    labels[dim] = None
    for result in out if isinstance(out, (tuple, list)) else (out,):
        tracer.set(result, labels)
