"""The pruning plan: what stays of every parameter, frozen, printable, JSON both ways.

A plan is decided on a dense model and can be replayed on any model with the same parameter names and shapes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.channels.branches import Branch
from nncf_compactprune.channels.groups import ChannelGraph, fingerprint
from nncf_compactprune.channels.terms import COUNTING_ATTRIBUTES, UNFLATTENED, AttributeValue, unflattened, width_of
from nncf_compactprune.errors import PlanError
from nncf_compactprune.host.tensors import model_tensors, named_modules
from nncf_compactprune.plan.layers import disagreement
from nncf_compactprune.plan.reading import PLAN_FORMAT, PLAN_VERSION, read_plan, shown


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
    """Width of one group before and after.

    :param name: the group's name.
    :param before: its channels in the dense model.
    :param after: its channels after the cut.
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class PruningPlan:
    """Which positions of which parameters stay.

    :param kept: parameter or buffer name to dimension to kept positions, ascending.
    :param fingerprint: SHA-256 of the dense model's parameter names and shapes.
    :param before: dense cost.
    :param after: cost of the pruned model.
    :param groups: width of every group before and after.
    :param pinned: (module, channels, reason) of what could not be pruned.
    :param algorithm: what decided it.
    :param approximate: groups whose removal changes a normalisation over channels, with the reason.
    :param attributes: module name to attribute to its value after the cut, for what parameters do not show: a number
        (``num_heads``), or a tuple of numbers (``splits``).
    :param output_classes: where the classifier was cut: the dense model's class behind each output, ascending; empty
        where it was not. Label ``output_classes[j]`` of the dense model is label j of the pruned one.
    :param removed: residual branches that go as a whole. ``kept`` has no entry for what they own.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    fingerprint: str
    before: Cost
    after: Cost
    groups: tuple[GroupChange, ...] = ()
    pinned: tuple[tuple[str, int, str], ...] = ()
    algorithm: str = ""
    approximate: tuple[tuple[str, str], ...] = ()
    attributes: Mapping[str, Mapping[str, AttributeValue]] = field(default_factory=dict)
    output_classes: tuple[int, ...] = ()
    removed: tuple[Branch, ...] = ()

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(dims)) for name, dims in self.kept.items()}
        object.__setattr__(self, "kept", MappingProxyType(frozen))
        facts = {name: MappingProxyType(dict(values)) for name, values in self.attributes.items()}
        object.__setattr__(self, "attributes", MappingProxyType(facts))
        object.__setattr__(self, "_indices", {})

    # A model carries its plan: it must stay copyable (EMA) and picklable (worker processes), which read-only mappings
    # by themselves are not.
    def __deepcopy__(self, memo: dict[int, Any]) -> PruningPlan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PruningPlan.from_json, (self.to_json(),)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed."""
        return not (self.kept or self.attributes or self.removed)

    def goes(self, name: str) -> bool:
        """Whether a module, parameter or buffer goes with a branch.

        :param name: as in the dense model.
        """
        return any(branch.owns(name) for branch in self.removed)

    def indices(self, name: str, dim: int) -> Tensor:
        """Kept positions of one dimension, made once.

        :param name: a parameter or buffer of which the plan removes something.
        :param dim: one of its cut dimensions.
        :return: ascending positions, int64, on the CPU, ``[kept]``.
        """
        cache: dict[tuple[str, int], Tensor] = self._indices  # type: ignore[attr-defined]
        if (name, dim) not in cache:
            cache[name, dim] = torch.tensor(self.kept[name][dim], dtype=torch.int64)
        return cache[name, dim]

    def selection(self, name: str) -> dict[int, Tensor]:
        """Kept positions of every cut dimension of a parameter."""
        return {dim: self.indices(name, dim) for dim in self.kept.get(name, {})}

    def masked_dims(self, name: str) -> dict[int, Tensor]:
        """What a mask of one parameter leaves: it zeroes everything that goes, but for the direction of a
        weight-normalised weight where its magnitude goes too (a zero direction has no norm; its zero magnitude is
        enough)."""
        stem, _, leaf = name.rpartition(".")
        magnitude = {"original1": "original0", "weight_v": "weight_g"}.get(leaf)
        if self.goes(name):
            return {} if magnitude else {0: torch.zeros(0, dtype=torch.int64)}
        beside = self.kept.get(f"{stem}.{magnitude}", {}) if magnitude else {}
        return {dim: positions for dim, positions in self.selection(name).items() if dim not in beside}

    def shapes(self, dense: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shapes after the cut, of what is left."""
        return {
            name: tuple(len(self.kept[name][d]) if d in self.kept.get(name, {}) else n for d, n in enumerate(shape))
            for name, shape in dense.items()
            if not self.goes(name)
        }

    def validate(self, model: nn.Module) -> None:
        """Checks that the plan fits a model, before anything is touched.

        :raises PlanError: another model, unknown parameter, dimension out of range, positions out of range, repeated,
            unordered or empty.
        """
        tensors = model_tensors(model)
        shapes = tensors.shapes()
        for name, dims in self.kept.items():
            if name not in shapes:
                kind = type(model).__name__
                msg = f"plan: parameter '{shown(name)}' does not exist in {kind}. Use the plan's own model."
                raise PlanError(msg)
            for dim in dims:
                _validate_positions(name, shapes[name], dim, self.indices(name, dim).numpy())
        _validate_attributes(model, self.attributes)
        self._validate_branches(model)
        self._validate_classes(shapes)
        # plans of before had fleeting buffers in it
        if self.fingerprint not in (fingerprint(tensors.lasting_shapes()), fingerprint(shapes)):
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
        different layers are only compared by a run, see :func:`nncf_compactprune.cut.surgery.prune_in_place`.

        :raises PlanError: naming the layer and what disagrees.
        """
        tensors = model_tensors(model)
        parameters = {name: tuple(parameter.shape) for name, parameter in tensors.parameters.items()}
        stated = {"before": (self.before, parameters), "after": (self.after, self.shapes(parameters))}
        for when, (cost, shapes) in stated.items():
            count = sum(math.prod(shape) for shape in shapes.values())
            if cost.params != count:
                msg = f"plan: {when}: states {cost.params} parameters, but they are {count}. The plan was altered."
                raise PlanError(msg)
        counts = {
            (name, attribute): number
            for name, module in named_modules(model)
            for attribute in self.attributes.get(name, {})
            if (number := _number_of(module, attribute)) is not None
        }
        self._validate_counts(tensors.shapes(), counts)
        by_name = tensors.all()
        kept = {id(by_name[name]): dims for name, dims in self.kept.items()}
        for name, module in named_modules(model):
            finding = disagreement(module, kept)
            if finding:
                msg = f"plan: {type(module).__name__} '{name}': {finding}. The plan does not fit together."
                raise PlanError(msg)

    def _validate_branches(self, model: nn.Module) -> None:
        """What goes with a branch is in the model, and is not cut besides. Whether its block adds it to a shortcut
        shows when the block is taken apart."""
        names = {*model_tensors(model).all(), *(name for name, _ in named_modules(model))} if self.removed else set()
        for branch in self.removed:
            missing = [name for name in (branch.block, *branch.parts) if name not in names]
            if missing or not branch.layers or not branch.block:
                msg = (
                    f"plan: removed: '{shown((missing or [str(branch)])[0])}' does not exist in {type(model).__name__}."
                )
                raise PlanError(msg)
        both = [name for name in (*self.kept, *self.attributes) if self.goes(name)]
        if both:
            msg = f"plan: '{shown(both[0])}' is cut, and goes with its branch as well. The plan was altered."
            raise PlanError(msg)

    def _validate_classes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The classes of a cut classifier are the rows that some weight keeps."""
        if self.output_classes and not any(
            dims.get(0) == self.output_classes and len(shapes[name]) > 1 for name, dims in self.kept.items()
        ):
            msg = f"plan: output_classes: no weight keeps just these {len(self.output_classes)} rows. It was altered."
            raise PlanError(msg)

    def _validate_counts(
        self, dense: Mapping[str, tuple[int, ...]], counts: Mapping[tuple[str, str], AttributeValue]
    ) -> None:
        """A module's count of heads shrinks as one of its parameters does, and no other number loses more channels
        than all parameters do, or the plan was altered."""
        lost = sum(dense[name][dim] - len(kept) for name, dims in self.kept.items() for dim, kept in dims.items())
        for module, values in self.attributes.items():
            shares = {
                Fraction(len(positions), dense[name][dim])
                for name, dims in self.kept.items()
                if name.startswith(f"{module}." if module else "")
                for dim, positions in dims.items()
            }
            for attribute, value in values.items():
                old = counts[module, attribute]
                if isinstance(old, int) and isinstance(value, int) and attribute in COUNTING_ATTRIBUTES:
                    follows = old in {value / share for share in shares}
                else:
                    follows = np.max(np.subtract(old, value)) <= lost
                if not follows:
                    msg = (
                        f"plan: attributes.{shown(module)}.{shown(attribute)}: {value} follows from no kept width. "
                        "The plan was altered."
                    )
                    raise PlanError(msg)

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan followed by one made on the pruned model, as one plan for the dense model.

        :raises PlanError: ``later`` keeps positions that this plan does not leave.
        """
        if self.is_identity or later.is_identity:  # an identity may not know its MACs
            return later if self.is_identity else self
        kept = {name: dict(dims) for name, dims in self.kept.items() if not later.goes(name)}
        for name, dims in later.kept.items():
            for dim, positions in dims.items():
                base = kept.setdefault(name, {}).get(dim)
                if base is not None:
                    _validate_positions(name, (len(base),), 0, np.asarray(positions))
                kept[name][dim] = positions if base is None else tuple(base[p] for p in positions)
        return dataclasses.replace(
            later,
            kept=kept,
            fingerprint=self.fingerprint,
            before=self.before,
            groups=_joined(self.groups, later.groups),
            approximate=tuple(dict.fromkeys((*self.approximate, *later.approximate))),
            attributes={
                name: {**self.attributes.get(name, {}), **later.attributes.get(name, {})}
                for name in dict.fromkeys((*self.attributes, *later.attributes))
                if not later.goes(name)
            },
            output_classes=self._classes_after(later),
            removed=(*self.removed, *later.removed),
        )

    def _classes_after(self, later: PruningPlan) -> tuple[int, ...]:
        if not self.output_classes or not later.output_classes:
            return later.output_classes or self.output_classes
        _validate_positions("output_classes", (len(self.output_classes),), 0, np.asarray(later.output_classes))
        return tuple(self.output_classes[c] for c in later.output_classes)

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
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
            "kept": {name: {str(d): list(k) for d, k in dims.items()} for name, dims in self.kept.items()},
        }
        if self.output_classes:
            document["output_classes"] = list(self.output_classes)
        if self.removed:
            document["removed"] = [{"block": one.block, "layers": list(one.layers)} for one in self.removed]
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> PruningPlan:
        """Reads a plan; nothing is believed until :meth:`validate` has seen the model.

        Reading stops at the first fault, so that hostile text costs no more than its own length.

        :raises PlanError: not JSON, not a plan, another version, a field of another type, a name given twice.
        """
        fields = read_plan(text)
        before, after = (Cost(**fields.pop(when)) for when in ("before", "after"))
        groups = tuple(GroupChange(**group) for group in fields.pop("groups"))
        removed = tuple(Branch(**branch) for branch in fields.pop("removed"))
        return cls(before=before, after=after, groups=groups, removed=removed, **fields)


