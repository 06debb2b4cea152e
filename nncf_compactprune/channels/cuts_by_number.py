"""Splits and slices whose places a module's own numbers say: ``split(self.splits)``, ``x[:, : self.width]``.

A number counts channels, so the cut can follow fewer of them once the module is told the new number. That a number
says where the cut is, is a guess: its value fits, and the running code reads it. The trial cut proves it; where it is
wrong, the channels are pinned, and the number stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from nncf_compactprune.channels.labels import DimLabels, LabelArray
from nncf_compactprune.channels.running_code import Number
from nncf_compactprune.channels.terms import UNFLATTENED, AttributeTerm, unflattened

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


def follows_split(tracer: Tracer, labels: LabelArray, sizes: Sequence[int]) -> bool:
    """Whether the module's numbers say the sizes of all parts; if so, they are noted.

    A list of all sizes leaves the parts free of each other. An integer says the size of every part that it fits, so
    these keep the same positions. One size may be left unsaid where the whole is known (``[a, whole - a]``).

    :param tracer: knows the running code and its numbers; notes those that count.
    :param labels: of the dimension that is split, shape ``[sum(sizes)]``.
    :param sizes: of the parts, in order.
    """
    numbers = tracer.numbers_in_code()
    lists = [number for number in numbers if number.value == tuple(sizes)]
    if lists:
        _note(tracer, lists, labels, tuple(sizes))
        return True
    wholes = [number for number in numbers if number.value == labels.size]
    said = {size: [number for number in numbers if number.value == size] for size in dict.fromkeys(sizes)}
    unsaid = [size for size, found in said.items() if not found]
    if len(unsaid) > (1 if wholes else 0):
        return False
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    for size, found in said.items():
        alike = np.stack([part for part in parts if part.size == size])
        tracer.unify(alike[1:], alike[:1])
        _note(tracer, found, alike[0])
    if unsaid or len(said) < len(sizes):
        _note(tracer, wholes, labels)
    return True


def follows_slice(tracer: Tracer, labels: LabelArray, start: int, stop: int, *, from_end: bool) -> bool:
    """Whether the module's numbers say where a slice begins and ends; if so, they are noted.

    :param tracer: knows the running code and its numbers; notes those that count.
    :param labels: of the dimension that is sliced.
    :param start: first position, from 0.
    :param stop: the position after the last, at most the number of labels.
    :param from_end: the code counts from the end (``x[:, -self.width :]``).
    """
    numbers = tracer.numbers_in_code()
    noted = []
    for place in (start, stop):
        if not 0 < place < labels.size:
            continue
        counted = [labels[:place], labels[start:place], labels[place:]]  # by what is most often written
        for run in counted[::-1] if from_end else counted:
            found = [number for number in numbers if run.size and number.value == run.size]
            if found:
                noted.append((found, run))
                break
        else:
            return False
    places = [number for found, _ in noted for number in found]
    taken = labels[start:stop]  # narrow counts these
    noted.append(([n for n in numbers if n.value == taken.size and n not in places], taken))
    for found, run in noted:
        _note(tracer, found, run)
    return True


def follows_view(tracer: Tracer, labels: DimLabels) -> None:
    """Notes the numbers that may say the sizes of a reshape's result: ``x.view(batch, self.width)``.

    :param tracer: knows the running code and its numbers; notes those that count.
    :param labels: of the result.
    """
    numbers = tracer.numbers_in_code()
    for array in labels:
        if array is not None:
            _note(tracer, [number for number in numbers if number.value == array.size], array)


def counted_in_view(tracer: Tracer, old: Sequence[int], new: Sequence[int]) -> tuple[int | None, list[Number]]:
    """The dimension of a reshape's result that counts channels as a number says, where features become pictures:
    ``nn.Unflatten(1, (c, h, w))``, and ``x.view(-1, self.channels, h, w)`` of ``[n, features]``.

    :param tracer: knows the running code and its numbers.
    :param old: the shape before.
    :param new: the shape after.
    :return: the dimension, or None; and the numbers, for :func:`note_counted`.
    """
    running = tracer.running
    if isinstance(running, nn.Unflatten):
        sizes = unflattened(running)
        if sizes is not None and len(sizes) > 1 and isinstance(running.dim, int):
            return running.dim % len(old), [Number(tracer.module, UNFLATTENED, sizes)]
    elif len(old) == 2 and len(new) > 3:
        found = [number for number in tracer.numbers_in_code() if number.value == new[1]]
        if found:
            return 1, found
    return None, []


def note_counted(tracer: Tracer, numbers: Sequence[Number], labels: LabelArray) -> None:
    """Notes what :func:`counted_in_view` found.

    :param tracer: notes them.
    :param numbers: numbers, or lists that begin with one.
    :param labels: of the dimension.
    """
    for number in numbers:
        fixed = number.value[1:] if isinstance(number.value, tuple) else ()
        tracer.note_attribute(AttributeTerm(number.module, number.attribute, 1, labels, fixed=fixed))


def _note(tracer: Tracer, numbers: Sequence[Number], labels: LabelArray, entries: tuple[int, ...] = ()) -> None:
    for number in numbers:
        tracer.note_attribute(AttributeTerm(number.module, number.attribute, 1, labels, entries))
