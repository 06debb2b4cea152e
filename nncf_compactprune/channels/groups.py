"""Groups of channels that can be removed, and what is pinned and why: the result of a trace."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nncf_compactprune.channels.branches import Branch
from nncf_compactprune.channels.cost import CostModel, Polynomial
from nncf_compactprune.channels.labels import LabelArray, LabelSpace, Reason, Role, Solution
from nncf_compactprune.channels.terms import AttributeTerm, AttributeValue, MacTerm
from nncf_compactprune.host.tensors import ModelTensors


@dataclass(frozen=True, eq=False)
class Member:
    """The slice of one parameter or buffer that belongs to a group.

    :param parameter: name in ``named_parameters`` or ``named_buffers``.
    :param dim: dimension that is cut.
    :param indices: positions of each channel, shape ``[channels, repeats]``; channel j owns ``indices[j]``.
    :param role: ``"producer"`` makes the channel, ``"consumer"`` takes it as input, ``"norm"`` is a per-channel affine
        or statistic, ``"other"`` is the rest.
    :param is_buffer: whether it is a buffer.
    """

    parameter: str
    dim: int
    indices: npt.NDArray[np.int64]
    role: Role
    is_buffer: bool = False


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels with the same members: channel j of every member goes or stays as one.

    :param name: module of the first producer.
    :param size: number of channels.
    :param members: all slices, producers first.
    :param approximate: why removal is not exact (LayerNorm over the channels), or empty.
    :param multiple: how many channels are kept is a multiple of this, as an operation wants it.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    approximate: str = ""
    multiple: int = 1

    def with_role(self, *roles: Role) -> tuple[Member, ...]:
        """Members of the given roles."""
        return tuple(member for member in self.members if member.role in roles)


@dataclass(frozen=True)
class PinnedGroup:
    """Channels that stay, with the reason.

    :param name: module of the first producer among them.
    :param size: number of channels.
    :param reason: in words, naming operation and module.
    :param location: ``file.py:line`` of the code that pins, or empty.
    :param kind: ``"pinned"`` or ``"approximate"`` (could go with ``allow_approximate``).
    """

    name: str
    size: int
    reason: str
    location: str
    kind: str


@dataclass(frozen=True, eq=False)
class AttributeFact:
    """A number that a module keeps about channels which its parameters do not show (``num_heads``), or a list of
    numbers (``splits``).

    :param module: its name.
    :param attribute: the attribute's name.
    :param unit: what one kept channel counts.
    :param groups: group of each channel it counts, -1 where pinned, shape ``[channels]``.
    :param channels: position of each in its group, shape ``[channels]``.
    :param entries: the dense list, one run of channels an entry; empty for a number.
    :param fixed: what follows the number in a list, and counts no channels; empty for a number alone.
    """

    module: str
    attribute: str
    unit: int
    groups: npt.NDArray[np.int64]
    channels: npt.NDArray[np.int64]
    entries: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()

    @property
    def dense(self) -> AttributeValue:
        """The attribute before a cut."""
        return self.entries or self._told(len(self.groups))

    def value(self, keep: Sequence[npt.NDArray[np.bool_]]) -> AttributeValue:
        """The attribute after a cut.

        :param keep: for each group which channels stay.
        """
        stays = [group < 0 or keep[group][channel] for group, channel in zip(self.groups, self.channels, strict=True)]
        if not self.entries:
            return self._told(sum(map(int, stays)))
        ends = itertools.accumulate(self.entries)
        return tuple(sum(map(int, stays[end - size : end])) for size, end in zip(self.entries, ends, strict=True))

    def _told(self, count: int) -> AttributeValue:
        return (self.unit * count, *self.fixed) if self.fixed else self.unit * count


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What a trace found.

    :param groups: prunable groups in order of their first parameter.
    :param pinned: channels that stay, with reasons; dimensions that never were channels are left out.
    :param cost: exact MACs and parameters as functions of the group widths.
    :param parameters: name to shape of every floating parameter and buffer, in model order.
    :param attributes: numbers that modules keep about channels, beside those that follow from their own parameters.
    :param tied: other names of shared parameters, to the name used here.
    :param unsupported_ops: operations without a rule, with how often they met channels.
    :param by_number: lines of code whose reshapes follow numbers of modules.
    :param branches: residual branches that may go as a whole, with the groups that go with them; empty where that was
        not asked for.
    :param keep_one: why the other groups keep at least one channel, by their index.
    :param fleeting: buffers that no checkpoint holds; the plan's fingerprint is of the other ``parameters``.
    """

    groups: tuple[ChannelGroup, ...]
    pinned: tuple[PinnedGroup, ...]
    cost: CostModel
    parameters: Mapping[str, tuple[int, ...]]
    attributes: tuple[AttributeFact, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    unsupported_ops: Mapping[str, int] = field(default_factory=dict)
    by_number: frozenset[str] = frozenset()
    branches: Mapping[Branch, tuple[int, ...]] = field(default_factory=dict)
    keep_one: Mapping[int, str] = field(default_factory=dict)
    fleeting: frozenset[str] = frozenset()

    @property
    def in_branches(self) -> frozenset[int]:
        """The groups that may go to no channel."""
        return frozenset(index for groups in self.branches.values() for index in groups)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Dense width of every group, shape ``[groups]``."""
        return np.array([group.size for group in self.groups], np.int64)

    @property
    def macs(self) -> int:
        """Dense multiply-accumulates for one example."""
        return self.cost.macs(self.sizes)

    @property
    def params(self) -> int:
        """Dense number of parameters."""
        return self.cost.params(self.sizes)


def build_graph(
    *,
    tensors: ModelTensors,
    space: LabelSpace,
    mac_terms: Sequence[MacTerm],
    attributes: Sequence[AttributeTerm],
    batch: int,
    unsupported_ops: Mapping[str, int],
    by_number: frozenset[str],
    allow_approximate: bool,
) -> ChannelGraph:
    """Solves the labels and sorts the classes into groups and pins.

    :param tensors: the model's parameters and buffers.
    :param space: their labels, with all equalities and pins.
    :param mac_terms: multiply-accumulates of every operation, for the whole batch.
    :param attributes: numbers that modules keep about channels.
    :param batch: examples in the batch, at least 1; MACs are divided by it.
    :param unsupported_ops: operations without a rule, with how often they met channels.
    :param by_number: lines of code whose reshapes follow numbers of modules.
    :param allow_approximate: offer groups whose removal changes a normalisation over channels.
    """
    _pin_unused(space)
    solution = space.solve()
    free = solution.pin < 0
    if not allow_approximate:
        free &= solution.approximate < 0
    groups, group_of_class = _groups(space, solution, free, attributes)
    group_of_label = group_of_class[solution.component]
    sizes = np.array([group.size for group in groups], np.int64)
    macs = Polynomial(
        ((t.constant / batch, t.dims) for t in mac_terms), group_of_label, sizes, [t.module for t in mac_terms]
    )
    params = Polynomial(
        _parameter_terms(tensors, space, group_of_label), group_of_label, sizes, list(tensors.parameters)
    )
    return ChannelGraph(
        groups=tuple(groups),
        pinned=tuple(_pinned(space, solution, free)),
        cost=CostModel(macs, params),
        parameters=tensors.shapes(),
        attributes=tuple(_attribute_facts(attributes, solution, group_of_class)),
        tied=tensors.tied,
        unsupported_ops=dict(unsupported_ops),
        by_number=by_number,
        fleeting=tensors.fleeting,
    )


def _attribute_facts(
    terms: Sequence[AttributeTerm], solution: Solution, group_of_class: LabelArray
) -> Iterator[AttributeFact]:
    position = np.full(len(group_of_class), -1, np.int64)
    for group in range(int(group_of_class.max(initial=-1)) + 1 if terms else 0):
        classes = np.flatnonzero(group_of_class == group)
        position[classes] = np.arange(classes.size)
    for term in terms:
        classes = solution.component[term.labels]
        if (group_of_class[classes] >= 0).any():
            group_of_label = group_of_class[classes]
            places = (group_of_label, position[classes])
            yield AttributeFact(term.module, term.attribute, term.unit, *places, term.entries, term.fixed)


def _pin_unused(space: LabelSpace) -> None:
    """Pins dimensions that no rule ever spoke of."""
    for slot in (space.slots[index] for index in space.unused()):
        labels = np.arange(slot.start, slot.start + slot.size)
        kind = "structural" if slot.is_buffer or slot.dim > 1 else "pinned"
        space.pin(labels, Reason("not used in the forward pass", slot.parameter.rpartition(".")[0], kind=kind))


def _slot_of_label(space: LabelSpace) -> LabelArray:
    slot_of_label = np.full(space.size, -1, np.int64)
    for index, slot in enumerate(space.slots):
        slot_of_label[slot.start : slot.start + slot.size] = index
    return slot_of_label


def _groups(
    space: LabelSpace, solution: Solution, free: npt.NDArray[np.bool_], attributes: Sequence[AttributeTerm]
) -> tuple[list[ChannelGroup], LabelArray]:
    """Families of classes with the same slices: (slot, how often) pairs hashed per class, then split by hash.

    What a module counts in one number is a family apart, so that no number comes down to 0.
    """
    slot_of_label = _slot_of_label(space)
    labels = np.flatnonzero((slot_of_label >= 0) & free[solution.component])
    classes, slots = solution.component[labels], slot_of_label[labels]
    group_of_class = np.full(len(solution.pin), -1, np.int64)
    if not labels.size:
        return [], group_of_class
    order = np.argsort(classes, kind="stable")  # labels ascend, and slots with them
    labels, classes, slots = labels[order], classes[order], slots[order]
    starts = np.flatnonzero(np.r_[True, (classes[1:] != classes[:-1]) | (slots[1:] != slots[:-1])])
    counts = np.diff(np.r_[starts, labels.size])
    signatures = np.zeros(len(solution.pin), np.uint64)
    np.add.at(signatures, classes[starts], _mix(slots[starts], counts))
    for index, run in enumerate(run for term in attributes for run in term.runs):
        counted, often = np.unique(solution.component[run], return_counts=True)
        signatures[counted] += _mix(np.full(counted.shape, len(space.slots) + index), often)
    present = classes[np.flatnonzero(np.r_[True, classes[1:] != classes[:-1]])]
    kinds, first, kind_of = np.unique(signatures[present], return_index=True, return_inverse=True)
    rank = np.empty(len(kinds), np.int64)
    rank[np.argsort(first)] = np.arange(len(kinds))
    group_of_class[present] = rank[kind_of]

    group_of_label = group_of_class[classes]
    order = np.argsort(group_of_label * len(space.slots) + slots, kind="stable")  # classes ascend inside
    labels, slots, group_of_label = labels[order], slots[order], group_of_label[order]
    cuts = np.flatnonzero(np.r_[True, (group_of_label[1:] != group_of_label[:-1]) | (slots[1:] != slots[:-1])])
    sizes = np.bincount(group_of_class[present], minlength=len(kinds))
    members: list[list[Member]] = [[] for _ in kinds]
    multiples = [1] * len(kinds)
    places = zip(slots[cuts].tolist(), group_of_label[cuts].tolist(), np.split(labels, cuts[1:]), strict=True)
    widths = sizes.tolist()
    for slot_index, group, own in places:
        slot = space.slots[slot_index]
        indices = (own - slot.start).reshape(widths[group], -1)
        role = space.roles.get(slot_index, "other")
        members[group].append(Member(slot.parameter, slot.dim, indices, role, slot.is_buffer))
        multiple = space.multiples.get(slot_index, 1)
        multiples[group] = math.lcm(multiples[group], multiple // math.gcd(multiple, indices.shape[1]))
    by_consent = present[solution.approximate[present] >= 0]
    approximate = {
        group: solution.reasons[index]
        for group, index in zip(
            group_of_class[by_consent].tolist(), solution.approximate[by_consent].tolist(), strict=True
        )
    }
    return [
        _named_group(members[g], int(sizes[g]), _words(approximate[g]) if g in approximate else "", multiples[g])
        for g in range(len(kinds))
    ], group_of_class


def _mix(slots: LabelArray, counts: LabelArray) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of (slot, count) pairs (splitmix64), so that sums of pairs tell different sets apart."""
    with np.errstate(over="ignore"):
        z = slots.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64) * np.uint64(
            0xD1B54A32D192ED03
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return mixed


_RANK: dict[Role, int] = {"producer": 0, "norm": 1, "consumer": 2, "other": 3}


def _named_group(members: list[Member], size: int, approximate: str, multiple: int) -> ChannelGroup:
    ordered = sorted(members, key=lambda m: (_RANK[m.role], m.is_buffer))
    return ChannelGroup(owner(ordered[0].parameter), size, tuple(ordered), approximate, multiple)


def owner(parameter: str) -> str:
    """Module that owns a parameter (``"layer1.0.conv1"`` for ``"layer1.0.conv1.weight"``)."""
    module, _, leaf = parameter.rpartition(".")
    return module or leaf


def _words(reason: Reason) -> str:
    where = f" in '{reason.module}'" if reason.module else ""
    return f"{reason.text}{where}"


def _pinned(space: LabelSpace, solution: Solution, free: npt.NDArray[np.bool_]) -> list[PinnedGroup]:
    """Pinned producers, one entry for each parameter and reason."""
    result = []
    reason_of_class = np.where(free, -1, np.where(solution.pin >= 0, solution.pin, solution.approximate))
    reason_of_label = reason_of_class[solution.component]
    for index, slot in enumerate(space.slots):
        role = space.roles.get(index, "other")
        if slot.is_buffer or role in ("consumer", "norm"):
            continue
        reasons = reason_of_label[slot.start : slot.start + slot.size]
        for reason_index in set(reasons[reasons >= 0].tolist()):
            reason = solution.reasons[reason_index]
            if reason.kind == "structural" or (role == "other" and slot.dim > 0) or slot.parameter.endswith(".bias"):
                continue
            count = int((reasons == reason_index).sum())
            result.append(PinnedGroup(owner(slot.parameter), count, _words(reason), reason.location, reason.kind))
    return result


def _parameter_terms(
    tensors: ModelTensors, space: LabelSpace, group_of_label: LabelArray
) -> list[tuple[float, Sequence[LabelArray]]]:
    """One term a parameter; dimensions without prunable channels go into the constant."""
    terms: list[tuple[float, Sequence[LabelArray]]] = []
    covered: dict[str, list[LabelArray]] = {}
    for slot in space.slots:
        if not slot.is_buffer:
            covered.setdefault(slot.parameter, []).append(np.arange(slot.start, slot.start + slot.size))
    for name, parameter in tensors.parameters.items():
        dims = [array for array in covered.get(name, ()) if (group_of_label[array] >= 0).any()]
        terms.append((parameter.numel() / math.prod(array.size for array in dims), dims))
    return terms


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of names and shapes: two models with the same one take the same plan."""
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(f"{name}:{tuple(shapes[name])}\n".encode())
    return digest.hexdigest()
