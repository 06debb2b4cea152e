"""Means, sums, norms and maxima over channels, as an RMSNorm or spatial attention takes them: which of the channels are
left after a cut.

Such a mean is no layer with a weight of its own by which it could be recognised: ``x.pow(2).mean(-1)`` may stand
anywhere. So one run with channel labels says, for every mean in turn, which channels it runs over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.channels.labels import LabelArray, LabelSpace
from nncf_compactprune.channels.rules import BY_CONSENT, dims_of, named
from nncf_compactprune.channels.shapes import ValuesNeeded
from nncf_compactprune.channels.tracer import Tracer
from nncf_compactprune.errors import TraceError
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins, default_plugins

Kept: TypeAlias = Mapping[int, Tensor]
"""Dimension to the positions that a mean runs over after the cut; empty where nothing changes."""


def means_over_kept(model: nn.Module, plan: PruningPlan, inputs: Any, plugins: Plugins | None) -> list[Kept]:
    """What each mean of one run is taken over after a cut, in the order of the run.

    :param model: the dense model; it is only run.
    :param plan: what stays.
    :param inputs: what the model is called with.
    :param plugins: where the rules of operations come from; the installed plugins by default.
    :return: one entry a mean; empty where the model does not run on these inputs.
    """
    rules = (plugins or default_plugins()).op_rules
    for shapes_only in (True, False):
        noted = _Means(model, LabelSpace(), rules, shapes_only=shapes_only)
        try:
            noted.run(inputs)
        except ValuesNeeded:
            continue
        except TraceError:
            return []
        gone = removed_labels(noted.space, plan)
        return [_kept(over, gone) for over in noted.calls]
    return []


def removed_labels(space: LabelSpace, plan: PruningPlan) -> npt.NDArray[np.bool_]:
    """Which labels a plan removes, shape ``[labels]``.

    :param space: labels of a run of the dense model.
    :param plan: what stays.
    """
    solution = space.solve()
    gone = np.zeros(len(solution.pin), bool)
    for slot in space.slots:
        if slot.dim in plan.kept.get(slot.parameter, {}):
            labels = np.ones(slot.size, bool)
            labels[plan.indices(slot.parameter, slot.dim).numpy()] = False
            gone[solution.component[slot.start + np.flatnonzero(labels)]] = True
    removed: npt.NDArray[np.bool_] = gone[solution.component]
    return removed


def _kept(over: Mapping[int, LabelArray], gone: npt.NDArray[np.bool_]) -> Kept:
    return {dim: torch.from_numpy(np.flatnonzero(~gone[labels])) for dim, labels in over.items() if gone[labels].any()}


class _Means(Tracer):  # type: ignore[no-untyped-call]
    """Notes the channels of every mean."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[Mapping[int, LabelArray]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in BY_CONSENT:
            labels = self.labels(args[0])
            dims = dims_of(named(func, args, kwargs or {}, "dim"), args[0].dim())
            self.calls.append({d: array for d in dims if (array := labels[d]) is not None})
        return super().__torch_dispatch__(func, types, args, kwargs)
