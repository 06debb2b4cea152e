"""What commands share: where they print to, and how they read shapes."""

from __future__ import annotations

import os

from rich.console import Console

from nncf_compactprune.errors import CompactPruneError

_PIPED_WIDTH = 1000


def output_console() -> Console:
    """Standard output. In a pipe or a file lines are as long as they are: a table there must not cut a path in two."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPED_WIDTH
    return console


def sample_shape(text: str | None, example: str = "3,224,224") -> list[int] | None:
    """Reads ``3,224,224`` or ``3x224x224``.

    :param text: of the option ``--sample-size``.
    :param example: what is expected, for the message.
    :raises CompactPruneError: for other words.
    """
    if text is None:
        return None
    try:
        return [int(side) for side in text.replace("x", ",").split(",")]
    except ValueError:
        msg = f"--sample-size: expected whole numbers such as {example}, got '{text}'."
        raise CompactPruneError(msg) from None
