"""What the self-check sees: plans with one wrong index, and the time that looking takes.

    python examples/benchmarks/self_check_power.py [--plans 20] [--only resnet50]

Each plan removes half of every group at random; then one kept position of one tensor is exchanged for a removed one.
Exchanges of equal values change nothing and are drawn again. Shares of what is caught: by the outputs alone, and by the
whole check. Networks have their initial weights, which is where outputs say least.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import numpy as np
import timm_import
import torch
from torch import nn

from nncf_compactprune import PruningPlan, analyse
from nncf_compactprune.cut import self_check
from nncf_compactprune.cut.inside import Probe
from nncf_compactprune.cut.surgery import cut, select
from nncf_compactprune.cut.transaction import for_a_while
from nncf_compactprune.errors import SelfCheckError
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.plan import make_plan

TIMM = ("resnet50", "densenet121", "efficientnet_b0", "convnext_atto", "cait_xxs24_224", "mobilenetv3_small_100")
DETECTORS = ("retinanet_resnet50_fpn", "fcos_resnet50_fpn")


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if name in DETECTORS:
        import torchvision

        model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, min_size=128)
        return model.eval(), torch.rand(1, 3, 128, 128)
    import timm

    # a norm whose weights are all zero, as timm begins, makes every cut before it right
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    return timm.create_model(name, **options).eval(), torch.randn(1, 3, 224, 224)


def random_plan(graph, generator: np.random.Generator) -> PruningPlan:
    keep = []
    for group in graph.groups:
        mask = np.zeros(group.size, bool)
        mask[generator.permutation(group.size)[: max(group.size // 2, 1)]] = True
        keep.append(mask)
    return make_plan(graph, keep)


def wrong_plan(plan: PruningPlan, model: nn.Module, generator: np.random.Generator) -> tuple[PruningPlan, str]:
    """The plan with one position of one tensor exchanged, so that its values change; and where."""
    tensors = model_tensors(model).all()
    places = [(name, dim) for name, dims in plan.kept.items() for dim in dims]
    while True:
        name, dim = places[generator.integers(len(places))]
        stays = list(plan.kept[name][dim])
        gone = sorted(set(range(tensors[name].shape[dim])) - set(stays))
        stays[generator.integers(len(stays))] = gone[generator.integers(len(gone))]
        kept = {n: dict(dims) for n, dims in plan.kept.items()}
        kept[name][dim] = tuple(sorted(stays))
        wrong = dataclasses.replace(plan, kept=kept)
        before, after = (select(tensors[name].data, p.selection(name)) for p in (plan, wrong))
        if not torch.equal(before, after):
            return wrong, f"{name} {dim}"


def caught(model: nn.Module, plan: PruningPlan, x) -> tuple[bool, bool]:
    """Whether the outputs alone notice a plan, and whether the whole check does."""
    try:
        with for_a_while() as log:
            probe = Probe(model, plan)
            cut(log, model, plan)
            inputs, error, _, inside = self_check._compared(log, model, plan, probe, x)
            if not self_check._agree(error, inside):
                error, _, inside = self_check._compare(log, model, plan, probe, inputs, double=True)
    except SelfCheckError:
        return True, True
    return error > self_check.SELF_CHECK_TOLERANCE, not self_check._agree(error, inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[*TIMM, *DETECTORS])
    options = parser.parse_args()
    timm_import.let_torchvision_import()
    print(
        "| network | plans | caught by outputs | caught by the check | right plans passed | layers compared | check s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only:
        model, x = build(name)
        inputs = ([x[0]],) if name in DETECTORS else x
        graph = analyse(model, inputs)
        generator = np.random.default_rng(0)
        outputs, whole, right, seconds, missed = 0, 0, 0, [], []
        for _ in range(options.plans):
            plan = random_plan(graph, generator)
            if _ < 3:
                check = self_check.prune_in_place(model, plan, inputs, dry_run=True)
                seconds.append(check.seconds)
                right += 1
            wrong, where = wrong_plan(plan, model, generator)
            by_outputs, by_all = caught(model, wrong, inputs)
            outputs, whole = outputs + by_outputs, whole + by_all
            if not by_all:
                missed.append(where)
        compared = f"{len(check.compared)} of {len(check.compared) + len(check.unseen)}"
        print(
            f"| {name} | {options.plans} | {outputs / options.plans:.0%} | {whole / options.plans:.0%} | {right} of "
            f"{min(options.plans, 3)} | {compared} | {statistics.median(seconds):.2f} |",
            flush=True,
        )
        print(f"<!-- {check}; missed: {missed}; unseen: {check.unseen[:6]} -->", flush=True)


if __name__ == "__main__":
    main()
