"""Where the choice of channels still matters once a network is trained: criteria at equal widths.

    python examples/benchmarks/choice_of_channels.py run --data FOLDER [--only REGEX]   # what is missing
    python examples/benchmarks/choice_of_channels.py table                              # choice_of_channels.md

FOLDER holds what ``recovery.py`` and ``imagenette.py`` read. Every criterion gets the same widths (``"uniform"``), the
same images in the same order and the same plain fine-tuning of ``recovery.py``; only the channels differ. Rows are
appended to ``choice_of_channels.jsonl``, which is kept in git; a trial that was killed goes on after its last epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import imagenette
import torch
import typer
from recovery import PEER, RECIPES, TITLES, Data, Trial, append, mean_and_spread, read_rows, trained
from torch import Tensor, nn

HERE = Path(__file__).parent
ROWS, STATES = HERE / "choice_of_channels.jsonl", HERE.parent.parent / "runs" / "choice_of_channels"
CRITERIA = ("catro", "l2", "geometric_median", "taylor", "random")
SEEDS, HELD_OUT, AHEAD = (0, 1, 2), 500, 0.5
MOBILENET = "mobilenet"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on, and for how long.

    :param title: what is special about it.
    :param budget: share of MACs kept.
    :param images: about so many are trained on, as many of each class; every seed has others.
    :param classes: that are told apart; default: all.
    :param imbalance: images of the first class over those of the last, falling from class to class by one factor.
    :param scope: as in ``recovery.py``; ``"inner"`` brings in Torch-Pruning, which cannot cut these networks' streams.
    """

    title: str
    budget: float
    images: int
    epochs: int
    classes: tuple[int, ...] = ()
    imbalance: float = 1.0
    scope: str = "all"

    @property
    def counts(self) -> list[int]:
        """Training images of each class."""
        count = len(self.classes) or 10
        shares = [self.imbalance ** (-place / (count - 1)) for place in range(count)]
        return [math.floor(self.images * share / sum(shares)) for share in shares]

    def trial(self, criterion: str, seed: int) -> Trial:
        return Trial(
            20, self.budget, criterion, "uniform", "plain", seed, self.epochs, sum(self.counts), **RECIPES["plain"],
            scope=self.scope, classes=self.classes,
        )  # fmt: skip


#: cheap ones first
SETTINGS = {
    "short_35": Setting("", 0.35, 10_000, 1),
    "short_20": Setting("", 0.2, 10_000, 1),
    "few_1000": Setting("", 0.35, 1_000, 10),
    "few_500": Setting("", 0.35, 500, 20),
    "imbalance": Setting("classes 10 : 1", 0.35, 4_000, 3, imbalance=10.0),
    "two": Setting("cat and dog alone", 0.2, 2_000, 5, classes=(3, 5)),
    "five": Setting("five classes alone", 0.2, 5_000, 2, classes=(0, 1, 2, 8, 9)),
    "inner": Setting("inside the blocks", 0.35, 10_000, 1, scope="inner"),
    "long_20": Setting("", 0.2, 10_000, 12),
    "long_35": Setting("", 0.35, 10_000, 12),
}


