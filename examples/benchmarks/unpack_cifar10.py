"""Writes CIFAR-10's official binary version from the packed files, so that the configs for CIFAR-10 run on it.

    python examples/benchmarks/unpack_cifar10.py --data FOLDER --output data

FOLDER holds ``cifar10_*.npz``. The images come out in the packs' order, which is shuffled.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar_packs import TEST, TRAIN, read_packs
from torch import Tensor

BATCH = 10_000


def rows(images: Tensor, labels: Tensor) -> bytes:
    """One label and 3,072 pixels for each image, all bytes.

    :param images: bytes ``[n, 3, 32, 32]``.
    :param labels: ``[n]``.
    """
    return torch.cat([labels[:, None].byte(), images.flatten(1)], 1).numpy().tobytes()


def unpack(data: Path, output: Path) -> Path:
    """Writes the six files.

    :param data: what holds the packs.
    :param output: where ``cifar-10-batches-bin`` goes.
    :return: that folder.
    """
    folder = output / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = read_packs(data, TRAIN)
    for number, part in enumerate(torch.arange(len(labels)).split(BATCH), 1):
        (folder / f"data_batch_{number}.bin").write_bytes(rows(images[part], labels[part]))
    (folder / "test_batch.bin").write_bytes(rows(*read_packs(data, TEST)))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    print(f"Written to {unpack(arguments.data, arguments.output)}")
