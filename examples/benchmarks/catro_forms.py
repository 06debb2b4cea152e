"""What a channel is worth: the forms that were tried for ``catro``, on trained CIFAR-10 ResNets without fine-tuning.

    python examples/benchmarks/catro_forms.py --data FOLDER [--depth 20] [--depth 56]

The channels inside every block, 500 labelled training images, the same share of every block removed (30 and 50 %);
accuracy on 2,000 test images right after, and with BatchNorm statistics averaged over 2,000 training images. Selection
alone: nothing else is changed. The last rows let stage 1 choose the widths, within the MACs of the uniform cut.
Rows are kept in ``catro_forms.jsonl``; the table goes to ``catro_forms.md``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catro_cifar import DATA, INNER, SHORT_TEST, Cifar, Rows, at_once
from torch import Tensor

from nncf_compactprune import analyse, create_compressed_model
from nncf_compactprune.algorithms.catro.class_effects import FeatureScatter, MarginEffects, margins
from nncf_compactprune.algorithms.catro.class_statistics import ClassMoments
from nncf_compactprune.algorithms.catro.consumers import Call
from nncf_compactprune.algorithms.catro.contributions import Contributions
from nncf_compactprune.algorithms.catro.trace_ratio import joint_removal, trace_ratio
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.decide.criteria.magnitude import l1
from nncf_compactprune.plan import make_plan

HERE = Path(__file__).parent
RATIOS = (0.3, 0.5)
FULL_56 = ("L1", "energy", "trace ratio, flattened", "between, flattened", "cross-entropy, mean²", "margin, mean²",
           "joint margin", "joint contributions", "joint margin + 3 contributions")  # fmt: skip
Masks = list[np.ndarray]
Form = Callable[[int, int], np.ndarray]


class Effects(MarginEffects):
    """Also keeps the effects of every sample, of another objective if wanted, and the mean energy of channels."""

    def __init__(self, graph: Any, groups: Any, objective: str) -> None:
        super().__init__(graph, groups)
        self.objective = objective
        self.moments = {g: ClassMoments(10, graph.groups[g].size) for g in groups}
        self.energy = {g: torch.zeros(graph.groups[g].size, dtype=torch.float64) for g in groups}

    def see(self, call: Call) -> Tensor:
        for use in call.uses:
            self.energy[use.group] += call.x.detach().square().sum((0, 2, 3)).double()
        return super().see(call)

    def end_batch(self, scores: Tensor, labels: Tensor) -> None:
        if self.objective == "cross-entropy":  # its gradient is the margin's, times one minus the label's probability
            doubt = 1 - torch.softmax(scores, 1).detach()[torch.arange(len(labels)), labels]
            objective = (margins(scores, labels) * doubt).sum()
        else:
            objective = margins(scores, labels).sum()
        torch.autograd.grad(objective, [self._anchor])
        for (group, parameter), effect in self._batch.items():  # one consumer each
            self.moments[group].update(effect, labels)
            self.effects[group, parameter] = self.effects.get((group, parameter), 0) + effect.T @ effect
        self._batch = {}


def top(scores: Callable[[int], Tensor]) -> Form:
    def keep(group: int, width: int) -> np.ndarray:
        values = scores(group).numpy()
        mask = np.zeros(len(values), bool)
        mask[np.argsort(-values, kind="stable")[:width]] = True
        return mask

    return keep


def joint(gram: Callable[[int], Tensor]) -> Form:
    return lambda group, width: joint_removal(gram(group).numpy()).kept[len(gram(group)) - width]


def ratio(scatter: Callable[[int], tuple[Tensor, Tensor]], shrink: float = 0.0) -> Form:
    def keep(group: int, width: int) -> np.ndarray:
        between, within = scatter(group)
        return trace_ratio(between.numpy(), ((1 - shrink) * within + shrink * within.mean()).numpy(), width).kept

    return keep


def forms(data: Cifar, depth: int) -> dict[str, Form]:
    """All forms by name, from statistics collected here."""
    model = data.model(depth)
    graph = analyse(model, data.test[:2], trial=False)
    groups = [g for g, group in enumerate(graph.groups) if group.name.startswith("layer")]
    tensors = dict(model.named_parameters())
    contexts = list(criterion_contexts(model, graph))
    batches = data.few(50)
    consumer = {g: next(m for m in graph.groups[g].members if m.role == "consumer").parameter for g in groups}
    found = {kind: Effects(graph, groups, kind) for kind in ("margin", "cross-entropy")}
    for effects in found.values():
        effects.collect(model, batches)
    margin, entropy = found["margin"], found["cross-entropy"]
    scatters = {}
    for name, size in (("flattened", 32), ("pooled to 1", 1)):
        scatters[name] = FeatureScatter(graph, groups, 10, size)
        scatters[name].collect(model, batches)
    through = ConsumerScatter(graph, groups)
    through.collect(model, batches)
    contributed = {g: margin.contributions[g, consumer[g]].gram for g in groups}

    def plain(name: str) -> Callable[[int], tuple[Tensor, Tensor]]:
        return lambda g: scatters[name].scatter(g)  # type: ignore[return-value]

    def mean_square(effects: Effects) -> Callable[[int], Tensor]:
        return lambda g: effects.effects[g, consumer[g]].diagonal()

    def first_order(effects: Effects) -> Callable[[int], Tensor]:
        return lambda g: (effects.moments[g].mean * effects.moments[g].count[:, None]).sum(0).abs()

    def energy(g: int) -> Tensor:
        return margin.energy[g].sqrt() * tensors[consumer[g]].detach().double().square().sum((0, 2, 3)).sqrt()

    result: dict[str, Form] = {
        "L1": top(lambda g: l1(contexts[g]).double()),
        "energy": top(energy),
    }
    for name in scatters:
        result[f"trace ratio, {name}"] = ratio(plain(name))
        result[f"between, {name}"] = top(lambda g, n=name: plain(n)(g)[0])
    result["Fisher ratio, flattened"] = top(
        lambda g: plain("flattened")(g)[0] / plain("flattened")(g)[1].clamp_min(1e-12)
    )
    result["trace ratio, flattened, within shrunk by half"] = ratio(plain("flattened"), 0.5)
    result["trace ratio, flattened, within shrunk wholly"] = ratio(plain("flattened"), 1.0)
    result["through the consumer: trace ratio"] = ratio(through.scatter)
    result["through the consumer: between"] = top(lambda g: through.scatter(g)[0])
    result["through the consumer: within"] = top(lambda g: through.scatter(g)[1])
    result["through the consumer: total"] = top(lambda g: sum(through.scatter(g)))  # type: ignore[arg-type, return-value]
    for name, effects in (("cross-entropy", entropy), ("margin", margin)):
        result[f"{name}, first order"] = top(first_order(effects))
        result[f"{name}, mean²"] = top(mean_square(effects))
        result[f"joint {name}"] = joint(lambda g, e=effects: e.effects[g, consumer[g]])
        result[f"joint {name} + 3 contributions"] = joint(lambda g, e=effects: e.gram(g, 3.0))  # type: ignore[arg-type]
    result["margin, between classes"] = top(lambda g: margin.moments[g].between)
    result["margin, within classes"] = top(lambda g: margin.moments[g].within)
    result["joint contributions"] = joint(lambda g: contributed[g])
    for weight in (1.0, 10.0):
        result[f"joint margin + {weight:.0f} contributions"] = joint(lambda g, w=weight: margin.gram(g, w))  # type: ignore[arg-type]
    return result


class ConsumerScatter(FeatureScatter):
    """Scatter of what a channel contributes to its consumer's output, at the lattice of positions."""

    def __init__(self, graph: Any, groups: Any) -> None:
        super().__init__(graph, groups, 10, 1)
        self.by_class: dict[int, list[Contributions]] = {}

    def see(self, call: Call) -> Tensor:
        for use in call.uses:
            classes = self.by_class.setdefault(use.group, [Contributions(len(use.positions)) for _ in range(10)])
            for c, seen in enumerate(classes):
                part = call.x[self.labels == c]
                if len(part):
                    seen.update(replace(call, x=part), use)
        return call.x

    def all_reduce(self) -> None:
        pass

    def scatter(self, group: int) -> tuple[Tensor, Tensor]:
        parts = self.by_class[group]
        within = sum((p.gram.diagonal() for p in parts), torch.zeros(()))
        rows = torch.stack([p.rows[0] for p in parts])
        means = torch.stack([p.sums[0] / p.rows[0] for p in parts])
        centre = (means * rows[:, None, None]).sum(0) / rows.sum()
        return ((means - centre).square().sum(2) * rows[:, None]).sum(0), within


