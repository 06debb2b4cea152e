"""One side of ``nncf2.py``: a training script as written for NNCF 2.x, run in whatever environment starts it.

    python nncf2_side.py train SIDE CONFIG SEED FOLDER OUT     # trains, exports, prints a row of JSON
    python nncf2_side.py steps SIDE CONFIG EPOCH FOLDER OUT    # then reads numbers, takes so many steps, prints seconds

``SIDE`` is ``nncf2`` (NNCF 2.19's own functions) or ``here`` (the same names, from this package). Nothing else differs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("NNCF_TORCH_LEGACY_TRACING", "1")  # NNCF 2.19 asks for it; NNCF 3 does not read it

import openvino as ov
import torch
from cifar_packs import TEST, TRAIN, normalised, read_packs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nncf_compactprune.run.networks.cifar_resnet import resnet20

SIDES = {"nncf2": ("nncf", "nncf.torch"), "here": ("nncf_compactprune.integrations.nncf2",) * 2}
EPOCHS, TRAIN_IMAGES, BATCH, RATE = 6, 10_000, 128, 0.01


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pads by 4, crops at random, flips half: the augmentation of the time."""
    count = len(images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    rows, columns = torch.randint(9, (2, count), generator=generator)
    at = torch.arange(32)
    cropped = padded.permute(0, 2, 3, 1)[
        torch.arange(count)[:, None, None], (rows[:, None] + at)[:, :, None], (columns[:, None] + at)[:, None, :]
    ].permute(0, 3, 1, 2)
    flipped = torch.rand(count, generator=generator) < 0.5
    cropped[flipped] = cropped[flipped].flip(3)
    return cropped.contiguous()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    return (
        100
        * sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
        / len(labels)
    )


class Side:
    """The compressed network and its training.

    :param side: whose functions compress.
    :param config: the file of the configuration.
    :param seed: of the batches' order and the augmentation.
    :param folder: CIFAR-10's packs and the trained network.
    """

    def __init__(self, side: str, config: Path, seed: int, folder: Path) -> None:
        configs, functions = (importlib.import_module(name) for name in SIDES[side])
        images, labels = read_packs(folder, TRAIN[:1])
        self.images, self.labels = normalised(images[:TRAIN_IMAGES]), labels[:TRAIN_IMAGES]
        self.folder = folder
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = resnet20()
        model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"), strict=False)
        nncf_config = configs.NNCFConfig.from_json(str(config))
        loader = DataLoader(TensorDataset(self.images, self.labels), batch_size=BATCH)
        nncf_config = functions.register_default_init_args(nncf_config, loader)
        self.ctrl, self.model = functions.create_compressed_model(model, nncf_config, dump_graphs=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, 0.9, weight_decay=5e-4)
        if hasattr(self.ctrl, "attach"):  # lets the network shrink while it trains
            self.ctrl.attach(optimizer=self.optimizer)

    def begin_epoch(self) -> None:
        self.ctrl.scheduler.epoch_step()
        self.model.train()

    def train(self, chosen: Tensor) -> None:
        """One step on these images."""
        self.ctrl.scheduler.step()
        images = crop_and_flip(self.images[chosen], self.generator)
        loss = nn.functional.cross_entropy(self.model(images), self.labels[chosen]) + self.ctrl.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def run(self) -> list[float]:
        """All epochs; seconds of each."""
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS)
        seconds = []
        for _ in range(EPOCHS):
            started = time.perf_counter()
            self.begin_epoch()
            for chosen in torch.randperm(TRAIN_IMAGES, generator=self.generator).split(BATCH):
                self.train(chosen)
            schedule.step()
            seconds.append(time.perf_counter() - started)
        return seconds


def macs_of(network: ov.Model) -> int:
    """Multiply-accumulates that a file asks for: of its convolutions and matrix products, for one image."""
    total = 0
    for op in network.get_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            weight, out = op.input(1).get_partial_shape().to_shape(), op.output(0).get_partial_shape()
            outputs = (
                weight[1] if op.get_type_name() == "MatMul" and not op.get_attributes()["transpose_b"] else weight[0]
            )
            taps = 1
            for size in weight:
                taps *= size
            positions = 1
            for size in list(out)[2:]:
                positions *= size.get_length()
            total += taps // outputs * outputs * positions
    return total


def told(ctrl: Any) -> list[str]:
    """What the tool itself says of the cost: the lines of its statistics that speak of FLOPs or MACs."""
    return [line for line in ctrl.statistics().to_str().splitlines() if "FLOPs" in line or "MACs" in line]


def trained(side: str, config: Path, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    made = Side(side, config, seed, folder)
    epochs = made.run()
    images, labels = read_packs(folder, TEST)
    row: dict[str, Any] = {"accuracy": accuracy(made.model, normalised(images), labels), "epoch_seconds": epochs}
    row["told"] = told(made.ctrl)
    onnx = out / f"{config.stem}_{side}_{seed}.onnx"
    made.ctrl.export_model(str(onnx))
    network = ov.convert_model(onnx)
    network.reshape([1, 3, 32, 32])
    ov.save_model(network, onnx.with_suffix(".xml"), compress_to_fp16=False)
    sizes = {path.suffix: path.stat().st_size for path in (onnx, onnx.with_suffix(".xml"), onnx.with_suffix(".bin"))}
    return row | {"onnx_bytes": sizes[".onnx"], "ir_bytes": sizes[".xml"] + sizes[".bin"], "macs": macs_of(network)}


def steps(side: str, config: Path, epoch: int, folder: Path) -> None:
    """Comes to an epoch by single steps; then every line read is a number of steps to take."""
    made = Side(side, config, 0, folder)
    for at in range(epoch + 1):
        made.begin_epoch()
        made.train(torch.arange(at * BATCH, at * BATCH + BATCH))
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for chosen in torch.randperm(TRAIN_IMAGES, generator=made.generator).split(BATCH)[: int(line)]:
            made.train(chosen)
        print(time.perf_counter() - started, flush=True)


def main() -> None:
    what, side, config, number, folder, out = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if what == "steps":
        steps(side, Path(config), int(number), Path(folder))
    else:
        print(json.dumps(trained(side, Path(config), int(number), Path(folder), Path(out))), flush=True)


if __name__ == "__main__":
    main()
