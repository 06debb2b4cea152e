"""Pruned models on disk: weights as safetensors, the plan as JSON, and nothing that can run code.

``model.safetensors`` holds parameters and persistent buffers of the cut model under the names of the dense one, shared
tensors once; of a quantized model its quantizers too, whose places are in the file's header. ``plan.json`` turns a
freshly built dense model into the one that the weights fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import cut
from nncf_compactprune.cut.transaction import transaction
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.calls import in_dict
from nncf_compactprune.host.stored_quantizers import read_hooks, stored_hooks
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.plan.reading import shown
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.storage.plan_file import NEXT_PLAN_FILE, PLAN_FILE, plan_digest, plan_for_weights, plan_to_save
from nncf_compactprune.storage.weights import (
    QUANTIZERS,
    names_of_quantizers,
    opened_weights,
    persistent_tensors,
    placed,
    stored_names,
    write_tensors,
)
from nncf_compactprune.storage.writing import whole_files

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PLAN_DIGEST = "plan_sha256"
PathLike = str | os.PathLike[str]


def save_pruned(model: nn.Module, directory: PathLike, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes a model and the plan that made it, for :func:`load_pruned`.

    A save that is killed at any moment leaves a checkpoint that loads, the previous one or the new one. (It may also
    leave a ``.tmp`` file, which nothing reads.)

    :param model: a pruned model, or a dense one: its plan then keeps everything, and states no MACs. A model that was
        quantized by this package and stripped is kept with its quantizers.
    :param directory: is created if it does not exist.
    :param config: a JSON document to keep beside the model, as ``config.json``; replaced after the model.
    :return: the directory.
    :raises CompactPruneError: the model is in a state that weights and plan cannot hold (NNCF hooks, extra state,
        tensors without data, a shape that its plan did not make).
    :raises StorageError: the directory cannot be written. The previous checkpoint is as it was.
    """
    folder = Path(directory)
    quantizers = stored_hooks(model)
    if quantizers is None:
        _refuse_hooks(model)
    tensors = persistent_tensors(model)
    plan = plan_to_save(model)
    text = plan.to_json().encode() + b"\n"
    header = {"format": "pt", PLAN_DIGEST: plan_digest(text)}
    if quantizers is not None:
        header[QUANTIZERS] = json.dumps(quantizers[0])
        tensors |= quantizers[1]
    document = None if config is None else _config_text(config)
    # The new plan lies ready before the weights that need it; replacing the weights is the moment of change.
    with whole_files(folder, [NEXT_PLAN_FILE, WEIGHTS_FILE, PLAN_FILE, CONFIG_FILE]) as new:
        write_tensors(new / WEIGHTS_FILE, tensors, header)
        (new / NEXT_PLAN_FILE).write_bytes(text)
        (new / PLAN_FILE).write_bytes(text)
        if document is not None:
            (new / CONFIG_FILE).write_bytes(document)
    with suppress(OSError):  # does no harm
        (folder / NEXT_PLAN_FILE).unlink(missing_ok=True)
    return folder


def load_pruned(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    directory: PathLike,
    *,
    strict: bool = True,
    example_inputs: Any = None,
    plugins: Plugins | None = None,
) -> nn.Module:
    """Cuts a dense model to a saved plan and loads its weights, in place. The model is in evaluation mode afterwards.

    Plan and weights may come from anyone: all of both is checked before the model is touched. What cannot be told
    without running the model is whether layers still fit each other; give ``example_inputs`` to have that proven.

    .. code-block:: python

        model = load_pruned(lambda: timm.create_model("resnet50"), "out/resnet50")

    :param model_or_factory: the dense model as it was before any pruning (same architecture, options and dtype), or
        what builds it. Parameters keep their identity; device and memory format stay.
    :param directory: what :func:`save_pruned` wrote.
    :param strict: whether the file must hold exactly the model's tensors. Otherwise missing ones keep the values the
        model came with, cut, and unknown ones are passed over; shapes and dtypes must fit in any case.
    :param example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. With it, the cut model must run
        and compute what the masked dense model computes with the same weights, as after any pruning.
    :param plugins: where facts of modules come from; the installed plugins by default.
    :return: the model, in evaluation mode.
    :raises PlanError: no plan, or one that is malformed, made for another model, or does not fit together.
    :raises SelfCheckError: with ``example_inputs``, the cut model does not run or computes something else.
    :raises CompactPruneError: weights that are missing, damaged, or of other names, shapes or dtypes. After any of
        these errors a model that was passed is bit for bit what it was.
    """
    model = _dense_model(model_or_factory)
    _refuse_hooks(model)
    tensors = persistent_tensors(model)
    folder = Path(directory)
    with opened_weights(folder / WEIGHTS_FILE) as file:
        header = file.metadata() or {}
        plan = plan_for_weights(folder, model, header.get(PLAN_DIGEST))
        put_on_quantizers = _read_quantizers(file, folder / WEIGHTS_FILE, header)
        stored = stored_names(file, folder / WEIGHTS_FILE, model, plan, tensors, strict=strict)
        loaded = {name: file.get_tensor(key) for name, key in stored.items()}
    with transaction() as log:
        if example_inputs is None:
            cut(log, model, plan, plugins=plugins)
            # Copied: the memory of what was loaded is the file's own, and follows later changes of it.
            for name, value in loaded.items():
                log.set_data(tensors[name], torch.empty_like(tensors[name].data).copy_(value))
        else:
            for name, value in loaded.items():
                log.set_data(tensors[name], placed(tensors[name].data, plan.selection(name), value))
            prune_in_place(model, plan, in_dict(example_inputs), plugins=plugins)
    if put_on_quantizers is not None:
        put_on_quantizers(model)
    return model.eval()


def is_quantized_checkpoint(directory: PathLike) -> bool:
    """Whether a checkpoint holds a quantized network.

    :param directory: what :func:`save_pruned` wrote.
    :raises CompactPruneError: its weights are missing or damaged.
    """
    with opened_weights(Path(directory) / WEIGHTS_FILE) as file:
        return QUANTIZERS in (file.metadata() or {})


def _read_quantizers(file: Any, path: Path, header: Mapping[str, str]) -> Callable[[nn.Module], None] | None:
    """What puts the quantizers of a checkpoint on a model; None where it has none.

    :raises CompactPruneError: what the file says of them does not fit together.
    """
    if QUANTIZERS not in header:
        return None
    tensors = {name: file.get_tensor(name).clone() for name in names_of_quantizers(file)}
    try:
        return read_hooks(json.loads(header[QUANTIZERS]), tensors)
    except (ValueError, RecursionError) as error:
        msg = f"{path}: what it says of its quantizers does not fit together ({shown(str(error))}). Copy it again."
        raise CompactPruneError(msg) from error


def _dense_model(model_or_factory: Any) -> nn.Module:
    model = model_or_factory
    if callable(model) and not isinstance(model, nn.Module):
        model = model()
    if not isinstance(model, nn.Module):
        msg = f"load_pruned: expected a torch.nn.Module or a function that builds one, got {type(model).__name__}."
        raise CompactPruneError(msg)
    return model


def _refuse_hooks(model: nn.Module) -> None:
    if carries_hooks(model):
        msg = (
            f"checkpoint: {type(model).__name__} carries NNCF hooks (masks, quantizers or re-parameterised weights), "
            "which plan and weights do not hold. Strip it first (nncf.strip or controller.strip())."
        )
        raise CompactPruneError(msg)


def _config_text(config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(dict(config), indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"save_pruned: config: expected a JSON document, got one with a value that is none: {error}."
        raise CompactPruneError(msg) from error
