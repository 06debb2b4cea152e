"""SHA-256 of what is too long to compare: tensors, and files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """The digest of tensors by name, in any order, and of a text beside them.

    :param tensors: names, dtypes, shapes and contents count; devices do not.
    :param text: what else must be equal.
    :return: 64 hexadecimal digits.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content, read block by block.

    :return: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
