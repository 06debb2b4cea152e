"""A family of MobileNetV1-0.75 for ten ImageNet classes, ours and Torch-Pruning's, beside the unpruned 0.25.

    python examples/benchmarks/family.py run --data FOLDER [--epochs 10]   # members that are missing in family.jsonl
    python examples/benchmarks/family.py table                             # family.md and family.png

Every member is cut from the trained one before it, to a share of the dense network's MACs, and trained like all others
on 3,600 pictures (the held-out ones are those of ``imagenette.py``), with the dense network as teacher: this package's
and Torch-Pruning's differ in the cut and in what follows it at once, a re-fit or BatchNorm statistics, both on the same
2,000 pictures. Networks that are not pruned are trained as long, the smaller one with that teacher, too.
The validation pictures judge once, after a member's last epoch. A member that was trained is kept in ``runs/family``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from catro_cifar import adapted, largest_within
from imagenette import CLASSES, Data, accuracy, fine_tuned, normalised, of_ten_classes
from recovery import append, commit, mean_and_spread, read_rows
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, prune
from nncf_compactprune.run.networks.mobilenet_v1 import mobilenet_v1

HERE = Path(__file__).parent
ROWS, STATES = HERE / "family.jsonl", HERE.parent.parent / "runs" / "family"
BUDGETS = (0.5, 0.35, 0.2, 0.126)  # the last is what width 0.25 costs
FEW, BATCH, DECAY = 2000, 32, 1e-4
RECIPE = {"algorithm": "recovery", "distillation": {"logits_weight": 1.0}}
ARMS = {"ours": "catro, layers re-fitted", "torch_pruning": "Torch-Pruning, group norm"}
UNPRUNED = {"dense": 0.75, "sibling": 0.25}
TITLES = {"dense": "dense 0.75", **ARMS, "sibling": "unpruned 0.25"}


@dataclasses.dataclass(frozen=True)
class Member:
    """One training run.

    :param arm: who cuts, or which network stays whole.
    :param budget: share of the dense MACs; 1 for networks that stay whole.
    """

    arm: str
    budget: float = 1.0
    seed: int = 0
    epochs: int = 10
    lr: float = 5e-4

    @property
    def key(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())

    @property
    def before(self) -> Member | None:
        """The member that it is cut from; None where that is the dense network."""
        at = BUDGETS.index(self.budget)
        return dataclasses.replace(self, budget=BUDGETS[at - 1]) if at else None


def queue(epochs: int, seed: int, lr: float) -> list[Member]:
    """Both families, member by member, then the networks that stay whole."""
    members = [Member(arm, budget, seed, epochs, lr) for budget in BUDGETS for arm in ARMS]
    return members + [Member(arm, 1.0, seed, epochs, lr) for arm in ("sibling", "dense")]


def network(folder: Path, width: float) -> nn.Module:
    """A trained network with the ten classes' outputs only."""
    model = mobilenet_v1(width, classes=len(CLASSES))
    model.load_state_dict(of_ten_classes(folder, f"{round(100 * width):03d}"), strict=False)
    return model.eval()


def macs(model: nn.Module) -> int:
    return analyse(copy.deepcopy(model), torch.zeros(1, 3, 224, 224), trial=False).macs


