"""What all commands are added to."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prunes trained ConvNets structurally, inside NNCF's training loop, and exports what is left.",
)
