"""What taking residual branches whole gives on a device, beside narrower layers at the same MACs.

Networks with their initial weights are pruned to 50 % of their MACs twice: by widths alone, the same share everywhere;
and with every second branch that may go taken whole, the rest by widths again. Both FP32 files are timed in OpenVINO in
turns, on one thread of the CPU, batch 1, 224 pixels, each pair loaded three times. No accuracy is measured.

    python examples/benchmarks/depth.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pages import measured_on, write_page
from timm_import import let_torchvision_import
from torch import nn

let_torchvision_import()

import timm  # noqa: E402

from nncf_compactprune import prune  # noqa: E402
from nncf_compactprune.decide.budgets import AllocationProblem, Scores, Widths, uniform  # noqa: E402
from nncf_compactprune.plan import PruningPlan  # noqa: E402
from nncf_compactprune.serving.meter import MeterOptions, in_turns  # noqa: E402
from nncf_compactprune.serving.meters import OpenVinoMeter  # noqa: E402

NETS = ("resnet18", "resnet50", "mobilenetv2_100")
SHARE = 0.5
LOADS = 3


def shallower(problem: AllocationProblem, scores: Scores) -> Widths:
    """Every second branch goes; the others and the streams keep the largest share that fits.

    :param problem: allowed widths, costs and budgets.
    :param scores: not used.
    """
    gone = np.concatenate(problem.branches[1::2])
    low, high = 0.0, 1.0
    best = problem.floor
    while high - low > 1e-4:
        share = (low + high) / 2
        widths = np.array([problem.round_up(g, share * size) for g, size in enumerate(problem.sizes)], np.float64)
        widths[gone] = 0
        if problem.fits(widths):
            low, best = share, widths
        else:
            high = share
    return best


def measured(name: str) -> str:
    """One network's row.

    :param name: as timm calls it.
    """
    torch.manual_seed(0)
    dense, image = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    plans: list[PruningPlan] = []
    models: list[nn.Module] = []
    for allocation, least in ((uniform, 1), (shallower, 0)):
        models.append(copy.deepcopy(dense))
        options = {"allocation": allocation, "min_channels": least, "round_to": 8, "max_ratio": 1.0}
        plans.append(prune(models[-1], image, budget={"macs": SHARE}, **options).plan)
    to_dense, ratios = [], []
    for _ in range(LOADS):
        meter = OpenVinoMeter(MeterOptions(threads=1))
        networks = [meter.load(model, image) for model in (dense, *models)]
        to_dense.append(in_turns(networks[0], networks[1]).ratio)
        ratios.append(in_turns(networks[1], networks[2]).ratio)
        for network in networks:
            network.close()
    left = len(plans[1].removed)
    return " | ".join(
        [
            f"| {name}",
            f"{left}",
            *(f"{plan.after.macs / plan.before.macs:.1%}" for plan in plans),
            *(f"{plan.after.params / plan.before.params:.1%}" for plan in plans),
            _median(to_dense),
            f"{_median(ratios)} |",
        ]
    )


def _median(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, nargs="*", default=NETS)
    nets = parser.parse_args().net
    rows = [measured(name) for name in nets]
    text = f"""# Depth beside widths at the same MACs

By `python examples/benchmarks/depth.py`: networks with their initial weights at {SHARE:.0%} of their MACs, by widths
alone, and with every second residual branch taken whole. Time of one request of the FP32 file in OpenVINO, batch 1, one
thread, measured in turns; the median of {LOADS} loads, with their range. No accuracy is measured.

| network | branches gone | MACs, widths | MACs, depth | parameters, widths | parameters, depth \
| time, widths over dense | time, depth over widths |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

{measured_on()}
"""
    write_page(Path(__file__).with_suffix(".md"), text)


if __name__ == "__main__":
    main()
