"""Values of a config replaced on the command line: ``--set KEY=VALUE``, ``--output`` and ``--weights``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nncf_compactprune.errors import CompactPruneError

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a config value, as in compression.budget.macs=0.4."),
]


Output = Annotated[Path | None, typer.Option(help="Where to write; the config's output_dir by default.")]
Weights = Annotated[Path | None, typer.Option(help="Safetensors file of the dense model.")]


def replaced(overrides: Sequence[str], output: Path | None, weights: Path | None) -> dict[str, Any]:
    """All that a command line replaces in a config, by dotted path. An option of its own wins over ``--set``.

    :param overrides: of ``--set``.
    :param output: of ``--output``.
    :param weights: of ``--weights``.
    :raises CompactPruneError: an override has another form than ``KEY=VALUE``.
    """
    own = {"output_dir": output, "weights": weights}
    return _parsed(overrides) | {key: str(path) for key, path in own.items() if path is not None}


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
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
