"""Pruned CIFAR-10 ResNets trained out: criteria, allocations and recipes, with validation curves.

    python examples/benchmarks/recovery.py run --data FOLDER [--only REGEX]   # what is missing, seed after seed
    python examples/benchmarks/recovery.py queue                              # what there is to do, and what is done
    python examples/benchmarks/recovery.py table                              # recovery.md and recovery_*.png

FOLDER holds ``cifar10_*.npz`` and ``resnet{20,56}_cifar10.safetensors``. The last 5,000 training images are for
choices: every epoch is judged by them, and they are not trained on here. The test images judge once, at the end.

Rows are appended to ``recovery.jsonl``, which is kept in git. A trial that was killed goes on after its last whole
epoch. Several runs may work on one queue (each takes what no other holds), and ``kill -STOP`` and ``-CONT`` pause them.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from catro_cifar import INNER, accuracy, adapted, largest_within
from cifar_packs import TEST, TRAIN, normalised, read_packs
from safetensors.torch import load_file
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, prune
from nncf_compactprune.run.datasets import crop_and_flip
from nncf_compactprune.run.networks.cifar_resnet import resnet20, resnet56

HERE = Path(__file__).parent
ROWS, STATES = HERE / "recovery.jsonl", HERE.parent.parent / "runs" / "recovery"
VALIDATION_IMAGES, ADAPTATION_IMAGES, SAMPLES_PER_CLASS, BATCH = 5_000, 2_000, 50, 128
SHORT = (
    "recovery", "recovery_orthogonal", "recovery_orthogonal_logits", "orthogonal", "branches", "recovery_branches",
    "spkd", "kd",
)  # fmt: skip
MAIN = ("plain", "recovery", "recovery_orthogonal")
SEEDS, BUDGETS_56 = (0, 1, 2), (0.47, 0.39)
BUILDERS: dict[int, Callable[[], nn.Module]] = {20: resnet20, 56: resnet56}
#: what ``prune`` is called with; Torch-Pruning's are done by :func:`peer`
CRITERIA: dict[str, dict[str, Any]] = {
    "l2": {"importance": "l2"},
    "geometric_median": {"importance": "geometric_median"},
    "taylor": {"importance": "taylor"},
    "catro": {"algorithm": "catro", "samples_per_class": SAMPLES_PER_CLASS},
    "random": {"importance": "random"},
}
PEER = "tp_group_norm"
DISTILLED: dict[str, Any] = {"similarity_weight": 30_000.0, "feature_size": 8}
#: what the entry ``recovery`` does by default: 1,600 for each of three layers
TAUGHT: dict[str, Any] = {"similarity_weight": 4_800.0, "feature_size": 8, "layers": "stages"}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.03},
    "kd": {"lr": 0.03, "logits_weight": 0.3},
    "spkd": {"lr": 0.03, **DISTILLED},
    "lop": {"lr": 0.01, "expansion": 4},
    "lop_spkd": {"lr": 0.01, "expansion": 4, **DISTILLED},
    "recovery": {"lr": 0.015, **TAUGHT},
    "orthogonal": {"lr": 0.03, "form": "orthogonal"},
    "recovery_orthogonal": {"lr": 0.03, "form": "orthogonal", **TAUGHT},
    "recovery_orthogonal_logits": {"lr": 0.03, "form": "orthogonal", **TAUGHT, "logits_weight": 1.0},
    "branches": {"lr": 0.03, "form": "branches"},
    "recovery_branches": {"lr": 0.015, "form": "branches", **TAUGHT},
}
TITLES = {
    "l2": "L2", "geometric_median": "geometric median", "taylor": "Taylor", "catro": "catro", "random": "random",
    PEER: "Torch-Pruning, group norm", "plain": "plain", "kd": "logits KD", "spkd": "SPKD", "lop": "LOP",
    "lop_spkd": "LOP + SPKD", "recovery": "recovery", "orthogonal": "orthogonal steps",
    "recovery_orthogonal": "recovery with orthogonal steps",
    "recovery_orthogonal_logits": "recovery with orthogonal steps and class scores", "branches": "parallel branches",
    "recovery_branches": "recovery with parallel branches",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run. Options that come later need a default, so that keys stay.

    :param budget: share of MACs kept.
    :param images: so many first training images are trained on.
    :param lr: at the start of a cosine over all steps, which ends at 0.
    :param expansion: r of linear over-parameterization, or None for none.
    :param precision: of training; evaluation is always in float32.
    :param scope: ``"inner"`` cuts inside the blocks only, ``"all"`` the residual stream too, as users get it.
    :param round_to: widths are multiples of this; ``"auto"`` is the package's default.
    :param layers: whose similarities are compared.
    :param form: of over-parameterisation, where there is no expansion.
    :param classes: that are told apart; default: all. The classifier is cut to them.
    """

    depth: int
    budget: float
    criterion: str
    allocation: str
    recipe: str
    seed: int
    epochs: int
    images: int
    lr: float
    precision: str = "bfloat16"
    expansion: int | None = None
    similarity_weight: float = 0.0
    feature_size: int | None = None
    logits_weight: float = 0.0
    scope: str = "inner"
    round_to: int | str = 1
    layers: str = "all"
    form: str = "none"
    classes: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """All that differs from the defaults, readable and fit for ``--only``."""
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[9:]
            if getattr(self, field.name) != field.default
        ]
        named = f"resnet{self.depth} {self.budget} {self.criterion} {self.allocation} {self.recipe} seed={self.seed}"
        return " ".join([named, f"epochs={self.epochs}", f"images={self.images}", f"lr={self.lr:g}", *options])

    @property
    def arm(self) -> str:
        where = " inside blocks" if self.scope == "inner" else ""
        rounded = ', `"round_to": "auto"`' if self.round_to == "auto" else ""
        return f"{TITLES[self.criterion]}, {self.allocation}{where}{rounded}, {TITLES.get(self.recipe, self.recipe)}"