def _joined(first: Sequence[GroupChange], second: Sequence[GroupChange]) -> tuple[GroupChange, ...]:
    """Widths before the first and after the second plan.

    Groups are matched by name and by the width between the plans. A cut can join channels of several groups into one,
    or take them apart; such a group is stated as the second plan found it. What the first plan left nothing of is not
    known to the second.
    """
    dense = {(group.name, group.after): group.before for group in first}
    found = tuple(GroupChange(g.name, dense.get((g.name, g.before), g.before), g.after) for g in second)
    return (*found, *(group for group in first if not group.after))


def _validate_positions(name: str, shape: Sequence[int], dim: int, positions: npt.NDArray[np.int64]) -> None:
    where = f"plan: {shown(name)}, dimension {dim}"
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


def _validate_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, AttributeValue]]) -> None:
    """Only numbers that may count channels can be set, and only to less."""
    modules = dict(named_modules(model)) if attributes else {}
    for name, values in attributes.items():
        if name not in modules:
            msg = f"plan: attributes: module '{shown(name)}' does not exist in {type(model).__name__}."
            raise PlanError(msg)
        for attribute, value in values.items():
            old = _number_of(modules[name], attribute)
            if old is None or not _is_less(value, old) or (attribute == UNFLATTENED and _tail(value) != _tail(old)):
                msg = (
                    f"plan: attributes.{shown(name)}.{shown(attribute)}: expected a count of heads or of channels, "
                    f"each from 1 to what it is now ({old}), got {shown(str(value))}."
                )
                raise PlanError(msg)


