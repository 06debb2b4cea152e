"""Progress bars of a run, for a terminal only: piped output holds plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ItemT = TypeVar("ItemT")

_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def bars_on(console: Console) -> Iterator[None]:
    """Lets long steps inside show a bar here, if it is a terminal. Without it they show none."""
    token = _console.set(console if console.is_terminal else None)
    try:
        yield
    finally:
        _console.reset(token)


@contextmanager
def tracked(items: Iterable[ItemT], title: str, note: Callable[[], str] = str) -> Iterator[Iterable[ItemT]]:
    """The same items; a bar follows how many were taken, and goes when the body ends.

    :param items: their number is shown where they have a length.
    :param title: what stands before the bar.
    :param note: what stands behind it, asked after each item.
    """
    console = _console.get()
    if console is None:
        yield items
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True) as bar:
        task = bar.add_task(title, total=len(items) if isinstance(items, Sized) else None, note="")

        def taken() -> Iterator[ItemT]:
            for item in items:
                yield item
                bar.update(task, advance=1, note=note())

        yield taken()
