"""Which package can do what: every cell is tried here, or looked up in the source of the installed package.

    python examples/benchmarks/features.py run             # all packages, each in its environment, and the table
    python examples/benchmarks/features.py probe PACKAGE   # one package, in the environment of this process, as JSON
    python examples/benchmarks/features.py table           # features.md from features.jsonl

``features_cells.py`` holds the cells. A cell that cannot be shown to be what it says ends the run.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from features_cells import FEATURES, PACKAGES, probe

HERE = Path(__file__).resolve().parent
ROWS, TABLE = HERE / "features.jsonl", HERE / "features.md"
SIGNS = {"yes": "**yes**", "partly": "partly", "no": "no", "none": "-"}
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


@app.command("probe")
def probe_command(package: str) -> None:
    """Try one package."""
    for row in probe(package):
        print("cell:", json.dumps(row), flush=True)


@app.command("run")
def run_command(only: str = "") -> None:
    """Try all packages, and write the table."""
    from bench import commit, environment, machine, versions

    kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    for package in PACKAGES.values():
        if only not in ("", package.name):
            continue
        python = environment(package.peer)
        words = [python, str(HERE / "features.py"), "probe", package.name]
        variables = os.environ | package.variables | {"PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(words, capture_output=True, text=True, env=variables, check=False)
        if done.returncode:
            print(f"{package.name}: {done.stdout}{done.stderr}")
            raise typer.Exit(1)
        found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("cell: ")]
        said = {"machine": machine(), "versions": versions(python, package.packages), "seed": 0, **commit()}
        kept = [row for row in kept if row["package"] != package.name] + [row | said for row in found]
        print(f"{package.name}: {len(found)} cells")
    order = list(PACKAGES)
    kept.sort(key=lambda row: order.index(row["package"]))
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    TABLE.write_text(table(kept), encoding="utf-8")


@app.command("table")
def table_command() -> None:
    """Write the table from the rows there are."""
    TABLE.write_text(table([json.loads(line) for line in ROWS.read_text().splitlines()]), encoding="utf-8")


def table(rows: list[Mapping[str, Any]]) -> str:
    """features.md.

    :param rows: cells, as :func:`features_cells.probe` gives them.
    """
    cells = {(row["package"], row["feature"]): row for row in rows}
    packages = [package for package in PACKAGES.values() if any(row["package"] == package.name for row in rows)]
    lines = [
        "# Peers, feature by feature\n",
        "Written by `python examples/benchmarks/features.py run`, which tries every cell, or looks it up in the",
        "installed package's own source, and stops at one that is not so. What was tried or read stands below the",
        "table, and what *partly* means. How well a feature works is another question: [RESULTS.md](RESULTS.md).\n",
        "| | " + " | ".join(package.title for package in packages) + " |",
        "| --- |" + " --- |" * len(packages),
    ]
    for feature, sentence in FEATURES.items():
        signs = [SIGNS[cells[package.name, feature]["answer"]] for package in packages]
        lines.append(f"| {sentence} | " + " | ".join(signs) + " |")
    lines += ["\n## Where others are ahead\n", *AHEAD, "\n## What was tried or read\n"]
    for feature, sentence in FEATURES.items():
        lines.append(f"### {sentence}\n")
        for package in packages:
            row = cells[package.name, feature]
            if row["answer"] != "none":
                lines.append(f"- {package.title}: {row['answer']}. {row['evidence']}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


AHEAD = [
    "- **Kernels that skip zeros, float8, 4-bit kernels on a GPU**: take torchao. This package's networks are faster",
    "  since they are narrower.",
    "- **4-bit weights of language models**: take `nncf.compress_weights` or torchao. `data_free_quantization` has",
    "  levels of 4 bits, on the 8-bit grid that OpenVINO computes convolutions in.",
    "- **The width behind a LayerNorm**: Torch-Pruning cuts it, and does not say that the norm's statistics change.",
    "  This package does so by consent (`allow_approximate`), and reports it.",
    "- **Masks by hand**: `torch.nn.utils.prune` needs no graph and works on any parameter of any module.",
]

if __name__ == "__main__":
    app()
