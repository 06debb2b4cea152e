"""Small files of CIFAR-10's official layouts."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

PIXELS = 3 * 32 * 32


def images(count: int, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Random pixels, bytes ``[count, 3072]``, and labels in 0..9."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, PIXELS), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def python_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The pickle as Python 2 wrote the official files: protocol 2, its strings and keys are byte strings."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


def binary_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Rows of a label and 3,072 pixels."""
    return np.hstack([np.asarray(labels, np.uint8)[:, None], pixels]).tobytes()


def write_python(folder: Path, per_file: int = 4) -> None:
    """All six files of the Python version."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(python_batch(*images(per_file, number)))


def write_binary(folder: Path, per_file: int = 4) -> None:
    """All six files of the binary version, with the images of :func:`write_python`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(binary_batch(*images(per_file, number)))


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def hostile_batch(path: Path) -> bytes:
    """A batch that would create ``path``."""
    pixels, labels = images(2)
    return pickle.dumps({b"data": pixels, b"labels": labels, b"filenames": [Hostile(path)]})
