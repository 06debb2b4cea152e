"""The command line: the entry point, and the commands that have no file of their own in ``commands``.

Every mistake of the user ends with one message on standard error and exit status 2, without a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from nncf_compactprune.commands import benchmark, compare, family, verify  # noqa: F401  # each adds its commands to app
from nncf_compactprune.commands.app import app
from nncf_compactprune.commands.console import output_console, sample_shape
from nncf_compactprune.commands.overrides import Output, Overrides, Weights, replaced
from nncf_compactprune.config import json_schema
from nncf_compactprune.cut.depth import IN_NO_BRANCH
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.export import Pixels, export_model
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.report import rich_table
from nncf_compactprune.report.page import PAGE_FILE
from nncf_compactprune.report.summary import summary_schema
from nncf_compactprune.run.families.settings import family_schema
from nncf_compactprune.run.inspection import Inspection, inspect_model
from nncf_compactprune.run.pipeline import described_by, load_run, run
from nncf_compactprune.run.progress import bars_on
from nncf_compactprune.run.settings import run_schema
from nncf_compactprune.storage.writing import write_whole
from nncf_compactprune.version import __version__

USER_ERROR_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    :param arguments: the words after the program's name; those of this process by default.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except (nncf.ValidationError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(USER_ERROR_STATUS) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command("run")
def run_command(
    config: Annotated[Path, typer.Argument(help="The config file.")],
    output: Output = None,
    weights: Weights = None,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
) -> None:
    """Train or load the dense model, prune, fine-tune, export and compare, as a config says."""
    _run(config, replaced(overrides, output, weights))


@app.command("demo")
def demo_command(output: Output = None, overrides: Overrides = []) -> None:  # noqa: B006  # typer copies it
    """Run a config that comes with the package: a small network for handwritten digits, a few minutes on a CPU."""
    with resources.as_file(resources.files("nncf_compactprune.run") / "demo.json") as config:
        _run(config, replaced(overrides, output, None))


def _run(config: Path, changes: Mapping[str, Any]) -> None:
    console = output_console()
    with bars_on(console):
        outcome = run(config, overrides=changes, say=lambda line: console.print(escape(line), soft_wrap=True))
    console.print(rich_table(outcome.comparison))
    first = PAGE_FILE if (outcome.directory / PAGE_FILE).exists() else "report.md"
    console.print(escape(f"Written to {outcome.directory}: start with {first}."), soft_wrap=True)


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str | None, typer.Argument(help="Such as timm:fbnetv3_b, hf:resnet or python:module:function.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Take model, options, input shape and scopes from it.")] = None,
    sample_size: Annotated[str | None, typer.Option(help="Input shape with batch, as in 1,3,224,224.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which channels of a model can be pruned, what that saves, and why the others stay."""
    inspection = inspect_model(model, config=config, sample_size=sample_shape(sample_size, "1,3,224,224"))
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        _print_inspection(inspection, output_console())