# -- the queue ---------------------------------------------------------------------------------------------------------


def short(
    budget: float,
    criterion: str,
    allocation: str,
    recipe: str,
    seed: int,
    scope: str = "all",
    depth: int = 20,
    **more: Any,
) -> Trial:
    """12 epochs of 10,000 images."""
    return Trial(depth, budget, criterion, allocation, recipe, seed, 12, 10_000, **RECIPES[recipe], scope=scope, **more)


def whole(budget: float, criterion: str, allocation: str, recipe: str, seed: int, depth: int = 20) -> Trial:
    """20 epochs of all images but those for validation."""
    return Trial(depth, budget, criterion, allocation, recipe, seed, 20, 45_000, **RECIPES[recipe], scope="all")


def queue() -> list[Trial]:
    """Everything, in an order that leaves whole comparisons where a run is cut short."""
    magnitude = [("l2", allocation) for allocation in ("uniform", "balanced", "global", "greedy")]
    ways = [("catro", "greedy"), ("catro", "uniform"), *magnitude]
    trials = []
    for seed in SEEDS:
        for budget in (0.35, 0.2):
            trials += [short(budget, *way, "plain", seed) for way in ways]
            trials.append(short(budget, "l2", "balanced", "plain", seed, round_to="auto"))
            trials += [short(budget, "catro", "greedy", recipe, seed) for recipe in SHORT]
            trials += [short(budget, *way, "plain", seed, "inner") for way in ways]
        trials += [short(0.5, "catro", "greedy", recipe, seed) for recipe in MAIN]
        for budget in BUDGETS_56:
            trials += [short(budget, "catro", "greedy", recipe, seed, depth=56) for recipe in reversed(MAIN)]
            trials.append(short(budget, PEER, "uniform", "plain", seed, depth=56))
    others = [("catro", "greedy"), ("l2", "balanced"), ("geometric_median", "balanced"), ("taylor", "balanced")]
    for seed in SEEDS:
        for budget in (0.5, 0.35, 0.2):
            trials += [whole(budget, *way, "recovery", seed) for way in (*others, (PEER, "uniform"))]
            trials += [whole(budget, "catro", "greedy", recipe, seed) for recipe in RECIPES if recipe != "recovery"]
    for seed in SEEDS:
        for budget in BUDGETS_56:
            trials += [whole(budget, "catro", "greedy", recipe, seed, depth=56) for recipe in reversed(MAIN)]
            trials.append(whole(budget, *others[1], "recovery", seed, depth=56))
            trials.append(whole(budget, PEER, "uniform", "plain", seed, depth=56))
    return trials


# -- one trial ---------------------------------------------------------------------------------------------------------


