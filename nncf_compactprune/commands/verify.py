"""``nncf-compactprune verify``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console, sample_shape
from nncf_compactprune.run.verifying import SAMPLES, verify
from nncf_compactprune.serving.server import Serving
from nncf_compactprune.serving.verify import MAX_DROP, ServedCheck

FAILED_STATUS = 1

Device = Annotated[str, typer.Option(help="Where files run.")]
Precision = Annotated[
    str | None, typer.Option(help="f32, bf16 or f16, for OpenVINO; what the runtime chooses by default.")
]


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(help="The directory of a run, any with exported files in it, or one file.")],
    device: Device = "CPU",
    precision: Precision = None,
    samples: Annotated[int, typer.Option(min=1, help="Test images, evenly from all.")] = SAMPLES,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, beside single images.")] = 32,
    sample_size: Annotated[
        str | None, typer.Option(help="Shape of a sample where a file without a run leaves it open: 3,224,224.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest error relative to the largest output; by arithmetic if not given."),
    ] = None,
    max_drop: Annotated[float, typer.Option(min=0, max=1, help="Largest loss of accuracy against torch.")] = MAX_DROP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Serve exported files as their runtimes do by default, and compare them with torch: outputs, decisions, accuracy,
    channel widths. Exits with status 1 if a file is not what it should be."""
    errors = Console(stderr=True, highlight=False)
    checks = verify(
        path,
        serving=Serving(device=device, precision=precision),
        samples=samples,
        batch_size=batch,
        sample_size=sample_shape(sample_size),
        tolerance=tolerance,
        max_drop=max_drop,
        say=lambda line: errors.print(escape(line), soft_wrap=True),
    )
    if as_json:
        typer.echo(json.dumps([as_document(check) for check in checks], indent=2))
    else:
        output_console().print(checks_table(checks))
    failed = [check for check in checks if not check.passed]
    for check in failed:
        for problem in check.problems:
            errors.print(escape(f"{check.path}: {problem}"), soft_wrap=True)
    if failed:
        raise typer.Exit(FAILED_STATUS)


def checks_table(checks: Sequence[ServedCheck]) -> Table:
    """What was found, a file a row.

    :param checks: of the files.
    """
    table = Table(
        Column("File", overflow="fold"),
        "Served by",
        "Against",
        "Batches",
        Column("Error\n(limit)", no_wrap=True),
        Column("Same\nclass", no_wrap=True),
        Column("Accuracy\n(the other's)", no_wrap=True),
        Column("Widths", no_wrap=True),
        Column("", no_wrap=True),
    )
    for check in checks:
        table.add_row(*(escape(cell) for cell in _cells(check)))
    return table


def as_document(check: ServedCheck) -> dict[str, Any]:
    """A finding as JSON data.

    :param check: of one file.
    """
    return {**vars(check), "path": str(check.path), "passed": check.passed}


def _cells(check: ServedCheck) -> tuple[str, ...]:
    return (
        str(check.path),
        ", ".join(filter(None, (check.runtime, check.arithmetic))),
        f"{check.compared_with}, {check.samples} samples",
        ", ".join(map(str, check.batch_sizes)),
        ("-" if check.error is None else f"{check.error:.1e}")
        + ("" if check.tolerance is None else f"\n({check.tolerance:.0e})"),
        _percent(check.agreement),
        _percent(check.accuracy) + ("" if check.torch_accuracy is None else f"\n({check.torch_accuracy:.2%})"),
        "-" if check.widths is None else f"{check.widths[0]} of {check.widths[1]}",
        "ok" if check.passed else "FAILED",
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
