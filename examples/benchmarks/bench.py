"""All benchmarks from one place: what there is, running them, going on after an interruption, and their tables.

    python examples/benchmarks/bench.py list
    python examples/benchmarks/bench.py run NAME ... [--data FOLDER] [--work FOLDER]
    python examples/benchmarks/bench.py resume              # what the last `run` has not finished
    python examples/benchmarks/bench.py peers [NAME ...]    # makes the peers' environments alone
    python examples/benchmarks/bench.py report              # RESULTS.md, from the files that lie here; runs nothing

Every benchmark is a script of its own that keeps its rows and goes on where it was killed; ``bench_list.py`` names
them. A peer has an environment of its own in ``.venv-bench/``, behind which the environment of this process stands.
Each finished run appends one line to ``results.jsonl``: machine, package versions, seeds, commit, commands, seconds,
and the rows of the files it wrote.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from bench_list import BENCHMARKS, PEERS, Benchmark
from bench_tables import rows_of, tables_of
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, REPORT, PLAN = HERE / "results.jsonl", HERE / "RESULTS.md", Path("runs") / "bench.json"
ENVIRONMENTS = ROOT / ".venv-bench"
PACKAGES = ("torch", "nncf", "openvino", "onnx", "onnxruntime", "timm", "transformers", "numpy")
SHOWN_ROWS = 16  # of a table in RESULTS.md; longer ones are linked
BY_NAME = {one.name: one for one in BENCHMARKS}

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False)


# -- where and with what ---------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(python: str, also: Sequence[str] = ()) -> dict[str, str]:
    """Installed versions in an environment.

    :param python: its interpreter.
    :param also: packages beside those that every benchmark uses.
    """
    names = [*PACKAGES, *also]
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor n in sys.argv[1:]:\n"
        "    try: found[n] = m.version(n)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    own = {"nncf_compactprune": metadata.version("nncf_compactprune")}
    return own | json.loads(done.stdout)


def commit() -> dict[str, Any]:
    """The commit of the code, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {"commit": git("rev-parse", "--short=12", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}


def environment(peer: str | None) -> str:
    """The interpreter of a peer's environment, made where it is missing; this one for no peer.

    :param peer: a key of ``PEERS``.
    """
    if peer is None:
        return sys.executable
    folder = ENVIRONMENTS / peer
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.is_file() and ready.read_text() == repr(PEERS[peer]):
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    behind = sysconfig.get_path("purelib")
    (own / "behind.pth").write_text(f"import site; site.addsitedir({behind!r})\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *shlex.split(os.environ.get("PIP_FLAGS", "")), *PEERS[peer]], check=True)
    ready.write_text(repr(PEERS[peer]))
    return str(python)


# -- running ---------------------------------------------------------------------------------------------------------


def run_one(benchmark: Benchmark, data: Path, work: Path, results: Path = RESULTS) -> dict[str, Any]:
    """Runs one benchmark to its end and keeps what came out.

    :param benchmark: which.
    :param data: the folder of data sets and trained weights.
    :param work: where it may keep exported files.
    :param results: the file that gets one more line.
    :raises subprocess.CalledProcessError: a command failed; its own rows lie where it left them.
    """
    python = environment(benchmark.peer)
    started, begun = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    pythons = {peer: environment(peer) for peer in PEERS if any(f"{{{peer}}}" in one for one in benchmark.commands)}
    places = {"data": data, "work": work / benchmark.name, **pythons}
    commands = [command.format(**places) for command in benchmark.commands]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for command in commands:
        subprocess.run([python, *shlex.split(command)], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": search})
    files = [HERE / name for name in benchmark.results]
    record = {
        "benchmark": benchmark.name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begun, 1),
        "commands": [f"python {command}" for command in benchmark.commands],
        "seeds": benchmark.seeds,
        **commit(),
        "machine": machine(),
        "versions": versions(python, [spec.partition("==")[0] for spec in PEERS.get(benchmark.peer or "", ())]),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files},
        "rows": [row for path in files for row in rows_of(path)],
    }
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def _run_all(names: Sequence[str], data: Path, work: Path) -> None:
    console, waiting = Console(), list(names)
    while waiting:
        PLAN.parent.mkdir(exist_ok=True)
        PLAN.write_text(json.dumps({"waiting": waiting, "data": str(data), "work": str(work)}))
        console.print(f"{waiting[0]}: about {BY_NAME[waiting[0]].minutes} minutes. Then {len(waiting) - 1} more.")
        record = run_one(BY_NAME[waiting[0]], data, work)
        console.print(f"{waiting[0]}: {len(record['rows'])} rows in {record['seconds']:.0f} s")
        waiting.pop(0)
    PLAN.unlink(missing_ok=True)
    write_report()
    console.print(f"Written to {REPORT.relative_to(ROOT)}")


Data = Annotated[Path, typer.Option(help="Data sets and trained weights; each script says which files.")]
Work = Annotated[Path, typer.Option(help="Where exported files may lie.")]


@app.command("list")
def list_command() -> None:
    """Say what there is."""
    table = Table("Benchmark", "What it measures", "Minutes", "Peer", "Files")
    for one in BENCHMARKS:
        table.add_row(one.name, one.title, str(one.minutes), one.peer or "", "\n".join(one.results))
    Console().print(table)


@app.command("run")
def run_command(
    names: Annotated[list[str], typer.Argument(help="Benchmarks by name, or 'all'.")],
    data: Data = Path("../shared/data"),
    work: Work = Path("runs/bench"),
) -> None:
    """Run benchmarks one after the other. A run that is killed goes on with `resume`."""
    names = list(BY_NAME) if names == ["all"] else names
    if unknown := [name for name in names if name not in BY_NAME]:
        msg = f"no benchmark {', '.join(unknown)}. `bench.py list` names them."
        raise typer.BadParameter(msg)
    _run_all(names, data, work)


@app.command("resume")
def resume_command() -> None:
    """Go on with what the last `run` has not finished."""
    if not PLAN.is_file():
        msg = f"nothing to go on with: {PLAN} is not there. Start with `bench.py run`."
        raise typer.BadParameter(msg)
    plan = json.loads(PLAN.read_text())
    _run_all(plan["waiting"], Path(plan["data"]), Path(plan["work"]))


@app.command("peers")
def peers_command(names: Annotated[list[str] | None, typer.Argument(help="All by default.")] = None) -> None:
    """Make the environments of peers."""
    for name in names or list(PEERS):
        print(f"{name}: {environment(name)}")


# -- the report ------------------------------------------------------------------------------------------------------


def records(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The last record of every benchmark."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {record["benchmark"]: record for record in map(json.loads, lines)}


def report_text() -> str:
    """RESULTS.md, from the files that lie here."""
    kept = records()
    parts = [
        "# Results\n",
        "Gathered by `python examples/benchmarks/bench.py report` from the files of the benchmarks; nothing is run for",
        "it. Each figure comes from the command beside it. Machine and versions stand in each file, and for runs by",
        "`bench.py` in `results.jsonl`. What each package can do at all: [features.md](features.md).\n",
        "| Benchmark | What it measures | Command | Minutes |",
        "| --- | --- | --- | ---: |",
    ]
    parts += [
        f"| [{one.name}](#{one.name}) | {one.title} | `bench.py run {one.name}` | {one.minutes} |" for one in BENCHMARKS
    ]
    parts += ["\n## Where this package is not ahead\n"]
    parts += [f"- **{one.name}**: {line}" for one in BENCHMARKS for line in one.behind]
    for one in BENCHMARKS:
        parts += [f"\n## {one.name}\n", f"{one.title}. `{one.commands[0].split()[0]}`, about {one.minutes} minutes."]
        if one.name in kept:
            record = kept[one.name]
            where = record["machine"]
            parts += [
                f"Last run by `bench.py`: {record['started'][:10]}, commit {record['commit']}"
                f"{', changed files' if record['changed'] else ''}; {where['cpu']}, {where['cores']} cores, "
                f"{where['memory_gib']} GiB, torch {record['versions'].get('torch', '?')}. Seeds: {record['seeds']}."
            ]
        for name in one.results:
            parts.append(_file_text(HERE / name))
    return "\n".join(parts).rstrip("\n") + "\n"


def _file_text(path: Path) -> str:
    if not path.is_file():
        return f"\n{path.name} is not there: this benchmark has not been run.\n"
    if path.suffix != ".md":
        return ""
    parts = [f"\nFrom [{path.name}]({path.name}):"]
    for heading, table in tables_of(path.read_text(encoding="utf-8")):
        long = len(table) - 2 > SHOWN_ROWS
        parts.append((f"\n{heading}:" if heading else "") + (f"\n{len(table) - 2} rows, in the file." if long else ""))
        if not long:
            parts += ["", *table]
    return "\n".join(parts)


def write_report() -> None:
    REPORT.write_text(report_text(), encoding="utf-8")


@app.command("report")
def report_command() -> None:
    """Write RESULTS.md from the files that lie here."""
    write_report()
    print(f"Written to {REPORT.relative_to(ROOT)}")


if __name__ == "__main__":
    app()
