"""The pruning plan: what stays of every parameter, frozen, printable, JSON both ways.

A plan is decided on a dense model and can be replayed on any model with the same parameter names and shapes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from nncf_compactprune.channels.groups import ChannelGraph, fingerprint
from nncf_compactprune.channels.tensors import model_tensors
from nncf_compactprune.errors import PlanError

PLAN_FORMAT = "nncf_compactprune.plan"
PLAN_VERSION = 1
MAX_PLAN_CHARACTERS = 2**26
MAX_COUNT = 2**62
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    :param macs: multiply-accumulates for one example.
    :param params: number of parameters.
    """

    macs: int
    params: int


@dataclass(frozen=True)
class GroupChange:
    """Width of one group before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class PruningPlan:
    """Which positions of which parameters stay.

    :param kept: parameter or buffer name to dimension to kept positions, ascending.
    :param fingerprint: SHA-256 of the dense model's parameter names and shapes.
    :param before: dense cost; :param after: cost of the pruned model.
    :param groups: width of every group before and after.
    :param pinned: (module, channels, reason) of what could not be pruned.
    :param algorithm: what decided it.
    :param approximate: groups whose removal changes a normalisation over channels, with the reason.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    fingerprint: str
    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...] = ()
    pinned: tuple[tuple[str, int, str], ...] = ()
    algorithm: str = ""
    approximate: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(dims)) for name, dims in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(frozen))
        object.__setattr__(self, "_indices", {})

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed."""
        return not self.kept

    def indices(self, name: str, dim: int) -> Tensor:
        """Kept positions of one dimension as an int64 tensor on the CPU, made once."""
        cache: dict[tuple[str, int], Tensor] = self._indices  # type: ignore[attr-defined]
        if (name, dim) not in cache:
            cache[name, dim] = torch.tensor(self.kept[name][dim], dtype=torch.int64)
        return cache[name, dim]

    def selection(self, name: str) -> dict[int, Tensor]:
        """Kept positions of every cut dimension of a parameter."""
        return {dim: self.indices(name, dim) for dim in self.kept.get(name, {})}

    def masked_dims(self, name: str) -> dict[int, Tensor]:
        """What a mask of one parameter zeroes: everything that goes, but for the direction of a weight-normalised
        weight where its magnitude goes too (a zero direction has no norm; its zero magnitude is enough)."""
        stem, _, leaf = name.rpartition(".")
        magnitude = {"original1": "original0", "weight_v": "weight_g"}.get(leaf)
        beside = self.kept.get(f"{stem}.{magnitude}", {}) if magnitude else {}
        return {dim: positions for dim, positions in self.selection(name).items() if dim not in beside}

    def shapes(self, dense: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes after the cut."""
        return {
            name: tuple(len(self.kept[name][d]) if d in self.kept.get(name, {}) else n for d, n in enumerate(shape))
            for name, shape in dense.items()
        }

    def validate(self, model: nn.Module) -> None:
        """Checks that the plan fits a model, before anything is touched.

        :raises PlanError: another model, unknown parameter, dimension out of range, positions out of range, repeated,
            unordered or empty.
        """
        shapes = model_tensors(model).shapes()
        for name, dims in self.kept.items():
            if name not in shapes:
                msg = f"plan: parameter '{_shown(name)}' does not exist in {type(model).__name__}. Use the plan's own model."
                raise PlanError(msg)
            for dim in dims:
                _validate_positions(name, shapes[name], dim, self.indices(name, dim).numpy())
        if fingerprint(shapes) != self.fingerprint:
            msg = (
                f"plan: made for another model: parameter names or shapes of {type(model).__name__} differ from the "
                "dense model it was made on. Build that model first (same architecture, same options, not yet pruned)."
            )
            raise PlanError(msg)

    def validate_consistency(self, model: nn.Module) -> None:
        """Checks that the cut fits together, as far as that shows without running the model: to be called after
        :meth:`validate` on a plan of doubtful origin.

        The stated parameter counts must be those of the model and of the cut, and within one layer weight, bias and
        statistics must keep the same channels, groups of channels being cut alike. A producer and a consumer in
        different layers are only compared by a run, see :func:`nncf_compactprune.surgery.prune_in_place`.

        :raises PlanError: naming the layer and what disagrees.
        """
        parameters = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("__nncf_hooks")}
        stated = {"before": (self.before, parameters), "after": (self.after, self.shapes(parameters))}
        for when, (cost, shapes) in stated.items():
            count = sum(math.prod(shape) for shape in shapes.values())
            if cost.params != count:
                msg = f"plan: {when}: states {cost.params} parameters, but its cut makes it {count}. The plan was altered."
                raise PlanError(msg)
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        kept = {id(tensors[name]): dims for name, dims in self.kept.items()}
        for name, module in model.named_modules():
            finding = _disagreement(module, kept)
            if finding:
                msg = f"plan: {type(module).__name__} '{name}': {finding}. The plan does not fit together."
                raise PlanError(msg)

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan followed by one made on the pruned model, as one plan for the dense model.

        :raises PlanError: ``later`` keeps positions that this plan does not leave.
        """
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            for dim, positions in dims.items():
                base = kept.setdefault(name, {}).get(dim)
                if base is not None:
                    _validate_positions(name, {dim: len(base)}, dim, positions)
                kept[name][dim] = positions if base is None else tuple(base[p] for p in positions)
        return dataclasses.replace(
            later,
            kept=kept,
            fingerprint=self.fingerprint,
            before=self.before,
            groups=_joined(self.groups, later.groups),
            approximate=tuple(dict.fromkeys((*self.approximate, *later.approximate))),
        )

    def to_json(self) -> str:
        """The plan as JSON text."""
        document = {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "algorithm": self.algorithm,
            "fingerprint": self.fingerprint,
            "before": vars(self.before),
            "after": vars(self.after),
            "groups": [vars(group) for group in self.groups],
            "pinned": [list(entry) for entry in self.pinned],
            "approximate": [list(entry) for entry in self.approximate],
            "kept": {name: {str(d): list(k) for d, k in dims.items()} for name, dims in self.kept.items()},
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Reads a plan; nothing is believed until :meth:`validate` has seen the model.

        Reading stops at the first fault, so that hostile text costs no more than its own length.

        :raises PlanError: not JSON, not a plan, another version, a field of another type, a name given twice.
        """
        document = _parsed(text)
        stated = tuple(document.get(name) if isinstance(document, dict) else None for name in ("format", "version"))
        if stated != (PLAN_FORMAT, PLAN_VERSION) or isinstance(stated[1], (bool, float)):
            msg = f"plan: format, version: expected {PLAN_FORMAT!r}, {PLAN_VERSION}, got {_shown(repr(stated)[1:-1])}."
            raise PlanError(msg)
        fields = _object(document, "document", _FIELDS)
        costs = {name: _object(fields[name], name, ("macs", "params")) for name in ("before", "after")}
        before, after = (Cost(**{k: _count(v, f"{name}.{k}") for k, v in cost.items()}) for name, cost in costs.items())
        if after.macs > before.macs or after.params > before.params:
            raise _fault("after", f"at most {before}", after)
        return cls(
            kept={name: _kept(dims, f"kept.{_shown(name)}") for name, dims in _object(fields["kept"], "kept").items()},
            fingerprint=_fingerprint(fields["fingerprint"]),
            before=before,
            after=after,
            groups=tuple(_group(entry, f"groups.{i}") for i, entry in enumerate(_array(fields["groups"], "groups"))),
            pinned=tuple(_row(e, f"pinned.{i}", _PINNED) for i, e in enumerate(_array(fields["pinned"], "pinned"))),
            algorithm=_text(fields["algorithm"], "algorithm"),
            approximate=tuple(
                _row(e, f"approximate.{i}", _APPROXIMATE)
                for i, e in enumerate(_array(fields["approximate"], "approximate"))
            ),
        )


