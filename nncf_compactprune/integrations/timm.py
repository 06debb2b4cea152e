"""Pruned timm models on disk: weights and plan, and a ``config.json`` that says how timm builds the dense model and how
its images are prepared."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.storage.checkpoint import CONFIG_FILE, load_pruned, save_pruned


def save_pruned_timm(model: nn.Module, directory: str | PathLike[str], **model_args: Any) -> Path:
    """:func:`nncf_compactprune.save_pruned`, with timm's name of the model and its data config beside it.

    :param model: a pruned model that ``timm.create_model`` built.
    :param directory: is created if it does not exist.
    :param model_args: what ``create_model`` was called with besides the name (``num_classes``, ``in_chans``, ...).
    :return: the directory.
    :raises CompactPruneError: the model is none of timm's, or cannot be saved.
    """
    data_config = getattr(model, "pretrained_cfg", None)
    if not data_config or "architecture" not in data_config:
        msg = f"{type(model).__name__}: expected a model of timm.create_model. Use save_pruned for others."
        raise CompactPruneError(msg)
    described = {key: value for key, value in dict(data_config).items() if value is not None}
    document = {"architecture": described["architecture"], "model_args": model_args, "pretrained_cfg": described}
    return save_pruned(model, directory, config=document)


def load_pruned_timm(directory: str | PathLike[str], *, example_inputs: Any = None) -> nn.Module:
    """``timm.create_model``, cut to the plan, with the weights and the data config of a directory.

    :param directory: what :func:`save_pruned_timm` wrote.
    :param example_inputs: with it, the cut is proven on it, see :func:`nncf_compactprune.load_pruned`.
    :return: the model, in evaluation mode; ``timm.data.resolve_data_config(model=...)`` knows its images.
    :raises CompactPruneError: files are missing, damaged, or do not belong together.
    """
    timm = require_package("timm", "nncf-compactprune[timm]")
    path = Path(directory) / CONFIG_FILE
    try:
        document = json.loads(path.read_bytes())
        name, model_args, data_config = (document[key] for key in ("architecture", "model_args", "pretrained_cfg"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path}: expected what save_pruned_timm wrote ({error!r})."
        raise CompactPruneError(msg) from error
    if not isinstance(name, str) or not timm.is_model(name):
        msg = f"{path}: timm {timm.__version__} has no model {name!r}. Install the version that it was saved with."
        raise CompactPruneError(msg)
    # JSON knows no tuples, timm's data config no lists.
    data_config = {key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()}
    model: nn.Module = timm.create_model(name, pretrained_cfg=data_config, **model_args)
    return load_pruned(model, directory, example_inputs=example_inputs)
