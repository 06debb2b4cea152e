"""timm's FBNetV3 b, d and g at 65, 52 and 37 % of their MACs: what can be pruned, whether the files are right, time.

Initial weights: neither widths of one share nor times depend on them. Each network is cut by ``fbnet_pruning`` and, at
the same MACs or just below, by Torch-Pruning (L1 norm, one ratio for all layers, found by bisection), written as ONNX
and OpenVINO IR, compared with torch, and timed in turns with the dense network on one thread. For trained networks
``configs/fbnetv3_g_imagenet_family.json`` does the same with ImageNet.

    python examples/benchmarks/fbnetv3.py measure --work runs/fbnetv3      # what is missing there
    python examples/benchmarks/fbnetv3.py report --work runs/fbnetv3

Needs ``make bench-deps``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import openvino
import torch
import typer
from deployment import of_timm, peers
from pages import measured_on, write_page

from nncf_compactprune import export_model, prune
from nncf_compactprune.export import verify_export
from nncf_compactprune.serving import Serving
from nncf_compactprune.serving.benchmark import benchmark

#: pixels of a side, as timm trains them
NETWORKS = {"fbnetv3_b": 224, "fbnetv3_d": 224, "fbnetv3_g": 240}
SHARES = (0.65, 0.52, 0.37)
BF16 = {"OpenVINO bf16": ("xml", Serving(threads=1, precision="bf16"))}  # where the processor has it
SERVED = {
    "OpenVINO f32": ("xml", Serving(threads=1, precision="f32")),
    **(BF16 if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else {}),
    "ONNX Runtime": ("onnx", Serving(threads=1)),
}
app = typer.Typer(help=__doc__, add_completion=False)


def cut(name: str, share: float, folder: Path) -> dict[str, Any]:
    """Prunes a network both ways, writes all files and compares ours with torch.

    :param name: a key of :data:`NETWORKS`.
    :param share: of the MACs.
    :param folder: for the files.
    """
    image = torch.randn(1, 3, NETWORKS[name], NETWORKS[name], generator=torch.Generator().manual_seed(0))
    dense = of_timm(name)(Path())
    model = of_timm(name)(Path())
    started = time.perf_counter()
    done = prune(model, image, budget={"macs": share})
    seconds = time.perf_counter() - started
    least = [1] * len(done.graph.groups)
    row: dict[str, Any] = {
        "network": name,
        "asked": share,
        "macs": done.plan.before.macs,
        "params": done.plan.before.params,
        "macs_reachable": 1 - done.graph.cost.macs(least) / done.graph.macs,
        "params_reachable": 1 - done.graph.cost.params(least) / done.graph.params,
        "groups": len(done.graph.groups),
        "macs_left": done.plan.after.macs / done.plan.before.macs,
        "params_left": done.plan.after.params / done.plan.before.params,
        "seconds": seconds,
        "masked": done.self_check.error,
    }
    theirs, row["peer_share"] = peers(dense, image, "classifier", row["macs_left"])
    for kind, network in {"dense": dense, "ours": model, "peer": theirs}.items():
        export_model(network, image, folder / kind, ["onnx", "openvino"], ["fp32"], dynamic_batch=False)
    for suffix in ("onnx", "xml"):
        row[suffix] = verify_export(model, folder / "ours" / f"model.{suffix}", image).max_rel_error
    return row


def timed(folder: Path, seconds: float) -> dict[str, Any]:
    """Times the files of one network and share in turns, one setting after the other."""
    found: dict[str, Any] = {}
    for setting, (suffix, serving) in SERVED.items():
        files = [folder / kind / f"model.{suffix}" for kind in ("dense", "ours", "peer")]
        dense, ours, peer = benchmark(files, serving=serving, seconds=seconds, memory=False).timings
        found[setting] = {"ms": dense.median_ms, "ours": ours.ratio, "peer": peer.ratio}
    return found


def rows_of(work: Path) -> list[dict[str, Any]]:
    file = work / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@app.command()
def measure(work: Path = Path("runs/fbnetv3"), seconds: float = 5.0) -> None:
    """Adds what is missing."""
    work.mkdir(parents=True, exist_ok=True)
    done = {(row["network"], row["asked"]) for row in rows_of(work)}
    for name in NETWORKS:
        for share in SHARES:
            if (name, share) in done:
                continue
            folder = work / f"{name}_{share}"
            row = cut(name, share, folder) | {"times": timed(folder, seconds)}
            with (work / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


@app.command()
def report(work: Annotated[Path, typer.Option()] = Path("runs/fbnetv3")) -> None:
    """Writes fbnetv3.md."""
    rows = rows_of(work)
    settings = list(rows[0]["times"])
    heads = ["network", "pixels", "MACs", "parameters", "MACs reachable", "asked", "MACs left", "parameters left"]
    heads += ["masked = compact", "ONNX", "IR", *settings]
    lines = [
        "# FBNetV3 at 65, 52 and 37 % of its MACs",
        "",
        "Written by `fbnetv3.py`: timm's networks with initial weights. Reachable is the share of the MACs that goes",
        "with all channels that can be pruned. Errors are relative to the largest value. Times are over the dense",
        "network's, in brackets those of Torch-Pruning's network of the same MACs; one thread, batch 1, in turns.",
        "",
        f"| {' | '.join(heads)} |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    for row in rows:
        cells = [row["network"], str(NETWORKS[row["network"]])]
        cells += [f"{row['macs'] / 1e6:,.0f} M", f"{row['params'] / 1e6:.2f} M", f"{row['macs_reachable']:.1%}"]
        cells += [f"{row['asked']:.0%}", f"{row['macs_left']:.1%}", f"{row['params_left']:.1%}"]
        cells += [f"{row[key]:.0e}" for key in ("masked", "onnx", "xml")]
        cells += [f"{row['times'][setting]['ours']:.2f} ({row['times'][setting]['peer']:.2f})" for setting in settings]
        lines.append(f"| {' | '.join(cells)} |")
    write_page(Path(__file__).with_suffix(".md"), "\n".join([*lines, "", measured_on()]) + "\n")


if __name__ == "__main__":
    app()
