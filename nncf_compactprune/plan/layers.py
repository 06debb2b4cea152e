"""Whether a cut fits together within each layer: what can be told of a plan without running the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from nncf_compactprune.channels.terms import goes_by_groups
from nncf_compactprune.host.tensors import computed_tensors, own_tensors
from nncf_compactprune.host.torch_internals import Convolution, RunningNorm

Axis = tuple[int, ...]
Dims = Mapping[int, Axis]


@dataclass(frozen=True)
class OwnTensor:
    """A layer's own parameter or buffer.

    :param shape: before the cut.
    :param dims: dimension to kept positions, ascending; a dimension that is not there stays whole.
    """

    shape: Sequence[int]
    dims: Dims

    def __getitem__(self, dim: int) -> Axis:
        return self.dims.get(dim, tuple(range(self.shape[dim])))


Rule = Callable[[Any, Mapping[str, OwnTensor]], str]


def disagreement(module: nn.Module, kept: Mapping[int, Dims]) -> str:
    """What does not fit together within one layer, in words, or empty.

    Weight, bias and statistics of torch's layers must keep the same channels, and groups of channels be cut alike.
    Subclasses are held to the rule of their base; other modules have no rule.

    :param module: the layer, before the cut.
    :param kept: what is kept of each tensor, by ``id``.
    """
    own = {
        name: OwnTensor(tuple(tensor.shape), kept.get(id(tensor), {})) for name, tensor in own_tensors(module).items()
    }
    for name, parts in computed_tensors(module).items():
        originals = [OwnTensor(tuple(part.shape), kept.get(id(part), {})) for part in parts]
        if any(original.dims for original in originals):
            combined = _combined(tuple(getattr(module, name).shape), originals)
            if combined is None:
                return f"the parts of its re-parameterised '{name}' keep different positions"
            own[name] = combined
    if not any(tensor.dims for tensor in own.values()):
        return ""
    return next((rule(module, own) for kind, rule in _RULES.items() if isinstance(module, kind)), "")


def _combined(shape: Sequence[int], originals: Sequence[OwnTensor]) -> OwnTensor | None:
    """The computed parameter as its parts say; None where they contradict each other."""
    dims = {}
    for dim, size in enumerate(shape):
        axes = {o[dim] for o in originals if len(o.shape) == len(shape) and o.shape[dim] == size}
        if len(axes) > 1:
            return None
        if axes:
            dims[dim] = axes.pop()
    return OwnTensor(shape, {dim: axis for dim, axis in dims.items() if len(axis) < shape[dim]})


def _counts(axis: Axis, size: int, blocks: int) -> set[int]:
    """How many positions are kept in each of equal blocks."""
    return set(np.bincount(np.asarray(axis) // (size // blocks), minlength=blocks).tolist())


def _differs(own: Mapping[str, OwnTensor], name: str, dim: int, expected: Axis) -> str:
    if name not in own or own[name][dim] == expected:
        return ""
    return f"its {name} keeps {len(own[name][dim])} channels that are not the {len(expected)} of its weight"


def _convolution(module: Any, own: Mapping[str, OwnTensor]) -> str:
    weight, groups = own["weight"], module.groups
    if any(dim > 1 for dim in weight.dims):
        return "its kernel is cut"
    first, second = weight[0], weight[1]
    by_groups = goes_by_groups(groups, module.in_channels, module.out_channels)
    per_group = weight.shape[0] // groups
    counts = _counts(first, weight.shape[0], groups)
    if by_groups and not counts <= {0, per_group}:
        return "its weight keeps a part of a group whose channels go together"
    if not by_groups and len(counts) > 1:
        return f"its weight keeps different numbers of channels in its {groups} groups"
    outputs = first
    if module.transposed:  # [in, out / groups, ...]
        stay = sorted({i // per_group for i in first}) if by_groups else range(groups)
        outputs = tuple(g * weight.shape[1] + p for g in stay for p in second)
    return _differs(own, "bias", 0, outputs)


def _linear(module: Any, own: Mapping[str, OwnTensor]) -> str:
    return _differs(own, "bias", 0, own["weight"][0])


def _norm(module: Any, own: Mapping[str, OwnTensor]) -> str:
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if name in own]
    return next(filter(None, (_differs(own, name, 0, own[names[0]][0]) for name in names)), "")


def _layer_norm(module: Any, own: Mapping[str, OwnTensor]) -> str:
    dims = range(len(own["weight"].shape)) if "weight" in own else ()
    return next(filter(None, (_differs(own, "bias", dim, own["weight"][dim]) for dim in dims)), "")


def _group_norm(module: Any, own: Mapping[str, OwnTensor]) -> str:
    width = module.num_channels // module.num_groups
    if module.num_groups > 1 and not _counts(own["weight"][0], module.num_channels, module.num_groups) <= {0, width}:
        return f"its weight keeps a part of one of its {module.num_groups} groups"
    return _norm(module, own)


def _embedding(module: Any, own: Mapping[str, OwnTensor]) -> str:
    return "rows of its table are cut" if 0 in own["weight"].dims else ""


_RULES: Mapping[type[nn.Module], Rule] = {
    Convolution: _convolution,
    nn.Linear: _linear,
    RunningNorm: _norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}