def _number_of(module: nn.Module, attribute: str) -> AttributeValue | None:
    """The present value of an attribute that a plan may set."""
    if attribute in COUNTING_ATTRIBUTES:
        value = getattr(module, attribute, None)
        return value if type(value) is int else None
    if isinstance(module, nn.Unflatten) and attribute == UNFLATTENED:
        return unflattened(module)
    return width_of(module, attribute)


def _is_less(new: AttributeValue, old: AttributeValue) -> bool:
    """Whether no number is larger than before, or below 1."""
    if isinstance(new, int) or isinstance(old, int):
        return isinstance(new, int) and isinstance(old, int) and 1 <= new <= old
    return len(new) == len(old) and all(1 <= a <= b for a, b in zip(new, old, strict=True))


def _tail(value: AttributeValue) -> tuple[int, ...]:
    return value[1:] if isinstance(value, tuple) else ()


def make_plan(graph: ChannelGraph, keep: Sequence[npt.NDArray[np.bool_]], *, algorithm: str = "") -> PruningPlan:
    """Turns decisions per group into a plan.

    :param graph: the dense model's channels.
    :param keep: for each group which channels stay, shape ``[group.size]``; at least one of each, but for the groups of
        a residual branch, of which all may keep none.
    :param algorithm: the name of who decided, for the plan's readers.
    :raises PlanError: a group loses every channel and may not, or shapes do not match.
    """
    branches = {
        branch: groups for branch, groups in graph.branches.items() if not any(keep[group].any() for group in groups)
    }
    may_go = {group for groups in branches.values() for group in groups}
    with_branch = {name for name in graph.parameters if any(branch.owns(name) for branch in branches)}
    removed: dict[tuple[str, int], list[npt.NDArray[np.int64]]] = {}
    widths = []
    for index, (group, mask) in enumerate(zip(graph.groups, keep, strict=True)):
        if mask.shape != (group.size,) or not (mask.any() or index in may_go):
            msg = (
                f"group '{group.name}': expected {group.size} decisions with at least one channel kept, got "
                f"{mask.size} with {int(mask.sum())} kept. Keep at least one channel of every group, or none of all "
                "groups of a residual branch that may go."
            )
            raise PlanError(msg)
        widths.append(int(mask.sum()))
        if not mask.all():
            for member in group.members:
                if member.parameter in with_branch:
                    continue
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
        fingerprint=fingerprint({n: s for n, s in graph.parameters.items() if n not in graph.fleeting}),
        before=Cost(graph.macs, graph.params),
        after=Cost(graph.cost.macs(sizes), graph.cost.params(sizes)),
        groups=tuple(GroupChange(g.name, g.size, w) for g, w in zip(graph.groups, widths, strict=True)),
        pinned=tuple((p.name, p.size, p.reason) for p in graph.pinned),
        algorithm=algorithm,
        approximate=tuple(
            (g.name, g.approximate) for g, w in zip(graph.groups, widths, strict=True) if g.approximate and w < g.size
        ),
        attributes={
            module: values
            for module, values in _attributes(graph, keep).items()
            if not any(branch.owns(module) for branch in branches)
        },
        removed=tuple(branches),
    )
    plan._indices.update(indices)  # type: ignore[attr-defined]  # they are at hand
    return plan


def _attributes(graph: ChannelGraph, keep: Sequence[npt.NDArray[np.bool_]]) -> dict[str, dict[str, AttributeValue]]:
    """New values of the attributes that change."""
    result: dict[str, dict[str, AttributeValue]] = {}
    for fact in graph.attributes:
        value = fact.value(keep)
        if value != fact.dense:
            result.setdefault(fact.module, {})[fact.attribute] = value
    return result
