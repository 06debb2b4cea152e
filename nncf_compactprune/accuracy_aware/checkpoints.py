"""Checkpoints as NNCF 2.x's accuracy-aware training writes them: names, keys, ``torch.save``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.storage.writing import whole_file

PREFIX = "acc_aware_checkpoint"


def checkpoint_path(directory: Path, which: str) -> Path:
    """Where a checkpoint goes.

    :param directory: of the training.
    :param which: ``"last"``, ``"best"``, ``"best_0.400"``, ``"best_uncompressed"``.
    """
    return directory / f"{PREFIX}_{which}.pth"


def save_checkpoint(path: Path, model: nn.Module, controller: Any, optimizers: Any, facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint; it appears whole or not at all.

    :param path: of the file.
    :param model: its ``state_dict`` holds masks too.
    :param controller: its compression state goes along.
    :param optimizers: a list.
    :param facts: ``epoch``, ``best_metric_val``, ``current_val_metric_value``.
    """
    content = {
        **facts,
        "state_dict": model.state_dict(),
        "compression_state": controller.get_compression_state(),
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
    }
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(
    path: Path, model: nn.Module, controller: Any, load: Callable[[nn.Module, Any], Any] | None
) -> None:
    """Puts model and masks back to a checkpoint, in place.

    :param path: of the file, which cannot run code: only plain values and tensors are read.
    :param model: under compression, or in a wrapper for several devices.
    :param controller: its masks go back to those of the checkpoint.
    :param load: the script's own way to load, ``(model, path)``; it need not know of masks.
    :raises CompactPruneError: the file is gone, or not whole.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        msg = f"{path}: the best checkpoint of this training cannot be read: {error}. Leave its directory as it is."
        raise CompactPruneError(msg) from error
    controller.load_state(content["compression_state"])
    if load is not None:
        load(model, path)
    else:
        model.load_state_dict(content["state_dict"])
