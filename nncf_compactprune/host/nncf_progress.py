"""NNCF's progress bars, on terminals only. They are drawn on rich's global console, which also writes into pipes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import rich
from nncf.common.logging.track_progress import track as nncf_track

ItemT = TypeVar("ItemT")


def _shows_bars() -> bool:
    console = rich.get_console()
    return console.is_terminal or console.is_jupyter


def track(items: Iterable[ItemT], description: str) -> Iterable[ItemT]:
    """The same items; NNCF's bar follows them on a terminal.

    :param items: their number is shown where they have a length.
    :param description: what stands before the bar.
    """
    bar: Iterable[ItemT] = nncf_track(items, description=description, disable=not _shows_bars())
    return bar


@contextmanager
def no_bars_in_pipes() -> Iterator[None]:
    """NNCF's own functions draw their bars on terminals only."""
    console = rich.get_console()
    before = console.quiet
    console.quiet = before or not _shows_bars()
    try:
        yield
    finally:
        console.quiet = before