class Data:
    """Images in memory: bytes to train on, normalised ones to judge by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images, self.labels = read_packs(folder, TRAIN)
        self.images, self.validation = images[:-VALIDATION_IMAGES], normalised(images[-VALIDATION_IMAGES:])
        self.labels, self.validation_labels = self.labels[:-VALIDATION_IMAGES], self.labels[-VALIDATION_IMAGES:]

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        images, labels = read_packs(self.folder, TEST)
        return normalised(images), labels

    def dense(self, depth: int) -> nn.Module:
        model = BUILDERS[depth]()
        model.load_state_dict(load_file(self.folder / f"resnet{depth}_cifar10.safetensors"), strict=False)
        return model.eval()

    def few(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of so many training images of every class, another draw for each seed."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1000 + seed))
        chosen = torch.cat([order[self.labels[order] == c][:SAMPLES_PER_CLASS] for c in range(10)])
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
        return [(normalised(self.images[part]), self.labels[part]) for part in chosen.split(100)]


def macs(model: nn.Module) -> int:
    return analyse(copy.deepcopy(model), torch.zeros(1, 3, 32, 32), trial=False).macs


def peer(data: Data, trial: Trial) -> nn.Module:
    """Torch-Pruning's group norm on the same channels, its ratio bisected to the largest network within the budget."""
    import torch_pruning as tp

    most = trial.budget * macs(data.dense(trial.depth))

    def pruned(ratio: float) -> nn.Module:
        model = data.dense(trial.depth)
        inner = {m for n, m in model.named_modules() if n.startswith("layer") and n.endswith("conv1")}
        others = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inner]
        pruner = tp.pruner.BasePruner(
            model, torch.zeros(2, 3, 32, 32), importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=trial.allocation == "global", pruning_ratio=ratio, max_pruning_ratio=0.9,
            ignored_layers=others,
        )  # fmt: skip
        pruner.step()
        model.zero_grad()
        return model

    return largest_within(most, macs, pruned)


def cut_to_classes(classifier: nn.Module, classes: Sequence[int]) -> None:
    """Cuts the scores as ``catro`` cuts them, for criteria that know no classes.

    :param classifier: a linear layer, or a convolution of one position.
    :param classes: whose scores stay, in this order.
    """
    rows, size = torch.tensor(classes), "out_features" if isinstance(classifier, nn.Linear) else "out_channels"
    for parameter in classifier.parameters():
        parameter.data = parameter.data[rows]
    setattr(classifier, size, len(rows))


def pruned_network(data: Data, trial: Trial) -> nn.Module:
    """Cut at once; BatchNorm statistics of the first training images."""
    if trial.criterion == PEER:
        model = peer(data, trial)
    else:
        model = data.dense(trial.depth)
        catro, options = trial.criterion == "catro", CRITERIA[trial.criterion]
        classes = {"classes": list(trial.classes)} if catro and trial.classes else {}
        labelled = {"train_loader": data.few(trial.seed)} if trial.criterion in ("catro", "taylor") else {}
        prune(
            model, normalised(data.images[:2]), budget={"macs": trial.budget}, round_to=trial.round_to,
            target_scopes=INNER if trial.scope == "inner" else None, allocation=trial.allocation,
            **labelled, **options, **classes,
        )  # fmt: skip
        if trial.classes and not catro:
            cut_to_classes(model.get_submodule("linear"), trial.classes)
    return adapted(model, normalised(data.images[:ADAPTATION_IMAGES]).split(500))


def widths(model: nn.Module) -> list[int]:
    """Channels inside every block."""
    return [m.out_channels for n, m in model.named_modules() if n.startswith("layer") and n.endswith("conv1")]  # type: ignore[misc]


def recovery(trial: Trial) -> dict[str, Any]:
    """The config's entry."""
    distillation = {
        name: getattr(trial, name) for name in ("similarity_weight", "feature_size", "logits_weight", "layers")
    }
    return {
        "algorithm": "linear_overparameterization",
        "params": {"form": "factors", "expansion": trial.expansion} if trial.expansion else {"form": trial.form},
        "distillation": distillation,
    }


