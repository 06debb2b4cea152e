"""``nncf-compactprune family``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console
from nncf_compactprune.commands.overrides import Overrides, parsed
from nncf_compactprune.report.families import beside_siblings, family_table
from nncf_compactprune.run.families.members import make_family
from nncf_compactprune.run.progress import bars_on


@app.command("family")
def family_command(
    config: Annotated[Path, typer.Argument(help='A config file with "family", the budgets of the members.')],
    output: Annotated[Path | None, typer.Option(help="Where to write; the config's output_dir by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of the dense model.")] = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
) -> None:
    """Prune one network to several budgets, and compare them with each other and with unpruned networks."""
    changes = parsed(overrides)
    if output is not None:
        changes["output_dir"] = str(output)
    if weights is not None:
        changes["weights"] = str(weights)
    console = output_console()
    with bars_on(console):
        outcome = make_family(config, overrides=changes, say=lambda line: console.print(escape(line), soft_wrap=True))
    console.print(family_table(outcome.results))
    for line in beside_siblings(outcome.results):
        console.print(escape(line), soft_wrap=True)
    console.print(escape(f"Written to {outcome.directory}: start with family.md."), soft_wrap=True)
