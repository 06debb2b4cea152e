"""``--set KEY=VALUE``: values of a config replaced on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from nncf_compactprune.errors import CompactPruneError

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a config value, as in compression.budget.macs=0.4."),
]


def parsed(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads ``KEY=VALUE``; values are JSON where they can be, and text otherwise.

    :raises CompactPruneError: it has another form.
    """
    result: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            msg = f"--set: expected KEY=VALUE, got '{override}'."
            raise CompactPruneError(msg)
        try:
            result[key] = json.loads(text)
        except json.JSONDecodeError:
            result[key] = text
    return result