@app.command("export")
def export_command(
    directory: Annotated[Path, typer.Argument(help="What a run wrote: config.json, plan.json, model.safetensors.")],
    output: Annotated[Path | None, typer.Option(help="A directory, or one .onnx, .xml, .pt2 or .pte file.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="onnx, openvino, pt2, executorch, or a plugin's; repeatable.")
    ] = None,
    precisions: Annotated[list[str] | None, typer.Option("--precision", help="fp32, fp16; repeatable.")] = None,
    layout: Annotated[str, typer.Option(help="plain; optimum for optimum-intel; ovms for Model Server.")] = "plain",
    name: Annotated[str, typer.Option(help="Stem of the files, or the served model's name.")] = "model",
    batch: Annotated[int | None, typer.Option(help="A fixed batch size; open by default.")] = None,
    dynamic_size: Annotated[bool, typer.Option(help="Leave height and width open.")] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX files.")] = None,
    external_data: Annotated[bool, typer.Option(help="ONNX weights in a file of their own.")] = False,
    embed_preprocessing: Annotated[
        bool, typer.Option(help="OpenVINO files take u8 images of any size and normalise them.")
    ] = False,
    input_names: Annotated[list[str] | None, typer.Option("--input-name", help="In order; repeatable.")] = None,
    output_names: Annotated[list[str] | None, typer.Option("--output-name", help="In order; repeatable.")] = None,
) -> None:
    """Export a pruned model, to ONNX and OpenVINO IR by default, and verify the files in their runtimes."""
    pruned = load_run(directory)
    said = described_by(directory)
    pixels = said.pixels
    if pixels is None and pruned.mean is not None and pruned.std is not None:
        pixels = Pixels(pruned.mean, pruned.std)
    options = replace(
        said,
        pixels=pixels,
        batch=batch,
        dynamic_size=dynamic_size,
        opset=opset,
        external_data=external_data,
        embed_preprocessing=embed_preprocessing,
    )
    target = output if output is not None else directory / ("pruned" if layout == "plain" else layout)
    model, inputs, ins, outs = pruned.model, pruned.example_inputs, input_names or None, output_names or None
    if layout == "plain":
        files = export_model(
            model,
            inputs,
            target,
            formats or None,
            precisions or None,
            name=name,
            input_names=ins,
            output_names=outs,
            options=options,
        )
    else:
        if formats or len(precisions or ()) > 1:
            msg = f"--layout {layout}: holds one OpenVINO model. Leave --format out, and give one --precision at most."
            raise CompactPruneError(msg)
        precision = precisions[0] if precisions else None
        files = export_to_layout(
            model,
            inputs,
            target,
            layout,
            name=name,
            precision=precision,
            input_names=ins,
            output_names=outs,
            options=options,
        )
    table = Table(Column("File", overflow="fold"), "Format", "Bytes", "Runtime", "Error", "Tolerance")
    for file in files:
        check = file.verification
        figures = (f"{file.bytes:,}", check.runtime, f"{check.max_rel_error:.1e}", f"{check.tolerance:.0e}")
        table.add_row(escape(str(file.path)), file.label, *figures)
    output_console().print(table)


@app.command("algorithms")
def algorithms_command() -> None:
    """List the installed algorithms."""
    table = Table("Algorithm", "What it does")
    for name, algorithm in sorted(default_plugins().algorithms.items()):
        table.add_row(escape(name), escape(algorithm.summary))
    output_console().print(table)


@app.command("schema")
def schema_command(
    output: Annotated[Path | None, typer.Option(help="A file to write instead of printing.")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Of summary.json, which a run writes.")] = False,
) -> None:
    """Print the JSON schema of configs, for editors: "$schema" in a config names it."""
    schema = summary_schema() if summary else json_schema()
    if not summary:
        for part in (run_schema(), family_schema()):
            schema["properties"] |= part["properties"]
            schema["$defs"] |= part["$defs"]
    text = json.dumps(schema, indent=2)
    if output is None:
        typer.echo(text)
    else:
        write_whole(output, f"{text}\n".encode())
        typer.echo(f"Written to {output}")


def _print_inspection(inspection: Inspection, console: Console) -> None:
    graph = inspection.graph
    inputs = ", ".join("x".join(map(str, shape)) for shape in inspection.input_shapes)
    console.print(escape(f"{inspection.name}, input {inputs}"), soft_wrap=True)
    console.print(f"{graph.macs:,} MACs, {graph.params:,} parameters")
    groups = Table(title=f"{len(inspection.groups)} prunable groups", title_justify="left")
    groups.add_column("Group", overflow="fold")
    for heading in ("Channels", "Layers", "MACs", "Parameters"):
        groups.add_column(heading, justify="right", no_wrap=True)
    notes = [one.group.approximate if one.in_scope else "left out by the config's scopes" for one in inspection.groups]
    if any(notes):
        groups.add_column("Note", overflow="fold")
    for one, note in zip(inspection.groups, notes, strict=True):
        saved = (f"-{one.macs_saved:.1%}", f"-{one.params_saved:.1%}")
        cells = (one.group.name, str(one.group.size), str(len(one.producers)), *saved, note)
        groups.add_row(*(escape(cell) for cell in cells[: len(groups.columns)]))
    console.print(groups)
    console.print("Layers: how many write these channels. MACs, parameters: what halving the group alone saves.\n")
    _print_branches(inspection, console)
    by_reason: dict[str, list[str]] = {}
    for entry in graph.pinned:
        where = f" ({entry.location})" if entry.location else ""
        by_reason.setdefault(f"{entry.reason}{where}", []).append(f"{entry.name} ({entry.size})")
    pinned = Table("Layer (channels)", "Reason", title=f"{len(graph.pinned)} not prunable", title_justify="left")
    for column in pinned.columns:
        column.overflow = "fold"
    for reason, layers in by_reason.items():
        pinned.add_row(escape("\n".join(layers)), escape(reason))
        pinned.add_section()
    console.print(pinned)
    for operation, count in graph.unsupported_ops.items():
        console.print(escape(f"No rule for {operation}, met {count} times: its channels stay."), soft_wrap=True)


def _print_branches(inspection: Inspection, console: Console) -> None:
    branches = Table(
        "Block", "Layers that go", title='Residual branches that may go ("min_channels": 0)', title_justify="left"
    )
    for branch in inspection.graph.branches:
        branches.add_row(escape(branch.block), escape(", ".join(branch.layers)))
    if branches.rows:
        console.print(branches)
        console.print()
    by_reason: dict[str, list[str]] = {}
    for one in inspection.groups:
        if one.keeps_one not in ("", IN_NO_BRANCH):
            by_reason.setdefault(one.keeps_one, []).append(one.group.name)
    for reason, names in by_reason.items():
        console.print(escape(f"At least one channel stays of {', '.join(names)}: {reason}."))


if __name__ == "__main__":
    main()
