"""What over-parameterised training costs: step time and peak memory of plain, merged and chain, without a teacher.

    python examples/benchmarks/lop_cost.py [--rounds 5] [--threads 1]

ResNet-20 and ResNet-56 for CIFAR-10, the latter also pruned to half of its MACs; random weights and images, batch
128, SGD with momentum and decay. Time: the variants take training steps in turn in one process, and the ratio is the
median over rounds of each step against the plain step beside it. Memory: each variant in a process of its own, how much
its peak of resident memory lies above what the process held before the network was built. Rows are appended to
``lop_cost.jsonl``; what is there is not measured again. Writes ``lop_cost.md``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.run.networks.cifar_resnet import resnet20, resnet56

HERE = Path(__file__).parent
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "resnet56": resnet56}
VARIANTS = ("plain", "merged", "chain")
CASES = (("resnet20", 1.0), ("resnet56", 1.0), ("resnet56", 0.5))  # network, share of its MACs kept
BATCH, EXPANSION, MEMORY_STEPS = 128, 4, 2  # the second step has gradients' and momentum's memory beside it


def make_step(network: str, share: float, variant: str) -> Callable[[], float]:
    """Builds one variant; a call takes one training step and returns its seconds."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    entries: list[dict[str, Any]] = []
    if share < 1:
        entries.append({"algorithm": "fbnet_pruning", "budget": {"macs": share}, "params": {"schedule": "one_shot"}})
    if variant != "plain":
        params = {"form": "factors", "expansion": EXPANSION, "mode": variant}
        no_teacher = {"similarity_weight": 0.0}
        entries.append({"algorithm": "linear_overparameterization", "params": params, "distillation": no_teacher})
    if entries:
        create_compressed_model(model, {"input_info": {"sample_size": [2, 3, 32, 32]}, "compression": entries})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, 0.9, weight_decay=5e-4)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    model.train()

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def measure_memory(network: str, share: float, variant: str) -> float:
    """Peak MiB above the start, in this process."""
    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3))  # oneDNN's own buffers
    before = resident_mib("VmRSS")
    step = make_step(network, share, variant)
    for _ in range(MEMORY_STEPS):
        step()
    return resident_mib("VmHWM") - before


def measure_time(network: str, share: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step by variant; a first round is not counted."""
    steps = {variant: make_step(network, share, variant) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for at in range(rounds + 1):
        for variant, step in steps.items():
            # The chain takes many times as long; half of the rounds are enough for it.
            if variant != "chain" or at <= rounds // 2:
                seconds[variant].append(step())
    return {variant: values[1:] for variant, values in seconds.items()}


def measure(network: str, share: float, rounds: int, threads: int) -> dict[str, Any]:
    seconds = measure_time(network, share, rounds)
    row: dict[str, Any] = {"network": network, "share": share, "rounds": rounds, "seconds": seconds, "memory_mib": {}}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", f"{network},{share},{variant}"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row["memory_mib"][variant] = float(output.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]], threads: int) -> str:
    lines = [
        "# Cost of over-parameterised training",
        "",
        f"`python examples/benchmarks/lop_cost.py`. torch {version('torch')}, NNCF {version('nncf')}, CPU, {threads} "
        f"thread(s), batch {BATCH}, expansion {EXPANSION}, SGD with momentum, no teacher. Ratios are medians of paired "
        "steps, with the smallest and largest; the machine did other work beside. Memory is resident memory.",
        "",
        "| network | MACs kept | plain, s | merged, s | chain, s | merged / plain | chain / plain "
        "| plain, MiB | merged, MiB | chain, MiB | merged / plain | chain / plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, memory = row["seconds"], row["memory_mib"]
        medians = [f"{statistics.median(seconds[variant]):.2f}" for variant in VARIANTS]
        ratios = []
        for variant in VARIANTS[1:]:
            paired = [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=False)]
            ratios.append(f"**{statistics.median(paired):.2f}** ({min(paired):.2f} to {max(paired):.2f})")
        used = [f"{memory[variant]:.0f}" for variant in VARIANTS]
        shares = [f"{memory[variant] / memory['plain']:.2f}" for variant in VARIANTS[1:]]
        cells = [row["network"], f"{row['share']:.0%}", *medians, *ratios, *used, *shares]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(rounds: int = 5, threads: int = 1, memory_of: str = "") -> None:
    torch.set_num_threads(threads)
    if memory_of:
        network, share, variant = memory_of.split(",")
        print(measure_memory(network, float(share), variant))
        return
    rows_file = HERE / "lop_cost.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    for network, share in CASES:
        if not any((row["network"], row["share"]) == (network, share) for row in rows):
            rows.append(measure(network, share, rounds, threads))
            with rows_file.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            (HERE / "lop_cost.md").write_text(table(rows, threads))
    (HERE / "lop_cost.md").write_text(table(rows, threads))


if __name__ == "__main__":
    typer.run(main)
