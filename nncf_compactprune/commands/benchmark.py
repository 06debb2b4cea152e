"""``nncf-compactprune benchmark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Column, Table

from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console, sample_shape
from nncf_compactprune.commands.verify import Device, Precision
from nncf_compactprune.run.verifying import exported_files
from nncf_compactprune.serving.benchmark import Benchmark, Timing, benchmark
from nncf_compactprune.serving.server import Serving

_MIB = 2**20


@app.command("benchmark")
def benchmark_command(
    paths: Annotated[list[Path], typer.Argument(help="Files, or directories with files; the first is the reference.")],
    device: Device = "CPU",
    precision: Precision = None,
    hint: Annotated[Literal["latency", "throughput"], typer.Option(help="What OpenVINO tunes for.")] = "latency",
    streams: Annotated[int | None, typer.Option(min=1, help="Requests that run at once.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a request.")] = 1,
    sample_size: Annotated[
        str | None, typer.Option(help="Shape of a sample where a file leaves it open: 3,224,224.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long each file is measured.")] = 5.0,
    memory: Annotated[bool, typer.Option(help="Load every file in a fresh process to see what it takes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time exported files side by side, in turns: latency, throughput and memory, each with its spread, and whether
    the machine was steady enough to tell."""
    files = [file for path in paths for file in exported_files(path)]
    found = benchmark(
        list(dict.fromkeys(files)),
        serving=Serving(device, precision, hint, streams, threads),
        batch=batch,
        sample_size=sample_shape(sample_size),
        seconds=seconds,
        memory=memory,
    )
    if as_json:
        typer.echo(json.dumps(as_document(found), indent=2))
        return
    console = output_console()
    console.print(timings_table(found))
    console.print(escape(found.verdict()), soft_wrap=True)


def timings_table(found: Benchmark) -> Table:
    """Files side by side.

    :param found: what was measured.
    """
    headings = ("Served by", "In", "Size", "Median", "p10 to p90", "p99", "Time / first", "Samples/s", "Memory")
    title = f"batch {found.timings[0].batch}, {found.timings[0].requests} requests each, in turns"
    table = Table(Column("File", overflow="fold"), *headings, title=title, title_justify="left")
    for one in found.timings:
        table.add_row(*(escape(cell) for cell in _cells(one)))
    return table


def as_document(found: Benchmark) -> dict[str, Any]:
    """A measurement as JSON data.

    :param found: what was measured.
    """
    return {
        "serving": vars(found.serving),
        "steadiness": found.steadiness,
        "noisy": found.noisy,
        "verdict": found.verdict(),
        "files": [{**vars(one), "path": str(one.path)} for one in found.timings],
    }


def _cells(one: Timing) -> tuple[str, ...]:
    return (
        str(one.path),
        one.runtime,
        one.arithmetic,
        f"{one.bytes / _MIB:.2f} MiB",
        f"{one.median_ms:.3g} ms",
        f"{one.p10_ms:.3g} to {one.p90_ms:.3g}",
        f"{one.p99_ms:.3g}",
        f"{one.ratio:.2f} ({one.ratio_spread[0]:.2f} to {one.ratio_spread[1]:.2f})",
        f"{one.samples_per_second:.4g} ({one.throughput_spread[0]:.4g} to {one.throughput_spread[1]:.4g})",
        "-" if one.memory_bytes is None else f"{one.memory_bytes / _MIB:.1f} MiB",
    )
