"""The pruning plan: what stays of every parameter, frozen, printable, JSON both ways.

A plan is decided on a dense model and can be replayed on any model with the same parameter names and shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from nncf_compactprune.channels.groups import ChannelGraph, fingerprint, model_tensors
from nncf_compactprune.errors import PlanError

PLAN_VERSION = 1


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

    @property
    def is_identity(self) -> bool:
        """Whether nothing is removed."""
        return not self.kept

    def masked_dims(self, name: str) -> Mapping[int, tuple[int, ...]]:
        """What a mask of one parameter zeroes: everything that goes, but for the direction of a weight-normalised
        weight where its magnitude goes too (a zero direction has no norm; its zero magnitude is enough)."""
        dims = self.kept.get(name, {})
        stem, _, leaf = name.rpartition(".")
        magnitude = {"original1": "original0", "weight_v": "weight_g"}.get(leaf)
        beside = self.kept.get(f"{stem}.{magnitude}", {}) if magnitude else {}
        return {dim: positions for dim, positions in dims.items() if dim not in beside}

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
        shapes = model_tensors(model)
        for name, dims in self.kept.items():
            if name not in shapes:
                msg = f"plan: parameter '{name}' does not exist in {type(model).__name__}. Use the plan's own model."
                raise PlanError(msg)
            for dim, positions in dims.items():
                _validate_positions(name, shapes[name], dim, positions)
        if fingerprint(shapes) != self.fingerprint:
            msg = (
                f"plan: made for another model: parameter names or shapes of {type(model).__name__} differ from the "
                "dense model it was made on. Build that model first (same architecture, same options, not yet pruned)."
            )
            raise PlanError(msg)

    def then(self, later: PruningPlan) -> PruningPlan:
        """This plan followed by one made on the pruned model, as one plan for the dense model.

        :raises PlanError: ``later`` keeps positions that this plan does not leave.
        """
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        for name, dims in later.kept.items():
            for dim, positions in dims.items():
                base = kept.setdefault(name, {}).get(dim)
                if base is not None and positions[-1] >= len(base):
                    msg = f"plan: {name}, dimension {dim}: position {positions[-1]} is not among {len(base)} kept ones."
                    raise PlanError(msg)
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
            "format": "nncf_compactprune.plan",
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

        :raises PlanError: not JSON, not a plan, another version, a field of another type.
        """
        try:
            document = _PlanDocument.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            msg = f"plan: {where}: {first['msg']}. Expected a plan written by nncf_compactprune {PLAN_VERSION}.x."
            raise PlanError(msg) from error
        return cls(
            kept={name: {d: tuple(k) for d, k in dims.items()} for name, dims in document.kept.items()},
            fingerprint=document.fingerprint,
            before=Cost(**document.before.model_dump()),
            after=Cost(**document.after.model_dump()),
            groups=tuple(GroupChange(**group.model_dump()) for group in document.groups),
            pinned=tuple(document.pinned),
            algorithm=document.algorithm,
            approximate=tuple(document.approximate),
        )


def _joined(first: Sequence[GroupChange], second: Sequence[GroupChange]) -> tuple[GroupChange, ...]:
    """Widths before the first and after the second plan; groups are matched by name."""
    dense = {group.name: group.before for group in first}
    return tuple(GroupChange(g.name, dense.get(g.name, g.before), g.after) for g in second)


Count = Annotated[int, Field(ge=0, le=2**62)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _CostDocument(_Strict):
    macs: Count
    params: Count


class _GroupDocument(_Strict):
    name: str
    before: Count
    after: Count


class _PlanDocument(_Strict):
    format: Annotated[str, Field(pattern=r"^nncf_compactprune\.plan$")]
    version: Annotated[int, Field(ge=PLAN_VERSION, le=PLAN_VERSION)]
    algorithm: str
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    before: _CostDocument
    after: _CostDocument
    groups: list[_GroupDocument]
    pinned: list[tuple[str, Count, str]]
    approximate: list[tuple[str, str]]
    kept: dict[str, dict[Annotated[int, Field(ge=0, le=16, strict=False)], list[Count]]]


def _validate_positions(name: str, shape: Sequence[int], dim: int, positions: Sequence[int]) -> None:
    where = f"plan: {name}, dimension {dim}"
    if not 0 <= dim < len(shape):
        msg = f"{where}: expected a dimension below {len(shape)}. The plan belongs to another model."
        raise PlanError(msg)
    if not positions:
        msg = f"{where}: expected at least one kept position, got none."
        raise PlanError(msg)
    if any(b <= a for a, b in itertools.pairwise(positions)):
        msg = f"{where}: expected ascending positions without repeats."
        raise PlanError(msg)
    if positions[0] < 0 or positions[-1] >= shape[dim]:
        bad = positions[0] if positions[0] < 0 else positions[-1]
        msg = f"{where}: position {bad} is out of range, expected 0 to {shape[dim] - 1}."
        raise PlanError(msg)


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
    for (name, dim), gone in removed.items():
        stays = np.ones(graph.parameters[name][dim], bool)
        stays[np.concatenate(gone)] = False
        kept.setdefault(name, {})[dim] = tuple(np.flatnonzero(stays).tolist())
    sizes = np.array(widths, np.float64)
    return PruningPlan(
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