def _joined(first: Sequence[GroupChange], second: Sequence[GroupChange]) -> tuple[GroupChange, ...]:
    """Widths before the first and after the second plan; groups are matched by name."""
    dense = {group.name: group.before for group in first}
    return tuple(GroupChange(g.name, dense.get(g.name, g.before), g.after) for g in second)


# -- reading -------------------------------------------------------------------------------------------------------
# By hand and not by a schema library: those collect every fault, and a megabyte of faults becomes a gigabyte of them.

_FIELDS = (
    "format", "version", "algorithm", "fingerprint", "before", "after", "groups", "pinned", "approximate", "kept",
)  # fmt: skip


def _shown(name: str) -> str:
    """A name from outside, fit for a message: short, and without control characters."""
    short = name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


def _fault(where: str, expected: str, got: object) -> PlanError:
    # containers are named by their type only: their repr may be as long as the document
    shown = type(got).__name__ if isinstance(got, (dict, list)) else _shown(repr(got))
    return PlanError(f"plan: {where}: expected {expected}, got {shown}.")


def _parsed(text: str | bytes) -> Any:
    if not isinstance(text, (str, bytes)):
        raise _fault("document", "JSON text", text)
    if len(text) > MAX_PLAN_CHARACTERS:
        msg = f"plan: document: expected at most {MAX_PLAN_CHARACTERS} characters, got {len(text)}."
        raise PlanError(msg)
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_unique, parse_float=_no_fraction, parse_constant=_no_fraction)
    except RecursionError as error:
        msg = "plan: document: nested too deeply for a plan."
        raise PlanError(msg) from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        msg = f"plan: document: not JSON: {_shown(str(error))}."
        raise PlanError(msg) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two entries, one reader takes the first and another the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        msg = f"plan: document: '{_shown(twice)}' is given twice."
        raise PlanError(msg)
    return result


