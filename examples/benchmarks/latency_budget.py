"""Budgets of measured time: what was asked for and what came out, and what the widths keep beside a budget of MACs.

MobileNetV1-0.75 has its ImageNet weights, ResNet-50 and FBNetV3-B (timm) their initial ones. Each is pruned to 70 and
50 % of its time in OpenVINO on the CPU, FP32 files, batch 1, 224 pixels. Then a budget of MACs is sought, by measuring,
whose network takes as long; what both keep is compared.

    python examples/benchmarks/latency_budget.py measure --data ../shared/data --work runs/latency_budget
    python examples/benchmarks/latency_budget.py report --work runs/latency_budget

``measure`` goes on where it was stopped; ``--net NAME`` does one network alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm_import import let_torchvision_import
from torch import nn

let_torchvision_import()

import timm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nncf_compactprune import prune  # noqa: E402
from nncf_compactprune.algorithms.base import Context  # noqa: E402
from nncf_compactprune.algorithms.latency.candidates import Candidates  # noqa: E402
from nncf_compactprune.channels import ChannelGraph  # noqa: E402
from nncf_compactprune.decide.budgets import AllocationProblem, Limits, capacity_lost  # noqa: E402
from nncf_compactprune.plan import PruningPlan  # noqa: E402
from nncf_compactprune.plugins import default_plugins  # noqa: E402
from nncf_compactprune.run.environment import environment  # noqa: E402
from nncf_compactprune.run.networks.mobilenet_v1 import mobilenet_v1  # noqa: E402
from nncf_compactprune.serving.meter import MeterOptions  # noqa: E402
from nncf_compactprune.serving.meters import OpenVinoMeter  # noqa: E402

NETS = ("mobilenet_v1_075", "resnet50", "fbnetv3_b")
ASKED = (0.7, 0.5)
_ROUNDS = 4  # of the search for the budget of MACs
_CLOSE = 0.02


def network(name: str, data: Path) -> nn.Module:
    """A network in evaluation mode.

    :param name: one of ``NETS``.
    :param data: where the weights of MobileNetV1 are.
    """
    torch.manual_seed(0)
    if name != "mobilenet_v1_075":
        return timm.create_model(name).eval()
    model = mobilenet_v1(0.75)
    model.load_state_dict(load_file(data / "mobilenet_v1_075_224_imagenet.safetensors"), strict=False)
    return model.eval()


def loss_of(graph: ChannelGraph, model: nn.Module, plan: PruningPlan) -> float:
    """Sum of what the default allocation calls lost: −log of the share that each side of a layer keeps.

    :param graph: the dense channels.
    :param model: the dense network.
    :param plan: what stays.
    """
    weights = dict(model.named_parameters())
    norms = []
    for group in graph.groups:
        squares = np.zeros(group.size)
        for member in group.with_role("producer"):
            weight = weights[member.parameter].detach().double().movedim(member.dim, 0)
            squares_of = (weight**2).reshape(len(weight), -1).sum(1).numpy()
            squares += squares_of[member.indices].sum(1)
        norms.append(np.sqrt(squares))
    problem = AllocationProblem(graph, [True] * len(graph.groups), {}, Limits())
    curves = capacity_lost(problem, [np.cumsum(np.sort(one)) for one in norms])
    return float(sum(curve[g.before - g.after] for curve, g in zip(curves, plan.groups, strict=True)))


def kept(graph: ChannelGraph, model: nn.Module, plan: PruningPlan) -> dict[str, float]:
    """What a plan leaves.

    :param graph: the dense channels.
    :param model: the dense network.
    :param plan: what stays.
    """
    return {
        "macs": plan.after.macs / plan.before.macs,
        "params": plan.after.params / plan.before.params,
        "loss": loss_of(graph, model, plan),
    }


def equal_time(dense: nn.Module, example: torch.Tensor, graph: ChannelGraph, ratio: float) -> dict[str, float]:
    """A budget of MACs whose network takes as long.

    :param dense: the network.
    :param example: its input.
    :param graph: its channels.
    :param ratio: time over the dense network's.
    """
    context = Context(dense, example, default_plugins())
    candidates = Candidates(context, graph, lambda: OpenVinoMeter(MeterOptions()))
    points, share = [(0.0, 0.0)], ratio**1.4
    best: dict[str, float] = {}
    for _ in range(_ROUNDS):
        result = prune(copy.deepcopy(dense), example, budget={"macs": round(share, 4)})
        one = candidates.measure([group.after for group in result.plan.groups])
        found = {**kept(graph, dense, result.plan), "ratio": one.ratio, "spread": one.spread}
        if not best or abs(math.log(one.ratio / ratio)) < abs(math.log(best["ratio"] / ratio)):
            best = found
        if abs(one.ratio / ratio - 1) < _CLOSE:
            break
        points.append((math.log(share), math.log(one.ratio)))
        slope = points[-1][1] / points[-1][0]
        share = min(max(math.exp(math.log(share) + (math.log(ratio) - points[-1][1]) / slope), 0.05), 1.0)
    candidates.done()
    return best


def measure(arguments: argparse.Namespace) -> None:
    """Prunes and measures what is not there yet.

    :param arguments: of the command line.
    """
    path = arguments.work / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in [arguments.net] if arguments.net else NETS:
        for asked in ASKED:
            if any(row["net"] == name and row["asked"] == asked for row in rows):
                continue
            dense, start = network(name, arguments.data), time.perf_counter()
            result = prune(copy.deepcopy(dense), example, budget={"latency": asked})
            seconds, latency = time.perf_counter() - start, result.latency
            assert latency is not None
            row: dict[str, Any] = {
                "net": name,
                "asked": asked,
                "dense_ms": latency.dense_ms,
                "ratio": latency.ratio,
                "spread": latency.spread,
                "vector": latency.vector,
                "networks": len(latency.measured),
                "seconds": latency.seconds,
                "whole_seconds": seconds,
                "by_time": kept(result.graph, dense, result.plan),
                "by_macs": equal_time(dense, example, result.graph, latency.ratio),
                "environment": environment(),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name} at {asked:.0%}: {latency}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The finished rows.

    :param path: of the results.
    """
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def report(arguments: argparse.Namespace) -> None:
    """Prints the tables in Markdown.

    :param arguments: of the command line.
    """
    rows = read(arguments.work / "results.jsonl")
    print("| network | dense, ms | asked | measured | measured / asked | ± | networks | seconds of measuring |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['net']} | {row['dense_ms']:.2f} | {row['asked']:.0%} | {row['ratio']:.1%} | "
            f"{row['ratio'] / row['asked']:.3f} | {row['spread']:.1%} | {row['networks']} | {row['seconds']:.0f} |"
        )
    print("\n| network | asked | budget | time | MACs | parameters | summed loss |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        for budget, one in (("time", {**row["by_time"], "ratio": row["ratio"]}), ("MACs", row["by_macs"])):
            print(
                f"| {row['net']} | {row['asked']:.0%} | {budget} | {one['ratio']:.1%} | {one['macs']:.1%} | "
                f"{one['params']:.1%} | {one['loss']:.1f} |"
            )


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "report"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/latency_budget"))
    parser.add_argument("--net", choices=NETS)
    arguments = parser.parse_args()
    {"measure": measure, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    main()