def measured(data: Cifar, depth: int, masks: Callable[[Any], Sequence[np.ndarray]]) -> dict[str, float]:
    model = data.model(depth)
    graph = analyse(model, data.test[:2], trial=False)
    prune_in_place(model, make_plan(graph, masks(graph)), data.test[:2])
    return at_once(data, model, slice(SHORT_TEST))


def uniform_masks(form: Form, share: float) -> Callable[[Any], Masks]:
    def masks(graph: Any) -> Masks:
        return [
            form(g, round(group.size * (1 - share))) if group.name.startswith("layer") else np.ones(group.size, bool)
            for g, group in enumerate(graph.groups)
        ]

    return masks


def stage_1(data: Cifar, depth: int, share: float, rounds: int = 1, **params: Any) -> dict[str, float]:
    """``catro`` itself within the MACs of the uniform cut; in rounds: cut a part, collect anew, go on."""
    model = data.model(depth)
    graph = analyse(model, data.test[:2], trial=False)
    widths = np.array([g.size if not g.name.startswith("layer") else round(g.size * (1 - share)) for g in graph.groups])
    dense, most = graph.macs, graph.cost.macs(widths)
    for at in range(1, rounds + 1):
        entry = {
            "algorithm": "catro", "budget": {"macs": dense - (dense - most) * at // rounds}, "target_scopes": INNER,
            "params": {"schedule": "one_shot", "round_to": 1, **params},
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
        }  # fmt: skip
        create_compressed_model(
            model, {"compression": copy.deepcopy(entry)}, data.few(50), example_inputs=data.test[:2]
        )
    return at_once(data, model, slice(SHORT_TEST))


STAGE_1: dict[str, dict[str, Any]] = {
    "catro (default)": {},
    "catro, damping 0": {"damping": 0.0},
    "catro, damping 1": {"damping": 1.0},
    "catro, contribution 0": {"contribution": 0.0},
    "catro in 4 rounds, collected anew": {"rounds": 4},
    "catro, form plain": {"form": "plain"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--depth", type=int, choices=(20, 56), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(HERE / "catro_forms.jsonl")
    data = Cifar.load(arguments.data)
    for depth in arguments.depth or (20,):
        found = forms(data, depth)
        for name, form in found.items():
            if depth == 20 or name in FULL_56:
                for share in RATIOS:
                    key = f"{depth} {share} {name}"
                    rows.get(key, lambda f=form, s=share, d=depth: measured(data, d, uniform_masks(f, s)))
        for name, params in STAGE_1.items():
            if depth == 20 or name == "catro (default)":
                for share in RATIOS:
                    rows.get(f"{depth} {share} {name}", lambda p=params, s=share, d=depth: stage_1(data, d, s, **p))
    write(rows)


def write(rows: Rows) -> None:
    names = list(dict.fromkeys(key.split(" ", 2)[2] for key in rows.rows))
    depths = [depth for depth in (20, 56) if any(key.startswith(f"{depth} ") for key in rows.rows)]
    heads = [f"ResNet-{depth}, {share:.0%} | + BN" for depth in depths for share in RATIOS]
    lines = [f"| form | {' | '.join(heads)} |", "|---|" + "---|---|" * len(heads)]
    for name in names:
        cells = []
        for depth in depths:
            for share in RATIOS:
                row = rows.rows.get(f"{depth} {share} {name}")
                cells.append(f"{row['pruned']:.1f} | {row['adapted']:.1f}" if row else " | ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = ["# Forms tried for `catro`", "", __doc__.split("\n\n")[2].strip(), "", *lines, ""]
    (HERE / "catro_forms.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
