"""All or nothing: changes that are recorded, undone and done again, exact to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nncf_compactprune.errors import RestoreError

_MISSING = object()


@dataclass(frozen=True)
class Change:
    """One change and the way back.

    :param what: what it changes, in words.
    :param do: makes the change.
    :param undo: puts back what was there before. It may run twice, and before ``do`` ran to its end.
    """

    what: str
    do: Callable[[], object]
    undo: Callable[[], object]


class Transaction:
    """Records every change so that all can be undone, in reverse order, and done again.

    Tensors are kept by reference: both ways are exact to the bit and cost no copy.
    """

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self._undone: list[Change] = []

    def _make(self, change: Change) -> None:
        self._changes.append(change)  # first: an interrupt in the middle of a change leaves half of it
        run_step(change.do)

    def set_data(self, tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
        """Replaces a tensor's data, keeping its identity, and its gradient.

        :param tensor: a parameter or buffer.
        :param data: of any shape.
        :param grad: of that shape; None drops the gradient.
        """
        old_data, old_grad = tensor.data, tensor.grad

        def do() -> None:
            tensor.grad = None
            _replace_data(tensor, data)
            tensor.grad = grad

        def undo() -> None:
            tensor.grad = None  # of another shape, where the change did not get far
            _replace_data(tensor, old_data)
            tensor.grad = old_grad

        self._make(Change(f"the data of a tensor of shape {list(old_data.shape)}", do, undo))

    def keep_content(self, tensor: Tensor) -> None:
        """What is written into a tensor from here on is undone. Its content is copied.

        :param tensor: a parameter or buffer.
        """
        data, content = tensor.data, tensor.data.clone()
        what = f"the content of a tensor of shape {list(data.shape)}"
        self._make(Change(what, lambda: None, lambda: data.copy_(content)))

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Sets an attribute.

        :param target: any object.
        :param name: the attribute's name; it need not exist.
        :param value: its new value.
        """
        old = _own_attribute(target, name)

        def undo() -> None:
            if old is _MISSING:
                if name in vars(target):
                    delattr(target, name)
                return
            try:
                setattr(target, name, old)
            except Exception:  # what cannot be set was not changed either
                if getattr(target, name, _MISSING) != old:
                    raise

        self._make(Change(f"{type(target).__name__}.{name}", lambda: setattr(target, name, value), undo))

    def set_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Sets a dictionary entry that exists.

        :param target: the dictionary.
        :param key: of the entry.
        :param value: its new value.
        """
        old = target[key]
        self._make(
            Change(
                f"the entry '{key}' of a dictionary",
                lambda: target.__setitem__(key, value),
                lambda: target.__setitem__(key, old),
            )
        )

    def delete_item(self, target: dict[Any, Any], key: Any) -> None:
        """Deletes a dictionary entry.

        :param target: the dictionary; its other entries keep their order.
        :param key: of the entry.
        """
        old = list(target.items())

        def undo() -> None:
            target.clear()  # the entry goes back to its old place
            target.update(old)

        self._make(Change("a deleted entry of a dictionary", lambda: target.pop(key), undo))

    def rollback(self) -> None:
        """Undoes everything. An undo that fails is tried once more, as an interrupt may have come in between.

        :raises RestoreError: some changes could not be undone; the others are.
        """
        self._undone, self._changes = self._changes, []
        interrupt: BaseException | None = None
        failures: list[tuple[str, BaseException]] = []
        for change in reversed(self._undone):
            try:
                run_step(change.undo)
            except BaseException as first:
                interrupt = interrupt if isinstance(first, Exception) else first
                try:
                    run_step(change.undo)
                except BaseException as second:
                    failures.append((change.what, second))
        if failures:
            raise RestoreError(failures) from failures[0][1]
        if interrupt is not None:
            raise interrupt

    def replay(self) -> None:
        """Does again what :meth:`rollback` undid."""
        changes, self._undone = self._undone, []
        for change in changes:
            self._make(change)


def run_step(step: Callable[[], object]) -> None:
    """Every change and every undo passes here."""
    step()


def _own_attribute(target: object, name: str) -> Any:
    """What must be set again to undo a change; missing where a class or nobody has the attribute."""
    own = getattr(target, "__dict__", {})
    if name in own:
        return own[name]
    of_class = inspect.getattr_static(type(target), name, _MISSING)
    if of_class is not _MISSING and not inspect.isdatadescriptor(of_class):
        return _MISSING
    return getattr(target, name, _MISSING)


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
    """All or nothing: an exception inside undoes every recorded change.

    :raises RestoreError: the changes could not all be undone; its cause is the exception inside.
    """
    log = Transaction()
    try:
        yield log
    except BaseException as error:
        _undo_after(log, error)
        raise


@contextmanager
def for_a_while() -> Iterator[Transaction]:
    """Changes that are undone at the end in any case.

    :raises RestoreError: the changes could not all be undone; its cause is the exception inside, where there is one.
    """
    with transaction() as log:
        yield log
        log.rollback()


def _undo_after(log: Transaction, error: BaseException) -> None:
    try:
        log.rollback()
    except RestoreError as failed:
        raise failed from error