def by_torch_pruning(model: nn.Module, most: float) -> nn.Module:
    """Group norm, one ratio in all layers, bisected to the largest network within the budget."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        cut = copy.deepcopy(model)
        pruner = tp.pruner.BasePruner(
            cut, torch.zeros(2, 3, 224, 224), importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio, ignored_layers=[cut.get_submodule("conv_preds")],
        )  # fmt: skip
        pruner.step()
        cut.zero_grad()
        return cut

    return largest_within(most, macs, pruned)


def cut(member: Member, model: nn.Module, most: float, data: Data) -> nn.Module:
    """The member before this one, pruned."""
    batches = few(data, member.seed)
    if member.arm == "torch_pruning":
        return adapted(by_torch_pruning(model, most), (images for images, _ in batches))
    prune(
        model, normalised(data.images[:2]), "catro", budget={"macs": int(most)}, max_ratio=0.95,
        train_loader=batches, initializer={"refit": {"num_samples": FEW}},
    )  # fmt: skip
    return model


def few(data: Data, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of training pictures."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[:FEW]
    return [(normalised(data.images[part]), data.labels[part]) for part in order.split(50)]


def trained(member: Member, data: Data, load: Callable[[Member], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """Cuts and trains a member.

    :param load: gives the member before.
    """
    torch.manual_seed(member.seed)
    dense = network(data.folder, UNPRUNED["dense"])
    whole = macs(dense)
    started = time.process_time()
    if member.arm in UNPRUNED:
        model = network(data.folder, UNPRUNED[member.arm])
    else:
        before = member.before
        model = cut(member, copy.deepcopy(dense) if before is None else load(before), member.budget * whole, data)
    cutting = time.process_time() - started
    controller: Any = None
    model = model.to(memory_format=torch.channels_last)
    if member.arm != "dense":
        teacher = dense.to(memory_format=torch.channels_last)
        example = normalised(data.images[:2])
        controller, model = create_compressed_model(
            model, {"compression": [RECIPE]}, example_inputs=example, teacher=teacher
        )
    optimizer = torch.optim.AdamW(model.parameters(), member.lr, weight_decay=DECAY)
    curve, seconds = fine_tuned(
        model, data, controller, optimizer, epochs=member.epochs, batch=BATCH, seed=member.seed, name=member.key
    )
    if controller is not None:
        model = controller.strip()
    return model, {
        "key": member.key, "member": dataclasses.asdict(member), "test": accuracy(model, *data.test()),
        "curve": curve, "macs": macs(model), "macs_dense": whole, "params": sum(p.numel() for p in model.parameters()),
        "cpu_seconds_of_cut": cutting, "cpu_seconds_per_epoch": statistics.median(seconds),
        "threads": torch.get_num_threads(), "commit": commit(),
    }  # fmt: skip


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of pictures and weights")] = Path("../shared/data"),
    rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS,
    states: Annotated[Path, typer.Option(help="where trained members are kept")] = STATES,
    epochs: int = 10,
    seed: int = 0,
    lr: float = 5e-4,
    threads: int = 1,
    only: Annotated[str, typer.Option(help="arms, comma between")] = "",
) -> None:
    """Cuts and trains what is missing, the larger members first."""
    torch.set_num_threads(threads)
    states.mkdir(parents=True, exist_ok=True)
    read: Data | None = None

    def file(member: Member) -> Path:
        return states / f"{member.key.replace(' ', '_')}.pt"

    for member in queue(epochs, seed, lr):
        if (only and member.arm not in only.split(",")) or (member.key in read_rows(rows) and file(member).exists()):
            continue
        read = read or Data(data)
        model, row = trained(member, read, lambda before: torch.load(file(before), weights_only=False))
        torch.save(model, file(member))
        if member.key not in read_rows(rows):
            append(rows, row)
        print(json.dumps({"key": member.key, "test": row["test"], "held out": row["curve"][-1]}), flush=True)


@app.command()
def table(rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS) -> None:
    """Writes family.md and family.png."""
    found = list(read_rows(rows).values())
    lines = [
        "# A family of MobileNetV1-0.75 for ten of its thousand classes", "",
        "Written by `family.py table`. Every member is cut from the one before and trained on 3,600 pictures, taught",
        "by the dense network; both families alike. Other learning rates than 0.0005 were tried on some members. In",
        "percent of 400 held-out training pictures after the cut and after training, and of 1,500 validation pictures;",
        "means ± sample standard deviation (number of seeds).", "",
    ]  # fmt: skip
    for epochs in sorted({row["member"]["epochs"] for row in found}):
        here = [row for row in found if row["member"]["epochs"] == epochs]
        lines += [
            f"## {epochs} epochs a member", "",
            "| MACs | network | learning rate | parameters, K | after the cut | held out | validation pictures |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for key in sorted({_place(row) for row in here}):
            rows_of_it = [row for row in here if _place(row) == key]
            first = rows_of_it[0]
            figures = (
                [row["curve"][0] for row in rows_of_it],
                [row["curve"][-1] for row in rows_of_it],
                [row["test"] for row in rows_of_it],
            )
            lines.append(
                f"| {first['macs'] / first['macs_dense']:.1%} | {TITLES[first['member']['arm']]} | "
                f"{first['member']['lr']:g} | {first['params'] / 1e3:,.0f} | "
                + " | ".join(mean_and_spread(values) for values in figures)
                + " |"
            )
        ours = _best(here, "ours")
        hours = sum(row["cpu_seconds_of_cut"] + epochs * row["cpu_seconds_per_epoch"] for row in ours) / 3600
        lines += [
            "",
            f"This package's family, at its better learning rate, took {hours:.1f} hours of one busy core.",
            "",
        ]
    lines.append("![Accuracy by multiply-accumulates](family.png)")
    (HERE / "family.md").write_text("\n".join(lines) + "\n")
    _picture(found)


def _place(row: dict[str, Any]) -> tuple[float, int, float]:
    """Where a row stands: the larger networks first."""
    member = row["member"]
    size = 1.0 if member["arm"] == "dense" else BUDGETS[-1] if member["arm"] == "sibling" else member["budget"]
    return -size, list(TITLES).index(member["arm"]), -member["lr"]


def _best(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """An arm's rows at the learning rate that held-out pictures choose, among those that all of its members have."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["member"]["arm"] == arm:
            by_rate.setdefault(row["member"]["lr"], []).append(row)
    most = max(map(len, by_rate.values()), default=0)
    whole = [some for some in by_rate.values() if len(some) == most]
    return max(whole, key=lambda some: statistics.mean(row["curve"][-1] for row in some), default=[])


def _picture(found: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = sorted({row["member"]["epochs"] for row in found})
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for colour, (arm, title) in enumerate(TITLES.items()):
        for epochs, line in zip(lengths, ("--", "-", ":"), strict=False):
            best = _best([row for row in found if row["member"]["epochs"] == epochs], arm)
            points = sorted((100 * row["macs"] / row["macs_dense"], row["test"]) for row in best)
            if points:
                label = f"{title}, {epochs} epochs a member"
                axes.plot(*zip(*points, strict=True), line, color=f"C{colour}", marker="o", label=label)
    axes.set(xlabel="MACs, percent of the dense network", ylabel="top-1 of ten classes, percent")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "family.png", dpi=120)


if __name__ == "__main__":
    app()
