"""The last stage of a run: both networks exported, timed and side by side in a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nncf_compactprune.cut.self_check import SelfCheck
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.export import (
    ExportedFile,
    ExportOptions,
    Pixels,
    export_model,
    is_quantized,
)
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.report import Comparison, NetworkFigures, plot_widths, to_json, to_markdown
from nncf_compactprune.report.charts import curves, layer_times
from nncf_compactprune.report.page import PAGE_FILE, run_page
from nncf_compactprune.report.summary import SUMMARY_FILE, Summary, summary_text
from nncf_compactprune.run.compress import Compressed
from nncf_compactprune.run.environment import environment
from nncf_compactprune.run.model_card import model_card
from nncf_compactprune.run.progress import tracked
from nncf_compactprune.run.served import layers, served, torch_sides
from nncf_compactprune.run.state import Network, Run
from nncf_compactprune.run.timing import times_of_budgets, times_of_files
from nncf_compactprune.storage.writing import write_whole
from nncf_compactprune.version import __version__

WIDTHS_PICTURE, CURVES_PICTURE, LAYERS_PICTURE = "widths.png", "training.png", "layers.png"
Files = Mapping[str, Sequence[ExportedFile]]


def compare(run: Run, compressed: Compressed) -> Comparison:
    """Exports, verifies and times both networks, and writes the report.

    :param run: where to, and with which formats.
    :param compressed: the networks.
    """
    run.say("Exporting and verifying")
    plan, networks = compressed.plan, {"dense": compressed.dense, "pruned": compressed.pruned}
    files = _export(run, networks)
    budgets, times = times_of_budgets(run, compressed), times_of_files(files, run.example)
    comparison = Comparison(
        *(
            NetworkFigures(
                cost.macs,
                cost.params,
                networks[name].accuracy,
                {file.label: file.bytes for file in files[name]},
                budgets[name] | times[name],
            )
            for name, cost in (("dense", plan.before), ("pruned", plan.after))
        )
    )
    sides = torch_sides(run, compressed)
    text = summary_text(
        _document(run, comparison, compressed, files)
        | {"served": served(run, files, sides), "layers": layers(files, sides)}
    )
    write_whole(run.directory / SUMMARY_FILE, text.encode())
    pictures = _pictures(run, plan, Summary.model_validate_json(text))
    _write_markdown(run, comparison, compressed, pictures)
    card = model_card(run, comparison, plan, files["pruned"], export_options(run, pruned=True))
    write_whole(run.directory / "model_card.md", card.encode())
    return comparison


def _pictures(run: Run, plan: PruningPlan, summary: Summary) -> list[str]:
    """Writes the page and the pictures, which are extras: the figures are in report.md and summary.json."""
    missing = [name for name in ("matplotlib", "jinja2") if not find_spec(name)]
    if missing:
        run.say(f"No {PAGE_FILE}: {' and '.join(missing)} not installed (pip install 'nncf-compactprune[report]')")
        return []
    write_whole(run.directory / PAGE_FILE, run_page(summary).encode())
    drawn = []
    if plan.groups:
        drawn.append(plot_widths(plan.groups, run.directory / WIDTHS_PICTURE).name)
    for name, picture in (
        (CURVES_PICTURE, curves(summary, "png")),
        (LAYERS_PICTURE, layer_times(summary.layers, "png")),
    ):
        if picture is not None:
            drawn.append(write_whole(run.directory / name, picture).name)
    return drawn


def _export(run: Run, networks: Mapping[str, Network]) -> dict[str, Sequence[ExportedFile]]:
    chosen = run.config.export
    files: dict[str, Sequence[ExportedFile]] = {}
    with tracked(networks, "Exporting") as names:
        for name in names:
            model, target = networks[name].model, run.directory / name
            precisions = None if is_quantized(model) else chosen.precisions  # a quantized network has one only
            files[name] = export_model(
                model,
                run.example,
                target,
                chosen.formats,
                precisions,
                input_names=chosen.input_names,
                output_names=chosen.output_names,
                options=export_options(run, name == "pruned"),
            )
    if chosen.layout != "plain":
        model = networks["pruned"].model
        export_to_layout(
            model,
            run.example,
            run.directory / chosen.layout,
            chosen.layout,
            precision=None if is_quantized(model) else chosen.precisions[0],
            input_names=chosen.input_names,
            output_names=chosen.output_names,
            options=export_options(run, pruned=True),
        )
    return files


def export_options(run: Run, pruned: bool) -> ExportOptions:
    """What files say about their images and classes, and how they are written.

    :param run: the run.
    :param pruned: for the pruned network's files, whose classifier may have been cut; otherwise for the dense one's.
    """
    chosen, data = run.config.export, run.dataset
    asked = {key: getattr(chosen, key) for key in ("batch", "dynamic_size", "opset", "external_data")}
    if data is None:
        return ExportOptions(**asked)
    plan = plan_of(run.model)
    kept = plan.output_classes if pruned and plan is not None and plan.output_classes else range(len(data.class_names))
    labels = [data.class_names[at] for at in kept] if data.labelled else []
    pixels = Pixels(tuple(data.mean), tuple(data.std))
    return ExportOptions(**asked, labels=labels, pixels=pixels, embed_preprocessing=chosen.embed_preprocessing)


def _document(run: Run, comparison: Comparison, compressed: Compressed, files: Files) -> dict[str, Any]:
    """The summary, but for what is found of the files as served."""
    plan, options = compressed.plan, export_options(run, pruned=True)
    return {
        "version": __version__,
        "torch": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "environment": environment(),
        "config": dict(run.settings.document),
        "files": dict(run.files),
        "model": run.config.model,
        "dataset": run.config.dataset,
        "algorithm": plan.algorithm,
        "classes": list(plan.output_classes) or None,
        **json.loads(to_json(comparison)),
        "widths": [vars(group) for group in plan.groups],
        "pinned": [{"name": name, "channels": size, "reason": reason} for name, size, reason in plan.pinned],
        "verification": {
            f"{network}/{file.path.name}": {
                "runtime": file.verification.runtime,
                "max_rel_error": file.verification.max_rel_error,
                "tolerance": file.verification.tolerance,
                "batch_sizes": list(file.verification.batch_sizes),
            }
            for network, exported in files.items()
            for file in exported
        },
        **({} if compressed.watched is None else {"accuracy_aware_training": compressed.watched.to_json()}),
        "self_check": {name: _as_json(check) for name, check in compressed.checks.items()},
        **({} if not compressed.latency else {"latency_budget": {n: asdict(r) for n, r in compressed.latency.items()}}),
        "labels": list(options.labels),
        "pixels": None if options.pixels is None else {k: list(v) for k, v in vars(options.pixels).items()},
        "epochs": list(run.snapshots.history),
    }


def _as_json(check: SelfCheck) -> dict[str, Any]:
    return {"proof": check.is_proof, **vars(check)}


def _write_markdown(run: Run, comparison: Comparison, compressed: Compressed, pictures: Sequence[str]) -> None:
    config, plan = run.config, compressed.plan
    data = f"Dataset `{config.dataset}`" if config.dataset is not None else "No dataset"
    data += ", without labels" if run.dataset is not None and not run.dataset.labelled else ""
    lines = [
        f"# {config.model}, pruned",
        "",
        f"{data}, algorithm `{plan.algorithm}`, seed {config.seed}, version {__version__}.",
        "",
        *([f"For the classes {', '.join(map(str, plan.output_classes))} only.", ""] if plan.output_classes else []),
        to_markdown(comparison),
        *([f"The same with all that was measured, as a page: [{PAGE_FILE}]({PAGE_FILE}).", ""] if pictures else []),
    ]
    for name, check in compressed.checks.items():
        lines += [f"Self-check of `{name}`, cut against masked model: {check}.", ""]
    for name, result in compressed.latency.items():
        lines += [f"Budget of latency of `{name}`: {result}.", "", *result.to_markdown(), ""]
    if compressed.watched is not None:
        lines += compressed.watched.to_markdown()
    lines += [
        "## Channel widths",
        "",
        *([f"![Channel widths]({WIDTHS_PICTURE})", ""] if WIDTHS_PICTURE in pictures else []),
        "| group | dense | pruned |",
        "| --- | ---: | ---: |",
        *(f"| `{group.name}` | {group.before} | {group.after or 'removed'} |" for group in plan.groups),
        *(f"\nBlock `{one.block}` is its shortcut: {', '.join(one.layers)} went." for one in plan.removed),
    ]
    if plan.pinned:
        lines += ["", "## Not prunable", ""]
        lines += [f"- `{name}` ({size} channels): {reason}" for name, size, reason in plan.pinned]
    for title, name in (("Training", CURVES_PICTURE), ("Time of the longest layers", LAYERS_PICTURE)):
        if name in pictures:
            lines += ["", f"## {title}", "", f"![{title}]({name})"]
    write_whole(run.directory / "report.md", ("\n".join(lines) + "\n").encode())
