"""MobileNetV1-0.75 with ImageNet weights, cut to ten of its thousand classes and fine-tuned on pictures of these.

    python examples/benchmarks/imagenette.py run --data FOLDER      # arms that are missing in imagenette.jsonl
    python examples/benchmarks/imagenette.py table
    python examples/benchmarks/imagenette.py weights --data FOLDER --output data   # with ten outputs, for configs

FOLDER holds ``imagenette/{train,val}/<wnid>/*.JPEG`` and ``mobilenet_v1_075_224_imagenet.safetensors``. Of the training
pictures of each class the last 40 are for choices; the validation pictures judge once, after the last epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from recovery import append, commit, cut_to_classes, mean_and_spread, read_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, plan_of
from nncf_compactprune.run.datasets.augment import resized_crop_and_flip
from nncf_compactprune.run.networks.mobilenet_v1 import mobilenet_v1

HERE = Path(__file__).parent
ROWS = HERE / "imagenette.jsonl"
#: folders in the order of their class index among ImageNet's thousand
CLASSES = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497, "n03394916": 566,
    "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip
HELD_OUT, BATCH, FEW = 40, 64, 500
STARTS = {"batch_norm": "BatchNorm re-estimated", "refit": "layers re-fitted"}
RECIPES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "recovery": {"algorithm": "recovery"},
    "recovery and class scores": {"algorithm": "recovery", "distillation": {"logits_weight": 1.0}},
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run.

    :param budget: share of the MACs kept.
    :param criterion: ``"catro"`` or a magnitude criterion of ``fbnet_pruning``.
    :param recipe: a key of :data:`RECIPES`.
    :param lr: at the start of a cosine over all steps, which ends at 0.
    :param start: what makes up for the cut before training: ``"batch_norm"`` statistics re-estimated, or a
        ``"refit"`` of every layer.
    :param few: training pictures for that, and for the choice of channels.
    :param allocation: of widths; default: the algorithm's own.
    :param pictures: so many are trained on, another draw for each seed; default: all but those for choices.
    """

    budget: float
    criterion: str
    recipe: str
    seed: int = 0
    epochs: int = 10
    lr: float = 0.02
    weight_decay: float = 4e-5
    start: str = "batch_norm"
    few: int = FEW
    allocation: str | None = None
    pictures: int | None = None

    @property
    def key(self) -> str:
        """All options, but those that came later and have their default."""
        later = [("start", "batch_norm"), ("few", FEW), ("allocation", None), ("pictures", None)]
        options = {name: value for name, value in dataclasses.asdict(self).items() if (name, value) not in later}
        return " ".join(f"{name}={value}" for name, value in options.items())


def queue() -> list[Trial]:
    refitted = [
        Trial(0.3, "catro", recipe, epochs=5, lr=0.002, start="refit")
        for recipe in ("recovery", "recovery and class scores")
    ]
    refitted.append(Trial(0.3, "catro", "recovery and class scores", epochs=5, lr=0.002, start="refit", few=2000))
    refitted.append(Trial(0.3, "l2", "recovery", epochs=5, lr=0.002, start="refit"))
    return refitted + [
        Trial(0.3, criterion, recipe) for recipe in ("recovery", "plain") for criterion in ("catro", "l2")
    ]


def files_of(folder: Path) -> tuple[list[Path], Tensor]:
    """All pictures of a folder, and their places among the ten classes."""
    files = [sorted((folder / name).iterdir()) for name in CLASSES]
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    return list(itertools.chain(*files)), torch.tensor(labels)


