"""Detection, segmentation, pose, depth, video, speech, text: what becomes of networks that people deploy.

    pip install --no-deps ultralytics opencv-python-headless ultralytics-thop   # AGPL: only for this benchmark
    python examples/benchmarks/coverage_tasks.py                 # everything; a killed run goes on where it was
    python examples/benchmarks/coverage_tasks.py --only yolov8n,BERT
    python examples/benchmarks/coverage_tasks.py --only "nnU-Net-like, 2D"     # a name with a comma, alone
    python examples/benchmarks/coverage_tasks.py --times         # OpenVINO, dense against pruned, in turns
    python examples/benchmarks/coverage_tasks.py --report        # only writes the table anew

Every network has random weights (``task_networks.py``) and is pruned to half of its MACs with the default settings, or
to the least that its pinned channels allow; where these keep more than 80 % of the MACs, with ``allow_approximate``
("by consent"). It is *exact* when the masked = compact check holds at the outputs and inside, and forward and backward
run in training mode. Both exports of the pruned network are reopened and compared with torch; the dense one goes to IR
too, for the times. *Reachable* is the share of the parameters in channels that may go, exactly and by consent.

Torch-Pruning runs in a process of its own with the settings of ``coverage.py``: channel ratio 0.3, everything that its
users can name without reading the network's code left to it.
"""

from __future__ import annotations

import json
import os
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
from coverage import Worker, _number, _percent, ours, read, theirs, trains, with_varied_norms
from rich.console import Console
from rich.progress import track
from task_networks import NETWORKS

HERE = Path(__file__).parent
RESULTS = HERE / "coverage_tasks.jsonl"
FILES = HERE.parents[1] / "runs" / "coverage_tasks"
LIMIT_SECONDS = 600.0


def built(name: str) -> tuple[torch.nn.Module, Any, Any]:
    """The network, its example inputs, and what it trains with."""
    torch.manual_seed(0)
    model, x, *training = NETWORKS[name].build()
    return with_varied_norms(model), x, training[0] if training else x


def measure(side: str, name: str) -> dict[str, Any]:
    """One side's result on one network."""
    warnings.filterwarnings("ignore")
    if side == "files":
        return {"files": files_of(name)}
    if side == "ms":
        return {"ms": milliseconds(name)}
    model, x, training = built(name)
    if side == "theirs":
        return {"theirs": theirs(model, x, training)}
    from nncf_compactprune.channels import trace

    row: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "dense_trains": trains(model, training),
    }
    for key, consent in (("reachable", False), ("reachable_by_consent", True)):
        graph = trace(model, x, allow_approximate=consent)
        row[key] = 1 - graph.cost.params([1] * len(graph.groups)) / max(graph.params, 1)
    row["ours"] = ours(model, x, {}, training)
    return row


def files_of(name: str) -> dict[str, str]:
    """The pruned network as ONNX and IR, the dense one as IR, and as ONNX where the pruned one fails."""
    model, x, training = built(name)
    result = {}
    if ours(model, x, {}, training)["status"] == "exact":
        result = {"onnx": exported(model, x, name, "pruned.onnx"), "openvino": exported(model, x, name, "pruned.xml")}
    dense, x, _ = built(name)
    result["openvino_dense"] = exported(dense, x, name, "dense.xml")
    if result.get("onnx"):
        result["onnx_dense"] = exported(dense, x, name, "dense.onnx")
    return result