class Part(Data):
    """What one setting and seed may see of CIFAR-10; labels count its classes from 0."""

    def __init__(self, whole: Data, setting: Setting, seed: int) -> None:
        self.whole = whole
        self.classes = torch.tensor(setting.classes or range(10))
        chosen = [
            (whole.labels == c).nonzero().ravel()[seed * count : (seed + 1) * count]
            for c, count in zip(self.classes, setting.counts, strict=True)
        ]
        order = torch.cat(chosen).sort().values
        self.images, self.labels = self._renamed(whole.images[order], whole.labels[order])
        held = self._renamed(whole.validation, whole.validation_labels)
        self.validation, self.validation_labels = (tensor[:HELD_OUT] for tensor in held)

    def _renamed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hit = labels[:, None] == self.classes
        mine = hit.any(1)
        return images[mine], hit[mine].int().argmax(1)

    @property
    def test(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self._renamed(*self.whole.test)

    def dense(self, depth: int) -> nn.Module:
        return self.whole.dense(depth)

    def few(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """With the labels of the network that is not cut yet."""
        return [(images, self.classes[labels]) for images, labels in super().few(seed)]


def criteria_of(name: str, seed: int) -> tuple[str, ...]:
    """What is compared in a setting; random channels say what any choice is worth, once."""
    if name == "inner":
        return ("catro", "l2", PEER)
    return CRITERIA if name.startswith("short") and seed == SEEDS[0] else CRITERIA[:-1]


def pictures_trial(criterion: str, seed: int) -> imagenette.Trial:
    return imagenette.Trial(0.3, criterion, "plain", seed, epochs=2, allocation="uniform", pictures=1_000)


Planned = tuple[str, str, str, int]  # key, setting, criterion, seed


def queue() -> Iterator[Planned]:
    """In an order that leaves whole comparisons where a run is cut short."""
    for seed in SEEDS:
        for name in (*SETTINGS, MOBILENET):
            for criterion in criteria_of(name, seed):
                trial: Any = pictures_trial if name == MOBILENET else SETTINGS[name].trial
                yield f"{name} {trial(criterion, seed).key}", name, criterion, seed


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of images, pictures and weights")] = Path("../shared/data"),
    only: Annotated[str, typer.Option(help="a pattern, searched for in planned keys")] = "",
    rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS,
    states: Annotated[Path, typer.Option(help="where trials under way are kept")] = STATES,
    threads: int = 1,
) -> None:
    """Trains what is missing."""
    torch.set_num_threads(threads)
    states.mkdir(parents=True, exist_ok=True)
    whole: Data | None = None
    pictures: imagenette.Data | None = None
    done = read_rows(rows)
    for key, name, criterion, seed in queue():
        if key in done or not re.search(only, key):
            continue
        print(key, flush=True)
        if name == MOBILENET:
            pictures = pictures or imagenette.Data(data)
            row = imagenette.trained(pictures_trial(criterion, seed), pictures, threads)
        else:
            whole = whole or Data(data)
            state = states / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
            row = trained(SETTINGS[name].trial(criterion, seed), Part(whole, SETTINGS[name], seed), state)
        append(rows, row | {"key": key, "setting": name, "criterion": criterion, "seed": seed})
        if name != MOBILENET:
            state.unlink(missing_ok=True)
        print(f"  test {row['test']:.2f}, before training {row['curve'][0]:.1f}", flush=True)


# -- table -------------------------------------------------------------------------------------------------------------

INTRODUCTION = f"""# The choice of channels, at equal widths

Written by `choice_of_channels.py table` from `choice_of_channels.jsonl`. ResNet-20 of CIFAR-10 and MobileNetV1-0.75 of
ImageNet are cut at once; every layer keeps the same share of its channels, whatever the criterion, so that only the
choice of channels differs. BatchNorm is re-estimated on training images, then SGD as in `recovery.md`, without a
teacher. A seed is other training images (as many of each class), another order of them, and other labelled samples for
catro and Taylor (50 of a class). Test images judge once, after the last epoch.

"Ahead" is catro's test accuracy less that of the best other criterion, among those with the most seeds, by seeds that
both have: mean ± standard error.
It counts as ahead or behind from {AHEAD} points and two standard errors on, as level else; one seed decides nothing.
"""

Found = dict[str, dict[int, dict[str, Any]]]  # rows by criterion and seed


def found_by_setting(rows: dict[str, dict[str, Any]]) -> dict[str, Found]:
    """Measured rows, in the queue's order; rows of other plans are left out.

    :raises ValueError: criteria of this package have different widths in one setting.
    """
    settings: dict[str, Found] = {}
    for key, name, criterion, seed in queue():
        if key in rows:
            settings.setdefault(name, {}).setdefault(criterion, {})[seed] = rows[key]
    for name, found in settings.items():
        macs = {row["macs"] for criterion, seeds in found.items() if criterion != PEER for row in seeds.values()}
        if len(macs) > 1:
            msg = f"{name}: expected equal widths for all criteria, got networks of {sorted(macs)} MACs."
            raise ValueError(msg)
    return settings


def title_of(name: str) -> str:
    if name == MOBILENET:
        trial = pictures_trial("catro", 0)
        training = f"{trial.epochs} epochs of {trial.pictures:,} pictures"
        return f"MobileNetV1-0.75 cut to ten of its thousand classes, {trial.budget:.0%}: {training}"
    setting = SETTINGS[name]
    epochs = "1 epoch" if setting.epochs == 1 else f"{setting.epochs} epochs"
    said = f", {setting.title}" if setting.title else ""
    return f"ResNet-20{said}, {setting.budget:.0%}: {epochs} of {setting.images:,} images"


def lead(found: Found) -> tuple[str, float, float, int] | None:
    """The best other criterion of those with the most seeds, and how far catro is ahead of it: mean, standard error,
    seeds."""
    ours = found.get("catro", {})
    leads = {}
    for criterion, seeds in found.items():
        both = [ours[seed]["test"] - row["test"] for seed, row in seeds.items() if seed in ours]
        if criterion != "catro" and both:
            leads[criterion] = both
    if not leads:
        return None
    most = max(map(len, leads.values()))
    best = min((c for c in leads if len(leads[c]) == most), key=lambda criterion: statistics.mean(leads[criterion]))
    values = leads[best]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return best, statistics.mean(values), error, len(values)


def verdicts(settings: dict[str, Found]) -> list[str]:
    """Sentences: where catro's channels are ahead, level and behind."""
    said: dict[str, list[str]] = {"ahead": [], "level": [], "behind": [], "not decided, one seed": []}
    for name, found in settings.items():
        if led := lead(found):
            best, mean, error, seeds = led
            clear = abs(mean) >= max(AHEAD, 2 * error)
            where = ("ahead" if mean > 0 else "behind") if clear else "level"
            where = "not decided, one seed" if seeds == 1 else where
            said[where].append(f"{title_of(name)} ({mean:+.2f} to {TITLES[best]})")
    return [f"- **{where}**: {'; '.join(places) or 'nowhere'}." for where, places in said.items()]


def grid(settings: dict[str, Found], pick: Any, *, with_lead: bool) -> list[str]:
    criteria = (*CRITERIA, PEER)
    lines = ["| network, share of the MACs, training | " + " | ".join(TITLES[c] for c in criteria) + " |"]
    lines[0] += " MACs left | ahead |" if with_lead else ""
    lines.append("|---" * (len(criteria) + (3 if with_lead else 1)) + "|")
    for name, found in settings.items():
        cells = [mean_and_spread([pick(r) for r in found[c].values()]) if c in found else "" for c in criteria]
        if with_lead:
            row, led = next(iter(found["catro"].values())), lead(found)
            cells.append(f"{row['macs'] / row['macs_dense']:.1%}")
            cells.append(f"{led[1]:+.2f}" + (f" ± {led[2]:.2f}" if led[3] > 1 else "") if led else "")
        lines.append(f"| {title_of(name)} | {' | '.join(cells)} |")
    return lines


@app.command()
def table(
    rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS,
    folder: Annotated[Path, typer.Option(help="for the page")] = HERE,
) -> None:
    """Writes choice_of_channels.md."""
    read = read_rows(rows)
    settings = found_by_setting(read)
    planned = [key for key, *_ in queue()]
    lines = [
        INTRODUCTION,
        "## After training", "", "Test accuracy in percent, mean ± sample standard deviation (seeds).", "",
        *grid(settings, lambda row: row["test"], with_lead=True), "", "catro's channels against the best others:", "",
        *verdicts(settings), "",
        "## Before training", "", f"On held-out training images ({HELD_OUT:,} of CIFAR-10, 400 pictures), which the "
        "dense ResNet-20 was trained on.", "",
        *grid(settings, lambda row: row["curve"][0], with_lead=False), "",
        f"{sum(key in read for key in planned)} of {len(planned)} planned runs; code of "
        f"{', '.join(sorted({row['commit'] for row in read.values()}))}.",
    ]  # fmt: skip
    (folder / "choice_of_channels.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
