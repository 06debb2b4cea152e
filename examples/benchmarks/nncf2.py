"""The same configuration file and training script on NNCF 2.19 and on this package.

    python examples/benchmarks/nncf2.py --data FOLDER --nncf2 .venv-nncf219/bin/python [--seeds 3]

``FOLDER`` holds CIFAR-10's packs (see ``cifar_packs.py``) and the trained ``resnet20_cifar10.safetensors``; ``--nncf2``
is the Python of an environment with NNCF 2.19 (``make .venv-nncf219/.installed``). Each training runs in a process of
its own, on one thread (``nncf2_side.py``). Step times are paired: both sides hold a network at the same epoch and
train in turns. Latencies are those of both files in turns. What ``nncf2.jsonl`` holds is not measured again, so a
killed run goes on; ``--seeds 0`` measures step times alone. Writes ``nncf2.md``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer

from nncf_compactprune.export.latency import measure_latency

HERE = Path(__file__).parent
SIDES = ("nncf2", "here")
STAGES = {"while pruning": 1, "after pruning": 4}  # epochs
ROUNDS, STEPS = 7, 4


def filters(**params: Any) -> dict[str, Any]:
    """The entry of filter pruning."""
    schedule = {"schedule": "exponential", "pruning_steps": 3, "filter_importance": "geometric_median"}
    return {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": {**schedule, **params}}


QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 1280}}}
CASES: dict[str, list[dict[str, Any]]] = {
    "half_the_filters": [filters(pruning_target=0.5)],
    "half_the_flops": [filters(pruning_flops_target=0.5)],
    "quantization": [QUANTIZATION],
    "filters_and_quantization": [filters(pruning_target=0.5), QUANTIZATION],
}
WORDS = {
    "half_the_filters": "`filter_pruning`, half of the filters",
    "half_the_flops": "`filter_pruning`, half of the FLOPs",
    "quantization": "`quantization`",
    "filters_and_quantization": "`filter_pruning`, half of the filters, and `quantization`",
}


class Rows:
    """What was measured, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **keys: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def start(python: str, *arguments: Any) -> subprocess.Popen[str]:
    command = ["nice", "-n", "5", python, str(HERE / "nncf2_side.py"), *map(str, arguments)]
    # Each NNCF compiles its own extension, and both call it by one name.
    extensions = Path(arguments[-1]) / f"extensions_{arguments[1]}"
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> str:
    """The last line that a process printed."""
    out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    return out.splitlines()[-1]


def answer(process: subprocess.Popen[str], steps: int | None = None) -> str:
    """The next line after an order that starts with ``ready`` or is a number."""
    assert process.stdin is not None
    assert process.stdout is not None
    if steps is not None:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith("ready") or line.strip().replace(".", "", 1).isdigit():
            return line.strip()
    raise SystemExit(process.stderr.read() if process.stderr else "")


def paired_steps(pythons: dict[str, str], config: Path, epoch: int, data: Path, work: Path) -> dict[str, list[float]]:
    """Seconds of training steps, in turns."""
    sides = {side: start(pythons[side], "steps", side, config, epoch, data, work) for side in pythons}
    try:
        for process in sides.values():
            answer(process)
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, process in sides.items():
                taken[side].append(float(answer(process, STEPS)) / STEPS)
        return taken
    finally:
        for process in sides.values():
            process.kill()


