"""Time to analyse and cut a network: this package against Torch-Pruning, paired in one run.

    python examples/benchmarks/analysis_time.py [--rounds 5] [--output examples/benchmarks/analysis_time.md]

Both prune the same timm model (random weights, batch 1, 224 x 224) by L1 magnitude, the same share of every layer,
to the same share of channels; both start from the plain model and end with the smaller one. Rounds alternate (ours,
theirs, ours, ...), each on a fresh copy of the model; figures are medians. Our self-check (masked = compact, which
the peer has
not) is timed apart. The output error is measured here, independently of the package: the dense copy with the removed
slices zeroed against the pruned model, in float32.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import track
from timm_import import let_torchvision_import
from torch import Tensor, nn

from nncf_compactprune import analyse, prune
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import default_plugins

let_torchvision_import()
import timm  # noqa: E402
import torch_pruning  # noqa: E402

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "fbnetv3_b", "efficientnet_b0", "densenet121")
RATIO = 0.5


def timed(function: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def theirs(model: nn.Module, x: Tensor) -> nn.Module:
    """Torch-Pruning as its README recommends: MagnitudePruner, L1, classifier ignored."""
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=[model.get_classifier()],
    )
    pruner.step()
    return model


def output_error(dense: nn.Module, pruned: nn.Module, plan: PruningPlan, x: Tensor) -> float:
    """Largest difference between masked and pruned, over the largest output."""
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            for dim, positions in plan.kept.get(name, {}).items():
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[list(positions)] = False
                parameter.index_fill_(dim, gone.nonzero().ravel(), 0.0)
        expected, actual = dense(x), pruned(x)
    return float((expected - actual).abs().max() / expected.abs().max())


def measure(name: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    graph = analyse(dense, x, trial=False)
    budget = {"macs": graph.cost.macs(graph.sizes * (1 - RATIO)) / graph.macs}  # the cost of half of every group
    ours_seconds, check_seconds, their_seconds = [], [], []
    for turn in range(rounds + 1):
        model = copy.deepcopy(dense)
        seconds, result = timed(
            lambda model=model: prune(
                model, x, budget=budget, importance="l1", allocation="uniform", round_to=1, max_ratio=1.0
            )
        )
        peer = copy.deepcopy(dense)
        peer_seconds, _ = timed(lambda peer=peer: theirs(peer, x))
        if turn:  # the first round warms both up
            ours_seconds.append(seconds - result.self_check.seconds)
            check_seconds.append(result.self_check.seconds)
            their_seconds.append(peer_seconds)
    return {
        "ours": statistics.median(ours_seconds),
        "check": statistics.median(check_seconds),
        "theirs": statistics.median(their_seconds),
        "ratio": statistics.median(a / b for a, b in zip(ours_seconds, their_seconds, strict=True)),
        "error": output_error(copy.deepcopy(dense), model, result.plan, x),
        "our_params": sum(p.numel() for p in model.parameters()) / 1e6,
        "their_params": sum(p.numel() for p in peer.parameters()) / 1e6,
    }


def main(rounds: int = 5, output: Path | None = None) -> None:
    warnings.filterwarnings("ignore", module="timm")
    default_plugins()
    rows = {name: measure(name, rounds) for name in track(MODELS, "pruning", console=Console(stderr=True))}
    mean = statistics.geometric_mean(row["ratio"] for row in rows.values())
    lines = [
        f"Python packages: torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}, "
        f"torch-pruning {version('torch-pruning')}; {torch.get_num_threads()} threads; medians of {rounds} rounds.",
        "",
        "| model | ours, s | Torch-Pruning, s | ratio | our self-check, s | output error | parameters left, M "
        "| Torch-Pruning's, M |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['ours']:.3f} | {r['theirs']:.3f} | {r['ratio']:.2f} | {r['check']:.3f} | {r['error']:.0e} | "
        f"{r['our_params']:.2f} | {r['their_params']:.2f} |"
        for name, r in rows.items()
    ]
    lines += ["", f"Geometric mean of the ratios: {mean:.2f}."]
    text = "\n".join(lines)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
