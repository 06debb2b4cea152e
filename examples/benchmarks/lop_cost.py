"""What recovery costs: step time and peak memory of over-parameterised and taught fine-tuning beside plain.

    python examples/benchmarks/lop_cost.py [--rounds 5] [--threads 1] [--compiled]

Pruned ResNets for CIFAR-10; random weights and images, batch 128, SGD with momentum and decay. Time: all variants of
one network take training steps in turn in one process, and the ratio is the median over rounds of each step against the
plain step of the same precision beside it. Memory: each variant in a process of its own, how much its peak of resident
memory lies above what the process held before the network was built. Rows are appended to ``lop_cost.jsonl``; what is
there is not measured again. Writes ``lop_cost.md``. ``--compiled`` adds what ``torch.compile`` makes of a step, which
needs a C++ compiler.
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
from typing import Any, NamedTuple

import torch
import typer
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.run.networks.cifar_resnet import resnet20, resnet56

HERE = Path(__file__).parent
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "resnet56": resnet56}
CASES = (("resnet20", 0.5), ("resnet20", 0.35), ("resnet56", 0.47))  # network, share of its MACs kept
BATCH, MEMORY_STEPS = 128, 2  # the second step has gradients' and momentum's memory beside it
NO_TEACHER = {"similarity_weight": 0.0}


class Variant(NamedTuple):
    """One way to train.

    :param beside: the variant that it is compared with.
    :param entry: of the config, behind the pruning entry; None: plain fine-tuning.
    :param precision: of the autocast that student and, where it says nothing else, teacher run in.
    :param channels_last: memory format of network and images.
    :param compiled: the pruned network goes through ``torch.compile``.
    """

    beside: str
    entry: dict[str, Any] | None = None
    precision: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False


def lop(form: str, **params: Any) -> dict[str, Any]:
    params = {"form": form, **params}
    return {"algorithm": "linear_overparameterization", "params": params, "distillation": NO_TEACHER}


def taught(form: str = "none", **distillation: Any) -> dict[str, Any]:
    return {"algorithm": "recovery", "params": {"form": form}, "distillation": distillation}


HALF = torch.bfloat16
VARIANTS: dict[str, Variant] = {
    "plain": Variant("plain"),
    "orthogonal": Variant("plain", lop("orthogonal")),
    "branches": Variant("plain", lop("branches")),
    "factors": Variant("plain", lop("factors")),
    "factors, chain": Variant("plain", lop("factors", mode="chain")),
    "recovery": Variant("plain", taught()),
    "recovery, teacher in float32": Variant("plain", taught(teacher_precision="same")),
    "recovery, all layers": Variant("plain", taught(layers="all")),
    "recovery, orthogonal": Variant("plain", taught("orthogonal")),
    "plain, channels last": Variant("plain", channels_last=True),
    "plain, bfloat16": Variant("plain", None, HALF),
    "plain, bfloat16, channels last": Variant("plain", None, HALF, channels_last=True),
    "recovery, bfloat16, channels last": Variant("plain, bfloat16, channels last", taught(), HALF, channels_last=True),
}
COMPILED = {
    "plain, compiled": Variant("plain", compiled=True),
    "recovery, compiled": Variant("plain, compiled", taught(), compiled=True),
}


def make_step(network: str, share: float, variant: Variant) -> Callable[[], float]:
    """Builds one variant; a call takes one training step and returns its seconds."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    if variant.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pruning = {"algorithm": "fbnet_pruning", "budget": {"macs": share}, "params": {"schedule": "one_shot"}}
    entries = [pruning] if variant.entry is None else [pruning, variant.entry]
    document = {"input_info": {"sample_size": [2, 3, 32, 32]}, "compression": entries}
    controller, model = create_compressed_model(model, document)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, 0.9, weight_decay=5e-4)
    controller.attach(optimizer=optimizer)
    run = torch.compile(model) if variant.compiled else model
    model.train()

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", variant.precision, enabled=variant.precision is not None):
            scores = run(images)
        (nn.functional.cross_entropy(scores.float(), labels) + controller.loss()).backward()
        optimizer.step()
        return time.perf_counter() - started

    return step


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def measure_memory(network: str, share: float, variant: Variant) -> float:
    """Peak MiB above the start, in this process."""
    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3))  # oneDNN's own buffers
    before = resident_mib("VmRSS")
    step = make_step(network, share, variant)
    for _ in range(MEMORY_STEPS):
        step()
    return resident_mib("VmHWM") - before


def measure_time(network: str, share: float, variants: dict[str, Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step by variant; a first round is not counted."""
    steps = {name: make_step(network, share, variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            seconds[name].append(step())
    return {name: values[1:] for name, values in seconds.items()}


def measure(network: str, share: float, variants: dict[str, Variant], rounds: int, threads: int) -> dict[str, Any]:
    seconds = measure_time(network, share, variants, rounds)
    row: dict[str, Any] = {"network": network, "share": share, "rounds": rounds, "seconds": seconds, "memory_mib": {}}
    for name in variants:
        command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", f"{network}|{share}|{name}"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row["memory_mib"][name] = float(output.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]], threads: int) -> str:
    lines = [
        "# Cost of recovery after pruning",
        "",
        f"`python examples/benchmarks/lop_cost.py`. torch {version('torch')}, NNCF {version('nncf')}, CPU, "
        f"{threads} thread(s), batch {BATCH}, SGD with momentum. `recovery` has the dense network as its teacher. Time "
        "ratios are medians of paired steps, with the smallest and largest; the machine did other work beside. Memory "
        "is resident memory above that of the process before the network was built.",
    ]
    for row in rows:
        lines += [
            "",
            f"## {row['network']}, {row['share']:.0%} of its MACs",
            "",
            "| | s a step | beside | time | MiB | memory |",
            "|---|---|---|---|---|---|",
        ]
        seconds, memory = row["seconds"], row["memory_mib"]
        for name in seconds:
            beside = {**VARIANTS, **COMPILED}[name].beside
            paired = [a / b for a, b in zip(seconds[name], seconds[beside], strict=True)]
            time_ratio = f"**{statistics.median(paired):.2f}** ({min(paired):.2f} to {max(paired):.2f})"
            ratios = [beside, time_ratio] if name != beside else ["", ""]
            share = f"{memory[name] / memory[beside]:.2f}" if name != beside else ""
            cells = [name, f"{statistics.median(seconds[name]):.3f}", *ratios, f"{memory[name]:.0f}", share]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(rounds: int = 5, threads: int = 1, memory_of: str = "", *, compiled: bool = False) -> None:
    torch.set_num_threads(threads)
    if memory_of:
        network, share, name = memory_of.split("|")
        print(measure_memory(network, float(share), {**VARIANTS, **COMPILED}[name]))
        return
    variants = {**VARIANTS, **COMPILED} if compiled else VARIANTS
    rows_file = HERE / "lop_cost.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    for network, share in CASES:
        if not any((row["network"], row["share"]) == (network, share) for row in rows):
            rows.append(measure(network, share, variants, rounds, threads))
            with rows_file.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            (HERE / "lop_cost.md").write_text(table(rows, threads))
    (HERE / "lop_cost.md").write_text(table(rows, threads))


if __name__ == "__main__":
    typer.run(main)