def measure(rows: Rows, pythons: dict[str, str], seeds: int, data: Path, work: Path, cases: list[str]) -> None:
    """Everything that is not there yet."""
    for case in cases:
        document = {"input_info": {"sample_size": [1, 3, 32, 32]}, "compression": CASES[case]}
        (work / f"{case}.json").write_text(json.dumps(document, indent=4))
    for seed in range(seeds):
        for case in cases:
            config = work / f"{case}.json"
            for side, python in pythons.items():
                if rows.find(case=case, seed=seed, side=side) is None:
                    row = json.loads(result(start(python, "train", side, config, seed, data, work)))
                    rows.add({"case": case, "seed": seed, "side": side} | row)
            both = len(pythons) == len(SIDES)
            files = {side: work / f"{case}_{side}_{seed}.xml" for side in SIDES}
            if (
                both
                and rows.find(case=case, seed=seed, latency=True) is None
                and all(f.exists() for f in files.values())
            ):
                taken = measure_latency(files, torch.randn(1, 3, 32, 32), runs=500, warmup=50)
                rows.add({"case": case, "seed": seed, "latency": True} | {s: t.median_ms for s, t in taken.items()})
    for case in cases if len(pythons) == len(SIDES) else []:
        for stage, epoch in STAGES.items():
            if rows.find(case=case, stage=stage) is None:
                seconds = paired_steps(pythons, work / f"{case}.json", epoch, data, work)
                rows.add({"case": case, "stage": stage, "seconds": seconds})


def table(rows: Rows) -> str:
    """The figures as Markdown."""
    lines = [
        "# NNCF 2.19's configurations, there and here",
        "",
        "`python examples/benchmarks/nncf2.py`. ResNet-20 for CIFAR-10 (91.73 % dense), 10,000 training images, 6 "
        "epochs, the schedule exponential over the first 3, SGD, batch 128, one thread; accuracy on all 10,000 test "
        f"images. The same file and script on NNCF 2.19.0 and on this package with NNCF {version('nncf')}, torch "
        f"{version('torch')}, OpenVINO {version('openvino')}. Files are FP32, or INT8 as fake quantization; MACs are "
        "counted in them. Latency: batch 1, both files in turns. Step time: both sides in turns, medians of ratios.",
        "",
        "| config | seeds | accuracy, % | here | ONNX, bytes | here | IR, bytes | here | MACs in the file | here "
        "| latency, ms | here | step while pruning, s | here | step after, s | here |",
        "|" + "---|" * 16,
    ]
    for case, words in WORDS.items():
        sides = {
            side: [row for row in rows.rows if row.get("case") == case and row.get("side") == side] for side in SIDES
        }
        if not sides["nncf2"]:
            continue
        cells = [words, f"{len(sides['nncf2'])}, {len(sides['here'])}"]
        cells += pair([[row["accuracy"] for row in sides[side]] for side in SIDES], "{:.2f}", spread=True, ratio=False)
        for key in ("onnx_bytes", "ir_bytes", "macs"):
            cells += pair([[row[key] for row in sides[side]] for side in SIDES], "{:,.0f}")
        taken = [row for row in rows.rows if row.get("case") == case and row.get("latency")]
        cells += pair([[row[side] for row in taken] for side in SIDES], "{:.3f}")
        for stage in STAGES:
            found = rows.find(case=case, stage=stage)
            cells += pair([found["seconds"][side] if found else [] for side in SIDES], "{:.3f}", middle=True)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair(
    values: list[list[float]], form: str, *, spread: bool = False, ratio: bool = True, middle: bool = False
) -> list[str]:
    """Two cells: the mean of each side, and how many times the other's it is here."""
    mean = statistics.median if middle else statistics.mean
    cells = []
    for side in values:
        cell = form.format(mean(side)) if side else "-"
        cells.append(cell + (f" ({min(side):.2f} to {max(side):.2f})" if spread and len(side) > 1 else ""))
    if ratio and all(values):
        share = statistics.median(b / a for a, b in zip(*values, strict=False))
        cells[1] += f" (**{share:.0%}**)"
    return cells


def main(
    data: Path = Path("../shared/data"),
    nncf2: Path = Path(".venv-nncf219/bin/python"),
    seeds: int = 1,
    work: Path = Path("runs/nncf2"),
    only: str = "",
    cases: str = ",".join(CASES),
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    pythons = {"nncf2": str(nncf2), "here": sys.executable}
    rows = Rows(HERE / "nncf2.jsonl")
    chosen = {side: python for side, python in pythons.items() if only in ("", side)}
    measure(rows, chosen, seeds, data.resolve(), work.resolve(), cases.split(","))
    (HERE / "nncf2.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
