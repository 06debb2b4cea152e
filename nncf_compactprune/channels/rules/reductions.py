"""Reductions, and operations along one dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nncf_compactprune.channels.rules.base import argument, dims_of, name_of, rule
from nncf_compactprune.channels.rules.elementwise import pointwise

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


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
