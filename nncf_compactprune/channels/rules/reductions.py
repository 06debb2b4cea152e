"""Reductions, and operations along one dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nncf_compactprune.channels.rules.base import dims_of, name_of, named, rule
from nncf_compactprune.channels.rules.elementwise import pointwise

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer

_aten = torch.ops.aten
#: reductions that go over channels by consent: after the cut, over those that stay
BY_CONSENT = frozenset(
    [
        *(_aten.mean.default, _aten.mean.dim, _aten.var.dim, _aten.var.correction, _aten.std.dim, _aten.std.correction),
        *(_aten.var_mean.correction, _aten.std_mean.correction, _aten.sum.default, _aten.sum.dim_IntList),
        *(_aten.max.dim, _aten.min.dim, _aten.amax.default, _aten.amin.default),
        *(_aten.linalg_vector_norm.default, _aten.norm.ScalarOpt_dim),
    ]
)


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp", "argmax",
    "argmin", "max.dim", "min.dim", "max", "min", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero",
)  # fmt: skip
def reduce(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Reductions over positions pass channels on; over channels they would change with every removal.

    A mean, sum, norm or maximum over channels (an RMSNorm, a LayerNorm written out, spatial attention) is offered by
    consent, as a LayerNorm is: it then runs over those that stay.
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
    kind = "approximate" if func in BY_CONSENT else "pinned"
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