def decoded(files: Sequence[Path]) -> Tensor:
    """Pictures as bytes ``[n, 3, 224, 224]``."""
    images = torch.empty(len(files), 3, 224, 224, dtype=torch.uint8)
    for image, file in zip(images, files, strict=True):
        with Image.open(file) as opened:
            image.copy_(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    return images


def normalised(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


class Data:
    """Pictures, read when they are asked for; the held-out ones are the last of every class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files, labels = files_of(folder / "imagenette" / "train")
        place = torch.cat([torch.arange(int((labels == c).sum())) for c in range(len(CLASSES))])
        trained_on, held = (place < 400 - HELD_OUT).nonzero().ravel(), (place >= 400 - HELD_OUT).nonzero().ravel()
        self.files, self.labels = [files[i] for i in trained_on], labels[trained_on]
        self._held, self.held_labels = [files[i] for i in held], labels[held]

    @cached_property
    def images(self) -> Tensor:
        return decoded(self.files)

    @cached_property
    def held(self) -> Tensor:
        return decoded(self._held)

    def part(self, seed: int, count: int | None) -> Data:
        """With so many training pictures only, or all."""
        if count is None:
            return self
        drawn = copy.copy(self)
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1000 + seed))[:count]
        drawn.images, drawn.labels, drawn.files = self.images[order], self.labels[order], [self.files[i] for i in order]
        return drawn

    def test(self) -> tuple[Tensor, Tensor]:
        files, labels = files_of(self.folder / "imagenette" / "val")
        return decoded(files), labels

    def dense(self, width: float = 0.75) -> nn.Module:
        model = mobilenet_v1(width)
        name = f"mobilenet_v1_{round(100 * width):03}_224_imagenet.safetensors"
        model.load_state_dict(load_file(self.folder / name), strict=False)
        return model.eval()

    def few(self, seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of training pictures with ImageNet's labels."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[:count]
        indices = torch.tensor(list(CLASSES.values()))
        parts = [([self.files[i] for i in part], self.labels[part]) for part in order.split(50)]
        return [(normalised(decoded(files)), indices[labels]) for files, labels in parts]


def of_ten_classes(folder: Path, width: str) -> dict[str, Tensor]:
    """Trained weights with the ten classes' outputs only."""
    tensors = load_file(folder / f"mobilenet_v1_{width}_224_imagenet.safetensors")
    indices = torch.tensor(list(CLASSES.values()))
    return {name: t[indices] if name.startswith("conv_preds") else t for name, t in tensors.items()}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right among the ten classes."""
    model.eval()
    right = 0
    for part, expected in zip(images.split(100), labels.split(100), strict=True):
        scores = model(normalised(part).to(memory_format=torch.channels_last))
        if scores.shape[1] > len(CLASSES):
            scores = scores[:, list(CLASSES.values())]
        right += int((scores.argmax(1) == expected).sum())
    return 100 * right / len(labels)


def fine_tuned(
    model: nn.Module,
    data: Data,
    controller: Any,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    seed: int,
    name: str,
) -> tuple[list[float], list[float]]:
    """Trains in place, the learning rate on a cosine to 0 by step.

    :param controller: of the network, or None.
    :param name: what to call it in the lines that are printed.
    :return: percent right of the held-out pictures, before and after every epoch, and seconds of CPU an epoch.
    """
    if controller is not None:
        controller.attach(optimizer=optimizer)
    batches = len(data.labels) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    curve, seconds = [accuracy(model, data.held, data.held_labels)], []
    for epoch in range(epochs):
        started = time.process_time()
        model.train()
        if controller is not None:
            controller.scheduler.epoch_step(epoch)
        for part in torch.randperm(len(data.labels), generator=generator).split(batch)[:batches]:
            images = resized_crop_and_flip(normalised(data.images[part]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(images.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(scores.float(), data.labels[part])
            if controller is not None:
                loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds.append(time.process_time() - started)
        curve.append(accuracy(model, data.held, data.held_labels))
        print(f"  {name}: epoch {epoch + 1} held out {curve[-1]:.2f} {seconds[-1]:.0f} s of CPU", flush=True)
    return curve, seconds


def trained(trial: Trial, data: Data, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(trial.seed)
    model, example = data.dense(), normalised(data.images[:2])
    dense = model
    dense_macs = analyse(model, example, trial=False).macs
    catro = trial.criterion == "catro"
    params = {} if catro else {"importance": trial.criterion}
    if trial.allocation:
        params["allocation"] = trial.allocation
    entry: dict[str, Any] = {
        "algorithm": "catro" if catro else "fbnet_pruning",
        "budget": {"macs": trial.budget},
        "params": {"schedule": "one_shot", **params},
    }
    if trial.start == "refit":
        entry["initializer"] = {"refit": {"num_samples": trial.few}}
    if catro:
        entry["params"]["classes"] = list(CLASSES.values())
    recipe = RECIPES[trial.recipe]
    document = {"compression": [entry] if recipe is None else [entry, recipe]}
    few = data.few(trial.seed, trial.few)
    controller, model = create_compressed_model(dense, document, few, example_inputs=example)
    data = data.part(trial.seed, trial.pictures)
    if not catro:  # the classifier is cut to the ten classes as catro cuts it, and nothing else
        cut_to_classes(model.get_submodule("conv_preds"), list(CLASSES.values()))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), trial.lr, 0.9, weight_decay=trial.weight_decay, nesterov=True)
    curve, seconds = fine_tuned(
        model, data, controller, optimizer, epochs=trial.epochs, batch=BATCH, seed=trial.seed, name=trial.key
    )
    model = controller.strip()
    macs = analyse(model, example, trial=False).macs
    return {
        "key": trial.key, "trial": dataclasses.asdict(trial), "test": accuracy(model, *data.test()), "curve": curve,
        "macs": macs, "macs_dense": dense_macs, "params": sum(p.numel() for p in model.parameters()),
        "cpu_seconds_per_epoch": statistics.median(seconds), "threads": threads, "commit": commit(),
        "classes": list((plan_of(model).output_classes or ()) if plan_of(model) else ()),
    }  # fmt: skip


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of pictures and weights")] = Path("../shared/data"),
    rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS,
    threads: int = 1,
) -> None:
    """Trains what is missing."""
    read: Data | None = None
    for trial in queue():
        if trial.key not in read_rows(rows):
            read = read or Data(data)
            row = trained(trial, read, threads)
            append(rows, row)
            print(json.dumps({"key": trial.key, "test": row["test"], "held out": row["curve"][-1]}), flush=True)


@app.command()
def weights(
    data: Annotated[Path, typer.Option(help="folder of the trained weights")] = Path("../shared/data"),
    output: Annotated[Path, typer.Option(help="where to write")] = Path("data"),
) -> None:
    """Writes the trained weights with the ten classes' outputs only, in the order of the picture folders."""
    output.mkdir(parents=True, exist_ok=True)
    for width in ("075", "025"):
        save_file(of_ten_classes(data, width), output / f"mobilenet_v1_{width}_imagenette.safetensors")


@app.command()
def table(rows: Annotated[Path, typer.Option(help="where rows are kept")] = ROWS) -> None:
    """Writes imagenette.md."""
    read = list(read_rows(rows).values())
    lines = [
        "# MobileNetV1-0.75 cut to ten of its thousand classes", "",
        "Written by `imagenette.py table`. Pruned at once, then fine-tuned on 3,600 pictures. The dense network, not "
        "trained on, tells 98.2 % of the 1,500 validation pictures apart among the ten classes.", "",
        "| kept by | before training | recipe | MACs | parameters | after the cut | held out | validation pictures |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in read:
        trial = Trial(**row["trial"])
        lines.append(
            f"| {trial.criterion} | {STARTS[trial.start]}, {trial.few:,} pictures | "
            f"{trial.recipe}, {trial.epochs} epochs, lr {trial.lr:g} | "
            f"{row['macs'] / row['macs_dense']:.1%} | "
            f"{row['params'] / 1e3:.0f} K | {row['curve'][0]:.1f} | {row['curve'][-1]:.1f} | "
            f"{mean_and_spread([row['test']])} |"
        )
    (HERE / "imagenette.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    app()
