"""All or nothing: changes that are recorded, undone and done again, exact to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Change = Callable[[], object]


class Transaction:
    """Records every change so that all can be undone, in reverse order, and done again.

    Tensors are kept by reference: both ways are exact to the bit and cost no copy.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Change, Change]] = []
        self._undone: list[tuple[Change, Change]] = []

    def _do(self, change: Change, undo: Change) -> None:
        self._changes.append((change, undo))
        change()

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Replaces a tensor's data, keeping its identity; its gradient is dropped."""
        old_data, old_grad = tensor.data, tensor.grad

        def change() -> None:
            tensor.grad = None
            _replace_data(tensor, data)

        def undo() -> None:
            _replace_data(tensor, old_data)
            tensor.grad = old_grad

        self._do(change, undo)

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Sets an attribute."""
        if hasattr(target, name):
            old = getattr(target, name)
            self._do(lambda: setattr(target, name, value), lambda: setattr(target, name, old))
        else:
            self._do(lambda: setattr(target, name, value), lambda: delattr(target, name))

    def set_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Sets a dictionary entry that exists."""
        old = target[key]
        self._do(lambda: target.__setitem__(key, value), lambda: target.__setitem__(key, old))

    def delete_item(self, target: dict[Any, Any], key: Any) -> None:
        """Deletes a dictionary entry."""
        old = target[key]
        self._do(lambda: target.__delitem__(key), lambda: target.__setitem__(key, old))

    def rollback(self) -> None:
        """Undoes everything."""
        self._undone = self._changes
        self._changes = []
        for _, undo in reversed(self._undone):
            undo()

    def replay(self) -> None:
        """Does again what :meth:`rollback` undid."""
        self._changes, self._undone = self._undone, []
        for change, _ in self._changes:
            change()


def _replace_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data``, with no memory of the old shape.

    While an old graph is alive (a loss that is still in scope), autograd keeps the parameter's gradient accumulator,
    which expects the old shape. It is renewed only when dtype or device change, so the dtype changes for a moment.
    """
    torch.clear_autocast_cache()  # or a surrounding autocast goes on with its copy of the old data
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


@contextmanager
def transaction() -> Iterator[Transaction]:
    """All or nothing: an exception inside undoes every recorded change."""
    log = Transaction()
    try:
        yield log
    except BaseException:
        log.rollback()
        raise
