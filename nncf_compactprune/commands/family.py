"""``nncf-compactprune family``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console
from nncf_compactprune.commands.overrides import Output, Overrides, Weights, replaced
from nncf_compactprune.report.families import beside_siblings, family_table
from nncf_compactprune.run.families.members import make_family
from nncf_compactprune.run.progress import bars_on


@app.command("family")
def family_command(
    config: Annotated[Path, typer.Argument(help='A config file with "family", the budgets of the members.')],
    output: Output = None,
    weights: Weights = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
) -> None:
    """Prune one network to several budgets, and compare them with each other and with unpruned networks."""
    changes = replaced(overrides, output, weights)
    console = output_console()
    with bars_on(console):
        outcome = make_family(config, overrides=changes, say=lambda line: console.print(escape(line), soft_wrap=True))
    console.print(family_table(outcome.results))
    for line in beside_siblings(outcome.results):
        console.print(escape(line), soft_wrap=True)
    console.print(escape(f"Written to {outcome.directory}: start with family.md."), soft_wrap=True)
