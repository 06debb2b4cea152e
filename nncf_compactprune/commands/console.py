"""Where commands print to."""

from __future__ import annotations

import os

from rich.console import Console

_PIPED_WIDTH = 1000


def output_console() -> Console:
    """Standard output. In a pipe or a file lines are as long as they are: a table there must not cut a path in two."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console