def exported(model: torch.nn.Module, x: Any, name: str, file: str) -> str:
    """Empty where the file computes what torch computes; the error otherwise."""
    from nncf_compactprune import export_model

    try:
        export_model(model, x, folder_of(name) / file, dynamic_batch=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace(f"{folder_of(name)}{os.sep}", "")[:300]
    return ""


def sweep(names: Iterable[str]) -> None:
    """First what this package does with every network, then their files, then the peer."""
    worker = Worker(measure, LIMIT_SECONDS)
    for side in ("ours", "files", "theirs"):
        done = {row["name"] for row in read(RESULTS) if side in row}
        for name in track([n for n in names if n not in done], side, console=Console(stderr=True)):
            task = NETWORKS[name]
            write({"library": task.library, "family": name, "name": name, "task": task.task} | worker(side, name))


def write(row: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def times(names: Iterable[str]) -> None:
    """What is missing of the times, each in the worker: OpenVINO itself dies on some networks."""
    worker = Worker(measure, LIMIT_SECONDS)
    rows = {row["name"]: row for row in read(RESULTS)}
    for name in names:
        row, folder = rows.get(name, {}), folder_of(name)
        if "ms" not in row and all((folder / f"{kind}.xml").exists() for kind in ("dense", "pruned")):
            write({k: row[k] for k in ("library", "family", "name")} | worker("ms", name))


def folder_of(name: str) -> Path:
    return FILES / name.replace(" ", "_")


def milliseconds(name: str) -> dict[str, float]:
    """Of a request in OpenVINO as it serves by default, dense and pruned in turns."""
    from nncf_compactprune.export.latency import measure_latency

    _, x, _ = built(name)
    files = {kind: folder_of(name) / f"{kind}.xml" for kind in ("dense", "pruned")}
    return {kind: taken.median_ms for kind, taken in measure_latency(files, x, runs=15, warmup=3).items()}


# -- the report -----------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> str:
    order = list(NETWORKS)
    rows = sorted((r for r in rows if "ours" in r), key=lambda r: order.index(r["name"]))
    exact = [r for r in rows if r["ours"]["status"] == "exact"]
    ratios = [r["ms"]["pruned"] / r["ms"]["dense"] for r in exact if "dense" in r.get("ms", {})]
    tried = [r for r in rows if "theirs" in r]
    peer = [r for r in rows if r.get("theirs", {}).get("status") == "pruned"]
    with_files = [r for r in exact if "files" in r]
    lines = [
        f"{len(rows)} of {len(NETWORKS)} networks measured. Pruned, checked and trained a step: {len(exact)}.",
        "",
        *([f"Torch-Pruning, tried on {len(tried)}: {len(peer)} run and train; what they compute is not asked.", ""]
          if tried else []),
        *([f"Files that compute what torch computes, of {len(with_files)}: ONNX "
           f"{sum(_file(r, 'onnx') == 'yes' for r in with_files)}, OpenVINO IR "
           f"{sum(_file(r, 'openvino') == 'yes' for r in with_files)}.", ""] if with_files else []),
        *(["Time in OpenVINO as it serves by default (bfloat16 where the CPU has it), pruned over dense: geometric "
           f"mean {statistics.geometric_mean(ratios):.2f} of {len(ratios)} networks.", ""] if ratios else []),
        "| network | task | library | params, M | reachable | by consent | MACs left | error | inside | ours "
        "| trains | ONNX | IR | ms, dense | ms, pruned | Torch-Pruning |",
        "|" + "---|" * 16,
    ]  # fmt: skip
    for r in rows:
        mine, ms = r["ours"], r.get("ms", {})
        inside = mine.get("check", "").rpartition(" at the outputs, ")[2] or mine.get("check", "").partition(", ")[2]
        lines.append(
            f"| {r['name']} | {r['task']} | {r['library']} | {_number(r.get('params', 0) / 1e6, '.2f')} | "
            f"{_percent(r.get('reachable'))} | {_percent(r.get('reachable_by_consent'))} | "
            f"{_percent(mine.get('macs_left'))} | {_number(mine.get('error'), '.0e')} | "
            f"{inside.partition(' inside')[0]} | {mine['status']}{' (by consent)' if mine.get('by_consent') else ''} | "
            f"{'yes' if mine.get('trains') else 'no'} | {_file(r, 'onnx')} | {_file(r, 'openvino')} | "
            f"{_number(ms.get('dense'), '.2f')} | {_number(ms.get('pruned'), '.2f')} | "
            f"{r.get('theirs', {}).get('status', 'not run')} |"
        )
    failures: list[str] = []
    reasons: dict[str, list[str]] = {}
    for r in rows:
        if r["ours"]["status"] != "exact":
            failures.append(f"- {r['name']}: {r['ours']['status']}: {r['ours'].get('why', '')}")
        if "why" in r.get("ms", {}):
            failures.append(f"- {r['name']}, times: {r['ms']['why']}")
        for kind, reason in r.get("files", {}).items():
            if reason:
                reasons.setdefault(reason.replace("\n", " "), []).append(f"{r['name']} ({kind.replace('_', ', ')})")
    failures += [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    endings = [f"- {r['name']}: {r['theirs']['why']}".splitlines()[0] for r in tried if r["theirs"].get("why")]
    if failures:
        failures += [
            "",
            "rtdetr-l and D-FINE choose among nearly equal scores of random weights: rounding decides. torchvision's "
            "detectors take lists of images, and its own operations were not there to be exported. OpenVINO itself "
            "dies on two dense language models in bfloat16.",
        ]
    for title, entries in (("What did not work, and why", failures), ("Why Torch-Pruning ends", endings)):
        lines += ["", f"## {title}", "", *entries] if entries else []
    return "\n".join(lines) + "\n"


def _file(row: dict[str, Any], kind: str) -> str:
    files = row.get("files", {})
    if kind not in files:
        return ""
    if not files[kind]:
        return "yes"
    return "no, nor dense" if files.get(f"{kind}_dense") else "no"


def main(
    only: str = "",
    time_only: bool = typer.Option(False, "--times"),
    report_only: bool = typer.Option(False, "--report"),
) -> None:
    names = [name for name in NETWORKS if not only or name == only or name in only.split(",")]
    if time_only:
        times(names)
    elif not report_only:
        sweep(names)
    (HERE / "coverage_tasks.md").write_text(report(read(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
