"""How channel labels pass through a reshape.

Old and new shape are walked together and cut into the smallest blocks of equal element count. Inside a block the old
dimensions merge to one run of labels, and that run is split over the new dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nncf_compactprune.channels.labels import DimLabels, LabelArray


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs runs of old dimensions with runs of new ones of the same element count, dimensions of size 1 left out.

    :param old: the old shape.
    :param new: the new shape, same element count.

    >>> list(blocks([2, 12, 5], [2, 3, 4, 5]))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    old_dims = [d for d, size in enumerate(old) if size != 1]
    new_dims = [d for d, size in enumerate(new) if size != 1]
    i = j = 0
    while i < len(old_dims) and j < len(new_dims):
        left, right = [old_dims[i]], [new_dims[j]]
        a, b = old[old_dims[i]], new[new_dims[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= old[old_dims[i]]
                left.append(old_dims[i])
                i += 1
            else:
                b *= new[new_dims[j]]
                right.append(new_dims[j])
                j += 1
        yield left, right


def merge(labels: Sequence[LabelArray | None], sizes: Sequence[int]) -> LabelArray | None:
    """Labels of several dimensions flattened to one (row-major).

    :param labels: one entry a dimension; at most one is not None.
    :param sizes: of the dimensions.
    :return: shape ``[prod(sizes)]``, or None where no dimension carries labels.
    """
    for axis, array in enumerate(labels):
        if array is not None:
            shape = [1] * len(sizes)
            shape[axis] = sizes[axis]
            return np.broadcast_to(array.reshape(shape), tuple(sizes)).reshape(-1)
    return None


def split(
    labels: LabelArray | None,
    sizes: Sequence[int],
    unify: Callable[[LabelArray, LabelArray], None],
    head_axis: Callable[[Sequence[int], LabelArray], int | None] = lambda sizes, labels: None,
    behind_free: int | None = None,
) -> list[LabelArray | None]:
    """Labels of one dimension cut into several (row-major).

    Where every row of the cut is one repeated label, the leading dimension carries the labels; where all rows are the
    same, the others do. Otherwise factors must be taken for constants, and positions across them are declared equal:
    all but the attention heads where ``head_axis`` knows them, or the factor that the code leaves free (-1); elsewhere
    the leading one (groups).

    :param labels: shape ``[prod(sizes)]``, or None.
    :param sizes: of the new dimensions.
    :param unify: receives the equalities the cut implies.
    :param head_axis: which of the sizes counts attention heads, or None; also told the labels it will carry.
    :param behind_free: how many sizes are behind the one that the code leaves free, or None.
    """
    if labels is None or len(sizes) == 1:
        return [labels] + [None] * (len(sizes) - 1)
    rows = labels.reshape(sizes[0], -1)
    if (rows == rows[:, :1]).all():
        return [np.ascontiguousarray(rows[:, 0])] + [None] * (len(sizes) - 1)
    if not (rows == rows[:1]).all():
        axis = head_axis(sizes, labels)
        if axis is None and behind_free and len(sizes) > behind_free:
            axis = len(sizes) - 1 - behind_free
        if axis is not None:
            cube = labels.reshape(int(np.prod(sizes[:axis], dtype=int)), sizes[axis], -1)
            heads = np.ascontiguousarray(cube[0, :, 0])
            unify(cube, heads[None, :, None])
            return [heads if at == axis else None for at in range(len(sizes))]
        unify(rows[1:], rows[:1])
    return [None, *split(np.ascontiguousarray(rows[0]), sizes[1:], unify, head_axis, behind_free)]


def reshape_labels(
    labels: DimLabels,
    old: Sequence[int],
    new: Sequence[int],
    unify: Callable[[LabelArray, LabelArray], None],
    pin: Callable[[LabelArray, str], None],
    head_axis: Callable[[Sequence[int], LabelArray], int | None] = lambda sizes, labels: None,
    *,
    free: int | None = None,
) -> DimLabels:
    """Labels of a tensor after a reshape.

    Of several channel dimensions that become one, the widest carries the labels on, and the others are pinned: what
    stays whole is a constant of the product.

    :param labels: one entry an old dimension.
    :param old: the old shape.
    :param new: the new shape, same element count.
    :param unify: receives implied equalities.
    :param pin: receives labels that cannot follow, with the reason.
    :param head_axis: see :func:`split`.
    :param free: the new dimension whose size the code leaves open (-1), or None.
    """
    result: list[LabelArray | None] = [None] * len(new)
    for left, right in blocks(old, new):
        if len(left) == len(right) == 1:
            result[right[0]] = labels[left[0]]
            continue
        widest = max(left, key=lambda d: -1 if labels[d] is None else old[d])
        for d in left:
            array = labels[d]
            if array is not None and d != widest:
                pin(array, "merged with another channel dimension by a reshape")
        flat = merge([labels[d] if d == widest else None for d in left], [old[d] for d in left])
        behind = len(right) - 1 - right.index(free) if free in right else None
        for d, array in zip(right, split(flat, [new[d] for d in right], unify, head_axis, behind), strict=True):
            result[d] = array
    _pass_single_channels(labels, old, new, result, pin)
    return tuple(result)


def _pass_single_channels(
    labels: DimLabels,
    old: Sequence[int],
    new: Sequence[int],
    result: list[LabelArray | None],
    pin: Callable[[LabelArray, str], None],
) -> None:
    """A labelled dimension of size 1 keeps its label where the dimension stays in place, and is pinned elsewhere."""
    for d, size in enumerate(old):
        array = labels[d]
        if size == 1 and array is not None:
            if d < len(new) and new[d] == 1 and tuple(old[:d]) == tuple(new[:d]):
                result[d] = array
            else:
                pin(array, "a single channel dropped by a reshape")