class Training:
    """A trial under way, epoch by epoch; :meth:`state` after any of them is enough to go on."""

    def __init__(self, trial: Trial, data: Data) -> None:
        self.trial, self.data = trial, data
        torch.manual_seed(trial.seed)
        model = pruned_network(data, trial)
        self.facts: dict[str, Any] = {
            "macs": macs(model),
            "macs_dense": macs(data.dense(trial.depth)),
            "params": sum(p.numel() for p in model.parameters()),
            "widths": widths(model),
        }
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.controller: Any = None
        if trial.expansion or trial.similarity_weight or trial.logits_weight or trial.form != "none":
            teacher = data.dense(trial.depth).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            example = normalised(data.images[:2])
            document = {"compression": [recovery(trial)]}
            self.controller, model = create_compressed_model(model, document, example_inputs=example, teacher=teacher)
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), trial.lr, 0.9, weight_decay=5e-4)
        if self.controller is not None:
            self.controller.attach(optimizer=self.optimizer)
        self.batches = trial.images // BATCH
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, trial.epochs * self.batches)
        self.generator = torch.Generator().manual_seed(trial.seed)
        self.curve = [self.validation()]
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in ("curve", "losses", "seconds", "cpu_seconds", "facts")},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        for name in ("curve", "losses", "seconds", "cpu_seconds", "facts"):
            setattr(self, name, state[name])

    def validation(self) -> float:
        return accuracy(self.model, self.data.validation, self.data.validation_labels)

    def epoch(self) -> None:
        """The next one; the curve holds one figure more than epochs were trained."""
        started, started_cpu = time.perf_counter(), time.process_time()
        trial, total = self.trial, 0.0
        self.model.train()
        if self.controller is not None:
            self.controller.scheduler.epoch_step(len(self.losses))
        for part in torch.randperm(trial.images, generator=self.generator).split(BATCH)[: self.batches]:
            images = normalised(crop_and_flip(self.data.images[part], self.generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=trial.precision == "bfloat16"):
                scores = self.model(images)
            task = nn.functional.cross_entropy(scores.float(), self.data.labels[part])
            loss = task if self.controller is None else task + self.controller.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += task.item()
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - started_cpu)
        self.losses.append(total / self.batches)
        self.curve.append(self.validation())

    def row(self) -> dict[str, Any]:
        """At the end: the only look at the test images."""
        if self.controller is not None:
            self.model = self.controller.strip()
        return {
            "key": self.trial.key,
            "trial": dataclasses.asdict(self.trial),
            "test": accuracy(self.model, *self.data.test),
            "curve": [round(value, 2) for value in self.curve],
            "train_loss": [round(value, 4) for value in self.losses],
            **self.facts,
            "seconds_per_epoch": round(statistics.median(self.seconds), 1),
            "cpu_seconds_per_epoch": round(statistics.median(self.cpu_seconds), 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
        }


def commit() -> str:
    """Of the code that runs."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def trained(trial: Trial, data: Data, state_file: Path) -> dict[str, Any]:
    """Trains from the start, or from where the file stands, which is written whole or not at all."""
    training = Training(trial, data)
    if state_file.exists():
        training.load(torch.load(state_file, weights_only=True))
        print(f"  {trial.key} goes on after epoch {len(training.losses)}", flush=True)
    while len(training.losses) < trial.epochs:
        training.epoch()
        beside = state_file.with_suffix(".new")
        torch.save(training.state(), beside)
        os.replace(beside, state_file)
        done, name = f"{len(training.losses)}/{trial.epochs}", trial.key.split(" epochs=")[0]
        took = f"{training.seconds[-1]:.0f} s, {training.cpu_seconds[-1]:.0f} s of CPU"
        print(f"  {name}: epoch {done} validation {training.curve[-1]:.2f} {took}", flush=True)
    return training.row()


# -- rows --------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What was run so far, by key; a line that a kill cut short is left out."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["key"]] = row
    return rows


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether this process, and no other, has it meanwhile."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def append(path: Path, row: dict[str, Any]) -> None:
    broken = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * broken + json.dumps(row) + "\n")


app = typer.Typer(add_completion=False, help=__doc__)
RowsOption = Annotated[Path, typer.Option(help="where rows are kept")]


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of images and weights")] = Path("../shared/data"),
    only: Annotated[str, typer.Option(help="a pattern, searched for in planned trials' keys")] = "",
    epochs: Annotated[int | None, typer.Option(help="other than planned")] = None,
    images: Annotated[int | None, typer.Option(help="other than planned")] = None,
    precision: Annotated[str | None, typer.Option(help="other than planned")] = None,
    rows: RowsOption = ROWS,
    states: Annotated[Path, typer.Option(help="where trials under way are kept")] = STATES,
    threads: int = 1,
) -> None:
    """Trains what is missing."""
    torch.set_num_threads(threads)
    states.mkdir(parents=True, exist_ok=True)
    changes = {"epochs": epochs, "images": images, "precision": precision}
    changes = {name: value for name, value in changes.items() if value is not None}
    trials = [dataclasses.replace(trial, **changes) for trial in queue() if re.search(only, trial.key)]
    read: Data | None = None
    for at, trial in enumerate(trials):
        name = hashlib.sha256(trial.key.encode()).hexdigest()[:16]
        with taken(states / f"{name}.lock") as mine:
            if not mine or trial.key in read_rows(rows):
                continue
            print(f"{at + 1}/{len(trials)} {trial.key}", flush=True)
            read = read or Data(data)
            row = trained(trial, read, states / f"{name}.pt")
            append(rows, row)
            (states / f"{name}.pt").unlink(missing_ok=True)
            print(f"  {trial.key}: test {row['test']:.2f}", flush=True)


@app.command(name="queue")
def show_queue(rows: RowsOption = ROWS, only: str = "") -> None:
    """Prints what there is to do, and what is done."""
    done = read_rows(rows)
    for trial in queue():
        if re.search(only, trial.key):
            print(f"{done[trial.key]['test']:.2f}" if trial.key in done else "     ", trial.key)


@app.command()
def start(
    data: Annotated[Path, typer.Option(help="folder of images and weights")] = Path("../shared/data"),
    budget: Annotated[list[float], typer.Option(help="share of the MACs kept")] = [0.5],  # noqa: B006
    criterion: Annotated[list[str], typer.Option(help="criteria, as above")] = ["l2"],  # noqa: B006
    threads: int = 1,
) -> None:
    """Writes recovery_start.md: accuracy with no training at all, by what is done after the cut."""
    torch.set_num_threads(threads)
    read = Data(data)
    loader = [(normalised(read.images[part]), read.labels[part]) for part in torch.arange(2_000).split(100)]
    ways: dict[str, dict[str, Any] | None] = {
        "BatchNorm re-estimated, 2,000 images": None,
        "re-fit, 200 images": {"refit": {"num_samples": 200}},
        "re-fit, 2,000 images": {"refit": {}},
        "re-fit, no images": {"refit": {"source": "inversion"}},
    }
    lines = [
        "# A start without training", "",
        "Written by `recovery.py start`. ResNet-20, accuracy on all test images (dense: 91.73), nothing trained.",
        "", "| MACs, kept by | " + " | ".join(ways) + " |", "|" + "---|" * (len(ways) + 1),
    ]  # fmt: skip
    for share, by in itertools.product(budget, criterion):
        cells = []
        for initializer in ways.values():
            model = read.dense(20)
            options = {"budget": {"macs": share}, "train_loader": loader, "initializer": initializer}
            prune(model, normalised(read.images[:2]), **options, **CRITERIA[by])
            cells.append(f"{accuracy(model, *read.test):.1f}")
        lines.append(f"| {share:.0%}, {TITLES[by]}, default widths | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    (HERE / "recovery_start.md").write_text("\n".join(lines) + "\n")


# -- table and curves --------------------------------------------------------------------------------------------------

INTRODUCTION = f"""# Pruned CIFAR-10 ResNets, trained out

Written by `recovery.py table` from `recovery.jsonl`. Channels go at once, to any width, those of the residual stream
too unless an arm says "inside blocks"; BatchNorm is re-estimated on {ADAPTATION_IMAGES:,} training images; then SGD
(batch {BATCH}, momentum 0.9, decay 5e-4, cosine to 0 by step, random crops and flips). Seeds are order and augmentation
of the images, and the labelled samples of criteria that need some ({SAMPLES_PER_CLASS} of a class).

- **test**: accuracy on all 10,000 test images, which every run met once, after its last epoch. Mean ± sample standard
  deviation (number of seeds).
- **validation**: on the last {VALIDATION_IMAGES:,} training images, after the last epoch; choices are made by it only.
  The dense networks, which are starting point and teacher, were trained on these images: it flatters all arms, and more
  those that change the weights less or follow the teacher.
- **gain**: mean difference in test accuracy to the first arm of the table, over the seeds that both have.
- **seconds of CPU an epoch**: up to four times as many where other work ran beside; [lop_cost.md](lop_cost.md) compares
  step times.
- **MACs**: what is really left. Uniform widths cannot meet a budget exactly.

Training in bfloat16 (CPU autocast), evaluation in float32, unless an arm says otherwise.
"""


def mean_and_spread(values: list[float]) -> str:
    """Of percentages; the spread is the sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"


Comparison = tuple[int, float, int, int]  # depth, budget, epochs, images
Arms = dict[str, dict[int, dict[str, Any]]]  # rows by arm and seed


def comparisons(rows: dict[str, dict[str, Any]]) -> dict[Comparison, Arms]:
    """Rows that may be compared, arms in the queue's order; arms off the queue's options say which."""
    planned = {trial.key: at for at, trial in enumerate(queue())}
    found: dict[Comparison, Arms] = {}
    for key in sorted(rows, key=lambda key: (planned.get(key, len(planned)), key)):
        trial = Trial(**rows[key]["trial"])
        usual = RECIPES.get(trial.recipe, {})
        said = f", lr {trial.lr:g}" if trial.lr != usual.get("lr") else ""
        said += f", {trial.precision}" if trial.precision != "bfloat16" else ""
        options = {f.name: getattr(trial, f.name) for f in dataclasses.fields(trial)[10:]}
        said += "".join(
            f", {name} {value:g}"
            for name, value in options.items()
            if value
            and isinstance(value, (int, float))
            and value != usual.get(name)
            and (name, value) != ("round_to", 1)
        )
        comparison = (trial.depth, trial.budget, trial.epochs, trial.images)
        found.setdefault(comparison, {}).setdefault(trial.arm + said, {})[trial.seed] = rows[key]
    return dict(sorted(found.items(), key=lambda item: (item[0][3], item[0][0], -item[0][1])))


def table_of(arms: Arms) -> list[str]:
    lines = ["| kept by, allocation, recipe | test | gain | validation | MACs | parameters | seconds of CPU an epoch |"]
    lines.append("|---|---|---|---|---|---|---|")
    first = next(iter(arms.values()))
    for arm, seeds in arms.items():
        test, validation = ([pick(row) for row in seeds.values()] for pick in (_test, _validation))
        gains = [row["test"] - first[seed]["test"] for seed, row in seeds.items() if seed in first]
        gain = f"{statistics.mean(gains):+.2f}" if gains and seeds is not first else ""
        left, parameters, cpu = (
            statistics.mean(row[name] for row in seeds.values()) for name in ("macs", "params", "cpu_seconds_per_epoch")
        )
        share = left / next(iter(seeds.values()))["macs_dense"]
        cells = (arm, mean_and_spread(test), gain, mean_and_spread(validation))
        lines.append(f"| {' | '.join(cells)} | {share:.1%} | {parameters / 1000:.1f} K | {cpu:.0f} |")
    return lines


def _test(row: dict[str, Any]) -> float:
    return float(row["test"])


def _validation(row: dict[str, Any]) -> float:
    return float(row["curve"][-1])


def draw(arms: Arms, title: str, path: Path) -> None:
    """Validation accuracy against epoch: mean over seeds, from the least to the most as a band, test as a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lowest = 100.0
    for arm, seeds in arms.items():
        curves = [row["curve"] for row in seeds.values()]
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        (line,) = axes.plot(mean, label=f"{arm} ({len(curves)})", linewidth=1.4)
        axes.fill_between(range(len(mean)), *_extent(curves), color=line.get_color(), alpha=0.15, linewidth=0)
        tests = [row["test"] for row in seeds.values()]
        axes.plot([len(mean) - 1] * len(tests), tests, ".", color=line.get_color(), markersize=6, clip_on=False)
        lowest = min(lowest, mean[min(1, len(mean) - 1)])
    axes.set_ylim(bottom=lowest - 2)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %; points: test", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _extent(curves: list[list[float]]) -> tuple[list[float], list[float]]:
    columns = list(zip(*curves, strict=True))
    return [min(column) for column in columns], [max(column) for column in columns]


@app.command()
def table(rows: RowsOption = ROWS, folder: Annotated[Path, typer.Option(help="for page and pictures")] = HERE) -> None:
    """Writes recovery.md and the curves."""
    read = read_rows(rows)
    lines = [INTRODUCTION]
    for (depth, budget, epochs, images), arms in comparisons(read).items():
        title = f"ResNet-{depth}, {budget:.0%} of the MACs, {epochs} epochs of {images:,} images"
        picture = f"recovery_resnet{depth}_{round(100 * budget)}_{epochs}x{images}.png"
        draw(arms, title, folder / picture)
        lines += [f"## {title}", "", *table_of(arms), "", f"![Validation accuracy by epoch]({picture})", ""]
    commits = sorted({row["commit"] for row in read.values()})
    versions = sorted({row["torch"] for row in read.values()})
    planned = queue()
    done = sum(trial.key in read for trial in planned)
    lines.append(f"{done} of {len(planned)} planned runs. torch {', '.join(versions)}; code of {', '.join(commits)}.")
    (folder / "recovery.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
