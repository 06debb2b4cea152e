"""What a network costs at any channel counts: MACs and parameters as exact polynomials of the group widths.

A term is a constant times a product of *linear forms* ``a · w + b``, one for each channel dimension of an operation
or a parameter: ``w`` are the group widths, ``a`` how often a channel of each group appears in that dimension, ``b``
its pinned channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from nncf_compactprune.channels.branches import Branch
from nncf_compactprune.channels.labels import LabelArray

Floats = npt.NDArray[np.float64]
Widths = npt.NDArray[np.float64] | npt.NDArray[np.int64] | Sequence[float]


class Polynomial:
    """A sum of terms ``constant · Π (a · w + b)``.

    :param terms: pairs of constant and label arrays (one array a factor).
    :param group_of_label: group index of each label, -1 where it is pinned, shape ``[labels]``.
    :param sizes: dense width of each group, shape ``[groups]``.
    :param owners: module or parameter that each term belongs to, ``[terms]``.
    """

    def __init__(
        self,
        terms: Iterable[tuple[float, Sequence[LabelArray]]],
        group_of_label: LabelArray,
        sizes: LabelArray,
        owners: Sequence[str] = (),
    ) -> None:
        terms = list(terms)
        self.owners = owners
        self._in_branches: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # groups, terms
        groups = len(sizes)
        order = max([len(dims) for _, dims in terms], default=0)
        self.constants = np.array([constant for constant, _ in terms], np.float64)
        self.offsets = [np.ones(len(terms)) for _ in range(order)]
        entries: list[tuple[list[int], list[int], list[float]]] = [([], [], []) for _ in range(order)]
        for row, (_, dims) in enumerate(terms):
            for factor, labels in enumerate(dims):
                of = group_of_label[labels]
                counts = np.bincount(of + 1, minlength=groups + 1)
                self.offsets[factor][row] = counts[0]
                present = np.flatnonzero(counts[1:])
                entries[factor][0].extend([row] * len(present))
                entries[factor][1].extend(present.tolist())
                entries[factor][2].extend((counts[1:][present] / sizes[present]).tolist())
        self.slopes = [
            csr_matrix((values, (rows, columns)), shape=(len(terms), groups)) for rows, columns, values in entries
        ]
        occurs = sum((slope != 0 for slope in self.slopes), csr_matrix((len(terms), groups), dtype=bool)).tocsc()
        self._terms_of_group = [occurs.indices[occurs.indptr[g] : occurs.indptr[g + 1]] for g in range(groups)]
        self._parts: dict[int, tuple[npt.NDArray[np.int64], list[tuple[Floats, Floats, Floats]]]] = {}

    def factors(self, widths: Floats) -> list[Floats]:
        """Value of every linear form, one array ``[terms]`` a factor position."""
        return [slope @ widths + offset for slope, offset in zip(self.slopes, self.offsets, strict=True)]

    def __call__(self, widths: Widths) -> int:
        """The value at the given group widths, shape ``[groups]``."""
        widths = np.asarray(widths, np.float64)
        total = self.constants.copy()
        for factor in self.factors(widths):
            total *= factor
        for groups, terms in self._in_branches:
            if not widths[groups].any():
                total[terms] = 0
        return round(float(total.sum()))

    def with_branches(self, branches: Mapping[Branch, Sequence[int]]) -> Polynomial:
        """The same sum, in which all terms of a branch go with its last channel.

        :param branches: with the groups that go with each.
        """
        result = copy.copy(self)
        result._in_branches = [
            (np.array(groups), np.array([at for at, name in enumerate(self.owners) if branch.owns(name)], np.int64))
            for branch, groups in branches.items()
        ]
        return result

    def saved(self, widths: Floats, group: int, removed: int) -> float:
        """What removing channels of one group saves, exactly, where some of them stay.

        :param widths: of all groups before, ``[groups]``.
        :param group: its index.
        :param removed: how many of its channels go.
        """
        before = self.constants[self._terms_of_group[group]].copy()
        after = before.copy()
        neighbours, parts = self._parts_of(group)
        near = widths[neighbours]
        for part, offset, own in parts:
            value = part @ near + offset
            before *= value
            after *= value - own * removed
        return float((before - after).sum())

    def _parts_of(self, group: int) -> tuple[npt.NDArray[np.int64], list[tuple[Floats, Floats, Floats]]]:
        """The groups that occur in a term with this one; and of every factor position, their slopes, the offsets, and
        the group's own slopes in these terms. Dense and kept, as greedy allocation asks thousands of times."""
        if group not in self._parts:
            rows = self._terms_of_group[group]
            slopes = [slope[rows] for slope in self.slopes]
            neighbours = np.unique(np.concatenate([[group], *(slope.indices for slope in slopes)])).astype(np.int64)
            own = int(np.searchsorted(neighbours, group))
            dense = [np.asarray(slope[:, neighbours].todense()) for slope in slopes]
            offsets = [offset[rows] for offset in self.offsets]
            self._parts[group] = neighbours, [(d, o, d[:, own]) for d, o in zip(dense, offsets, strict=True)]
        return self._parts[group]


@dataclass(frozen=True)
class CostModel:
    """MACs (of one example) and parameters of a network as functions of its group widths."""

    macs: Polynomial
    params: Polynomial

    def with_branches(self, branches: Mapping[Branch, Sequence[int]]) -> CostModel:
        """See :meth:`Polynomial.with_branches`."""
        return CostModel(self.macs.with_branches(branches), self.params.with_branches(branches))

    def __getitem__(self, kind: str) -> Polynomial:
        return {"macs": self.macs, "params": self.params}[kind]
