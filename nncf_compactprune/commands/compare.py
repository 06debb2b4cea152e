"""``nncf-compactprune compare`` and ``nncf-compactprune profile``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console, sample_shape
from nncf_compactprune.commands.verify import Device, Precision
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.report.page import compare_page
from nncf_compactprune.report.summary import Summary, read_summary
from nncf_compactprune.serving.layers import LayerPair, Profile, profile, rounding_of
from nncf_compactprune.serving.server import Serving
from nncf_compactprune.storage.writing import write_whole

_ROUNDED = 5  # layers whose other widths are tried


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[Path | None, typer.Option(help="Also write a page, with accuracy against cost drawn.")] = None,
) -> None:
    """Show several runs side by side."""
    if output is not None and output.suffix != ".html":
        msg = f"--output: expected a file name that ends in .html, got '{output.name}'."
        raise CompactPruneError(msg)
    summaries = dict(zip(_names(runs), map(read_summary, runs), strict=True))
    console = output_console()
    console.print(runs_table(summaries))
    if output is not None:
        write_whole(output, compare_page(summaries).encode())
        console.print(escape(f"Written to {output}"), soft_wrap=True)


@app.command("profile")
def profile_command(
    dense: Annotated[Path, typer.Argument(help="An .xml file to compare with.")],
    pruned: Annotated[Path, typer.Argument(help="An .xml file of the same architecture, pruned or quantized.")],
    device: Device = "CPU",
    precision: Precision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a request.")] = 1,
    sample_size: Annotated[
        str | None, typer.Option(help="Shape of a sample where the file leaves it open: 3,224,224.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Requests of each file.")] = 20,
    rounding: Annotated[bool, typer.Option(help="Try the widths of slow layers rounded up, each alone.")] = True,
) -> None:
    """Show where the time of a pruned network goes, layer by layer, and why it was not saved where it was not."""
    serving = Serving(device, precision, threads=threads)
    found = profile(dense, pruned, serving=serving, batch=batch, sample_size=sample_shape(sample_size), runs=runs)
    console = output_console()
    console.print(layers_table(found))
    console.print(
        f"{found.macs_left:.0%} of the MACs are left, {found.time_left:.0%} of the time. Outside of these layers: "
        f"{found.others[0]:.0f} and {found.others[1]:.0f} µs.",
        soft_wrap=True,
    )
    slow = [one for one in found.layers if "no multiple" in one.note and one.side and len(one.shape) == 4]
    for one in sorted(slow, key=lambda one: -one.microseconds[1])[: _ROUNDED if rounding else 0]:
        tried = rounding_of(one, serving)
        words = ", ".join(f"{m}: {time / tried.microseconds:.2f}" for m, time in tried.rounded.items())
        said = (
            f"{one.name} alone, widths rounded up, time relative to {one.shape[1]} to {one.shape[0]} channels: {words}"
        )
        console.print(escape(f"{said}. Below 1, more channels are faster: set round_to."), soft_wrap=True)


def runs_table(summaries: Mapping[str, Summary]) -> Table:
    """Runs side by side.

    :param summaries: by the names of the runs.
    """
    table = Table(
        Column("Run", overflow="fold"), "Model", "Algorithm", "Accuracy", "Dense", "MACs", "Left", "Time left"
    )
    for name, one in summaries.items():
        accuracies = ("-" if a is None else f"{a:.2%}" for a in (one.pruned.accuracy, one.dense.accuracy))
        times = ", ".join(f"{label} {ratio:.0%}" for label, ratio in one.ratio.latency_ms.items() if ratio is not None)
        left = "-" if one.ratio.macs is None else f"{one.ratio.macs:.1%}"
        row = (name, one.model, one.algorithm, *accuracies, f"{one.pruned.macs:,}", left, times)
        table.add_row(*(escape(cell) for cell in row))
    return table


def layers_table(found: Profile) -> Table:
    """Layers of two files.

    :param found: what was measured.
    """
    table = Table(Column("Layer", overflow="fold"), "Weight", "MACs", "Left", "Time", "Left", "In", "Remark")
    for one in found.layers:
        table.add_row(*(escape(cell) for cell in _cells(one)))
    return table


def _cells(one: LayerPair) -> tuple[str, ...]:
    left = [f"{after / before:.0%}" if before else "-" for before, after in (one.macs, one.microseconds)]
    shape = "x".join(map(str, one.shape))
    time = f"{one.microseconds[1]:.0f} µs" if one.microseconds[1] else "in another"
    return (one.name, shape, f"{one.macs[1]:,}", left[0], time, left[1], one.precision, one.note)


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart."""
    if len(runs) == 1:
        return [runs[0].name]
    common = os.path.commonpath([run.resolve() for run in runs])
    names = [os.path.relpath(run.resolve(), common) for run in runs]
    if len(set(names)) < len(names):
        msg = f"compare: a run is named twice among {', '.join(map(str, runs))}."
        raise CompactPruneError(msg)
    return names
