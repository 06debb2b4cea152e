"""Channel labels: integers that name positions of parameter dimensions, the equalities between them, and the pins.

Every dimension of every floating parameter and buffer owns a run of fresh labels (a *slot*). Rules state equalities
and pins as whole arrays; nothing is looked up or merged until :meth:`LabelSpace.solve` runs once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

LabelArray: TypeAlias = npt.NDArray[np.int64]
"""Labels of one tensor dimension, shape ``[size of the dimension]``."""

DimLabels: TypeAlias = tuple[LabelArray | None, ...]
"""Labels of a tensor, one entry a dimension; ``None`` where positions carry no channel (batch, height, constants)."""

Role: TypeAlias = Literal["producer", "consumer", "norm", "other"]
"""What a parameter dimension does with its channels."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer.

    :param parameter: its name in ``named_parameters`` / ``named_buffers``.
    :param dim: the dimension.
    :param start: its first label.
    :param size: how many labels it owns.
    :param is_buffer: whether the tensor is a buffer.
    """

    parameter: str
    dim: int
    start: int
    size: int
    is_buffer: bool


@dataclass(frozen=True)
class Reason:
    """Why channels cannot be removed.

    :param text: in words, with the operation.
    :param module: name of the module that was running, empty for the model itself.
    :param location: ``file.py:line`` of the user's code, or empty.
    :param kind: ``"pinned"``; ``"structural"`` for dimensions that were never channels (kernel height, tokens);
        ``"approximate"`` where removal is possible but changes more than the masked network (LayerNorm).
    """

    text: str
    module: str = ""
    location: str = ""
    kind: str = "pinned"


@dataclass(frozen=True)
class Pin:
    """Channels that somebody else pins.

    :param parameter: its name.
    :param dim: the dimension.
    :param positions: which of its channels, from 0.
    :param text: why, in words, operation and module included.
    :param location: ``file.py:line`` of the code, or empty.
    """

    parameter: str
    dim: int
    positions: tuple[int, ...]
    text: str
    location: str = ""


@dataclass(frozen=True)
class ViewByNumber:
    """A reshape whose sizes are numbers that modules keep, ``x.view(batch, self.width)``: they go with the channels.

    :param location: ``file.py:line`` of the code; empty: no reshape does, whatever else is said.
    """

    location: str


@dataclass(frozen=True)
class Solution:
    """The solved label space.

    :param component: equivalence class of each label, shape ``[labels]``.
    :param pin: index into ``reasons`` of the first pin of each class or -1, shape ``[classes]``.
    :param approximate: the same for approximate removals, shape ``[classes]``.
    """

    component: LabelArray
    pin: LabelArray
    approximate: LabelArray
    reasons: tuple[Reason, ...]


class LabelSpace:
    """Allocates labels and collects equalities and pins."""

    def __init__(self) -> None:
        self.size = 0
        self.slots: list[Slot] = []
        self.roles: dict[int, Role] = {}
        self.multiples: dict[int, int] = {}
        self._slot_by_array: dict[int, int] = {}
        self._slot_arrays: list[LabelArray] = []
        self._left: list[LabelArray] = []
        self._right: list[LabelArray] = []
        self._pins: list[tuple[LabelArray, int]] = []
        self.reasons: list[Reason] = []
        self._reason_ids: dict[Any, int] = {}

    def allocate(self, parameter: str, shape: Sequence[int], is_buffer: bool) -> DimLabels:
        """Returns fresh labels for the dimensions that can be channels.

        Of kernels (more than three dimensions) these are the first two; of buffers with two or three dimensions, which
        are tables (position embeddings, masks), the last; everywhere else all.

        :param parameter: name of the parameter or buffer.
        :param shape: its shape.
        :param is_buffer: whether it is a buffer.
        :return: one entry a dimension, None where it gets no labels.
        """
        candidates = range(len(shape))
        if len(shape) > 3 and shape[0] > 1:
            candidates = range(2)  # a kernel
        elif is_buffer and len(shape) > 1:
            candidates = range(2) if len(shape) > 3 else range(len(shape) - 1, len(shape))
        labels: list[LabelArray | None] = []
        for dim, size in enumerate(shape):
            if dim not in candidates:
                labels.append(None)
                continue
            array = self.fresh(size)
            self._slot_by_array[id(array)] = len(self.slots)
            self._slot_arrays.append(array)
            self.slots.append(Slot(parameter, dim, int(self.size - size), size, is_buffer))
            labels.append(array)
        return tuple(labels)

    def fresh(self, size: int) -> LabelArray:
        """Returns ``size`` labels that nothing else carries."""
        array = np.arange(self.size, self.size + size, dtype=np.int64)
        self.size += size
        return array

    def mark(self, labels: LabelArray | None, role: Role) -> None:
        """States the role of a parameter dimension. The first role that is stated stays.

        :param labels: the labels of the dimension; other arrays, and ``None``, are ignored.
        :param role: ``"producer"``, ``"consumer"`` or ``"norm"``. A dimension without a role is ``"other"``.
        """
        slot = self._slot_by_array.get(id(labels))
        if slot is not None:
            self.roles.setdefault(slot, role)

    def align(self, labels: LabelArray | None, multiple: int) -> None:
        """States that an operation takes a parameter dimension in multiples only.

        :param labels: the labels of the dimension; other arrays, and ``None``, are ignored.
        :param multiple: of positions.
        """
        slot = self._slot_by_array.get(id(labels))
        if slot is not None:
            self.multiples[slot] = math.lcm(multiple, self.multiples.get(slot, 1))

    def unify(self, left: LabelArray, right: LabelArray) -> None:
        """Declares ``left[i]`` and ``right[i]`` the same channel, for every i.

        :param left: labels, of any shape.
        :param right: labels whose shape broadcasts with that of ``left``.
        """
        if left is not right:
            if left.shape != right.shape:
                left, right = np.broadcast_arrays(left, right)
            self._left.append(left.ravel())
            self._right.append(right.ravel())

    def pin(self, labels: LabelArray, reason: Reason) -> None:
        """States that no channel of ``labels`` may go (or, for an approximate reason, only by consent).

        :param labels: of any shape.
        :param reason: why.
        """
        key = (reason.text, reason.module, reason.kind)
        index = self._reason_ids.get(key)
        if index is None:
            index = self._reason_ids[key] = len(self.reasons)
            self.reasons.append(reason)
        self._pins.append((labels, index))

    def add_pin(self, pin: Pin) -> None:
        """Pins channels from outside the trace."""
        for slot in self.slots:
            if (slot.parameter, slot.dim) == (pin.parameter, pin.dim):
                self.pin(slot.start + np.array(pin.positions, np.int64), Reason(pin.text, "", pin.location))

    def touched(self) -> npt.NDArray[np.bool_]:
        """Which labels an equality or a pin speaks of, shape ``[labels]``."""
        touched = np.zeros(self.size, bool)
        for array in (*self._left, *self._right, *(labels for labels, _ in self._pins)):
            touched[array] = True
        return touched

    def unused(self) -> list[int]:
        """Indices of the slots that no rule ever spoke of."""
        touched = self.touched()
        return [
            index
            for index, slot in enumerate(self.slots)
            if slot.size and index not in self.roles and not touched[slot.start : slot.start + slot.size].any()
        ]

    def solve(self) -> Solution:
        """Solves all equalities at once.

        :return: equivalence classes numbered by their smallest label.
        """
        left = np.concatenate(self._left) if self._left else np.empty(0, np.int64)
        right = np.concatenate(self._right) if self._right else np.empty(0, np.int64)
        edges = coo_matrix((np.ones(left.size, np.int8), (left, right)), shape=(self.size, self.size))
        count, raw = connected_components(edges, directed=False)
        first = np.full(count, self.size, np.int64)
        np.minimum.at(first, raw, np.arange(self.size))
        rank = np.empty(count, np.int64)
        rank[np.argsort(first)] = np.arange(count)
        component = rank[raw]
        pins = {kind: np.full(count, -1, np.int64) for kind in ("hard", "approximate")}
        for labels, index in reversed(self._pins):  # the first pin stated wins
            kind = "approximate" if self.reasons[index].kind == "approximate" else "hard"
            pins[kind][component[labels]] = index
        return Solution(component, pins["hard"], pins["approximate"], tuple(self.reasons))