def _no_fraction(text: str) -> Any:
    raise _fault("document", "whole numbers only", text)


def _object(value: Any, where: str, names: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fault(where, "an object", value)
    if names is not None and value.keys() != set(names):
        extra = next((f"unknown '{_shown(name)}'" for name in value if name not in names), None)
        missing = next((f"no '{name}'" for name in names if name not in value), None)
        msg = f"plan: {where}: expected {', '.join(names)}, got {extra or missing}."
        raise PlanError(msg)
    return value


def _array(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _fault(where, "an array", value)
    return value


def _text(value: Any, where: str) -> str:
    # lone surrogates are valid JSON and no valid text
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        raise _fault(where, "text", value)
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise _fault(where, f"a whole number from 0 to {MAX_COUNT}", value)
    return value


def _fingerprint(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise _fault("fingerprint", "64 hexadecimal digits", value)
    return value


def _group(value: Any, where: str) -> GroupChange:
    entry = _object(value, where, ("name", "before", "after"))
    before, after = _count(entry["before"], f"{where}.before"), _count(entry["after"], f"{where}.after")
    if after > before:
        raise _fault(f"{where}.after", f"at most {before}", after)
    return GroupChange(_text(entry["name"], f"{where}.name"), before, after)


_PINNED = (_text, _count, _text)
_APPROXIMATE = (_text, _text)


def _row(value: Any, where: str, readers: Sequence[Callable[[Any, str], Any]]) -> tuple[Any, ...]:
    if len(_array(value, where)) != len(readers):
        raise _fault(where, f"{len(readers)} values", f"{len(value)} values")
    return tuple(read(item, f"{where}.{i}") for i, (read, item) in enumerate(zip(readers, value, strict=True)))


def _kept(value: Any, where: str) -> dict[int, tuple[int, ...]]:
    kept = {}
    for dim, positions in _object(value, where).items():
        if re.fullmatch("[0-9]|1[0-6]", dim) is None:  # one spelling for each: "1" and "01" would be one entry
            raise _fault(where, "dimensions from 0 to 16", dim)
        kept[int(dim)] = tuple(_count(p, f"{where}.{dim}") for p in _array(positions, f"{where}.{dim}"))
    return kept


# -- fitting the model ---------------------------------------------------------------------------------------------


def _validate_positions(name: str, shape: Sequence[int], dim: int, positions: npt.NDArray[np.int64]) -> None:
    where = f"plan: {name}, dimension {dim}"
    if not 0 <= dim < len(shape):
        msg = f"{where}: expected a dimension below {len(shape)}. The plan belongs to another model."
        raise PlanError(msg)
    if not positions.size:
        msg = f"{where}: expected at least one kept position, got none."
        raise PlanError(msg)
    if (np.diff(positions) <= 0).any():
        msg = f"{where}: expected ascending positions without repeats."
        raise PlanError(msg)
    if positions[0] < 0 or positions[-1] >= shape[dim]:
        bad = int(positions[0] if positions[0] < 0 else positions[-1])
        msg = f"{where}: position {bad} is out of range, expected 0 to {shape[dim] - 1}."
        raise PlanError(msg)


Axis = tuple[int, ...]


@dataclass(frozen=True)
class _Own:
    """A layer's own tensor before the cut and what is kept of it."""

    shape: Sequence[int]
    dims: Mapping[int, Axis]

    def __getitem__(self, dim: int) -> Axis:
        return self.dims.get(dim, tuple(range(self.shape[dim])))


def _own_tensors(module: nn.Module, kept: Mapping[int, Mapping[int, Axis]]) -> dict[str, _Own] | str:
    """A layer's tensors by name, re-parameterised ones under the name the layer uses; or what disagrees in them."""
    own = {
        name: _Own(tuple(tensor.shape), kept.get(id(tensor), {}))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    sources = {  # torch.nn.utils.parametrize, and the older torch.nn.utils.weight_norm
        **{name: list(p._parameters.values()) for name, p in getattr(module, "parametrizations", {}).items()},
        **{
            n[:-2]: [module._parameters[f"{n[:-2]}_{s}"] for s in "vg"]
            for n in own
            if n.endswith("_g") and f"{n[:-2]}_v" in own
        },
    }
    for name, parts in sources.items():
        originals = [_Own(tuple(t.shape), kept.get(id(t), {})) for t in parts if t is not None]
        if not any(original.dims for original in originals):
            continue
        shape = tuple(getattr(module, name).shape)
        dims: dict[int, Axis] = {}
        for dim, size in enumerate(shape):
            axes = {o[dim] for o in originals if len(o.shape) == len(shape) and o.shape[dim] == size}
            if len(axes) > 1:
                return f"the parts of its '{name}' keep different positions of dimension {dim}"
            dims.update({dim: axis for axis in axes})
        own[name] = _Own(shape, dims)
    return own


def _disagreement(module: nn.Module, kept: Mapping[int, Mapping[int, Axis]]) -> str:
    """What does not fit together within one of torch's layers, or empty; other modules have no rule."""
    rule = next((rule for kind, rule in _LAYER_RULES.items() if isinstance(module, kind)), None)
    own = _own_tensors(module, kept)
    if isinstance(own, str):
        return own
    return rule(module, own) if rule is not None and any(tensor.dims for tensor in own.values()) else ""


def _blocks(axis: Axis, size: int, blocks: int) -> list[Axis]:
    """The kept positions within each of equal blocks."""
    width = size // blocks
    positions = np.asarray(axis)
    return [tuple((positions[positions // width == b] - b * width).tolist()) for b in range(blocks)]


def _convolution(module: Any, own: Mapping[str, _Own]) -> str:
    weight = own["weight"]
    if any(dim > 1 for dim in weight.dims):
        return "its kernel is cut"
    first, second, groups = weight[0], weight[1], module.groups
    counts = {len(block) for block in _blocks(first, weight.shape[0], groups)}
    if groups == module.in_channels > 1:
        # Depthwise: every remaining input channel keeps all of its outputs.
        if not counts <= {0, weight.shape[0] // groups}:
            return "its weight keeps a part of the outputs of an input channel"
    elif len(counts) > 1:
        return f"its weight keeps different numbers of channels in its {groups} groups"
    outputs = first
    if module.transposed:
        starts = first if groups == module.in_channels > 1 else range(groups)
        outputs = tuple(g * weight.shape[1] + p for g in starts for p in second)
    return _unlike(own, {"bias": 0}, outputs)


def _unlike(own: Mapping[str, _Own], dims: Mapping[str, int], expected: Axis) -> str:
    for name, dim in dims.items():
        if name in own and own[name][dim] != expected:
            return f"'{name}' keeps {len(own[name][dim])} channels that are not the {len(expected)} of its weight"
    return ""


def _linear(module: Any, own: Mapping[str, _Own]) -> str:
    return _unlike(own, {"bias": 0}, own["weight"][0])


def _norm(module: Any, own: Mapping[str, _Own]) -> str:
    names = [name for name in ("weight", "bias", "running_mean", "running_var") if name in own]
    return _unlike(own, dict.fromkeys(names, 0), own[names[0]][0]) if names else ""


def _layer_norm(module: Any, own: Mapping[str, _Own]) -> str:
    if "weight" not in own:
        return ""
    dims = range(len(own["weight"].shape))
    return next(filter(None, (_unlike(own, {"bias": dim}, own["weight"][dim]) for dim in dims)), "")


def _group_norm(module: Any, own: Mapping[str, _Own]) -> str:
    if "weight" in own and module.num_groups > 1:
        counts = {len(block) for block in _blocks(own["weight"][0], module.num_channels, module.num_groups)}
        if not counts <= {0, module.num_channels // module.num_groups}:
            return f"its weight keeps a part of one of its {module.num_groups} groups"
    return _norm(module, own)


def _embedding(module: Any, own: Mapping[str, _Own]) -> str:
    return "its rows are cut" if 0 in own["weight"].dims else ""


_LAYER_RULES: Mapping[type[nn.Module], Callable[[Any, Mapping[str, _Own]], str]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}


# -- deciding ------------------------------------------------------------------------------------------------------


def make_plan(graph: ChannelGraph, keep: Sequence[npt.NDArray[np.bool_]], *, algorithm: str = "") -> PruningPlan:
    """Turns decisions per group into a plan.

    :param graph: the dense model's channels.
    :param keep: for each group which channels stay, shape ``[group.size]``; at least one of each.
    :raises PlanError: a group loses every channel, or shapes do not match.
    """
    removed: dict[tuple[str, int], list[npt.NDArray[np.int64]]] = {}
    widths = []
    for group, mask in zip(graph.groups, keep, strict=True):
        if mask.shape != (group.size,) or not mask.any():
            msg = f"group '{group.name}': expected {group.size} decisions with at least one channel kept."
            raise PlanError(msg)
        widths.append(int(mask.sum()))
        if not mask.all():
            for member in group.members:
                removed.setdefault((member.parameter, member.dim), []).append(member.indices[~mask].ravel())
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    indices = {}
    for (name, dim), gone in removed.items():
        stays = np.ones(graph.parameters[name][dim], bool)
        stays[np.concatenate(gone)] = False
        positions = np.flatnonzero(stays)
        indices[name, dim] = torch.from_numpy(positions)
        kept.setdefault(name, {})[dim] = tuple(positions.tolist())
    sizes = np.array(widths, np.float64)
    plan = PruningPlan(
        kept=kept,
        fingerprint=fingerprint(graph.parameters),
        before=Cost(graph.macs, graph.params),
        after=Cost(graph.cost.macs(sizes), graph.cost.params(sizes)),
        groups=tuple(GroupChange(g.name, g.size, w) for g, w in zip(graph.groups, widths, strict=True)),
        pinned=tuple((p.name, p.size, p.reason) for p in graph.pinned),
        algorithm=algorithm,
        approximate=tuple(
            (g.name, g.approximate) for g, w in zip(graph.groups, widths, strict=True) if g.approximate and w < g.size
        ),
    )
    plan._indices.update(indices)  # type: ignore[attr-defined]  # they are at hand
    return plan
