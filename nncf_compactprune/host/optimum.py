"""What the package takes from the internals of optimum-intel's exporter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from nncf_compactprune.host.packages import require_package

PACKAGE = "optimum-intel"


def is_installed() -> bool:
    """Whether optimum-intel is there."""
    try:
        return find_spec("optimum.intel") is not None
    except ModuleNotFoundError:  # nothing of optimum
        return False


def check_served(model: Any, task: str) -> None:
    """Whether the exporter takes a network, before the long work.

    :param model: of transformers.
    :param task: as optimum names it, such as ``text-generation``.
    :raises ValueError: it does not, under this version of transformers.
    """
    require_package("optimum.exporters.openvino", PACKAGE)  # fills the table
    tasks = require_package("optimum.exporters.tasks", PACKAGE).TasksManager
    try:
        made = tasks.get_exporter_config_constructor(
            "openvino", model, f"{task}-with-past", library_name="transformers"
        )
    except KeyError as error:
        msg = f"it has no {model.config.model_type}."
        raise ValueError(msg) from error
    here = require_package("transformers", PACKAGE).__version__
    oldest, newest = (getattr(made.func, f"{end}_TRANSFORMERS_VERSION", None) for end in ("MIN", "MAX"))
    too_old = oldest is not None and Version(here) < Version(str(oldest))
    if too_old or (newest is not None and Version(here) > Version(str(newest))):
        msg = f"it takes transformers {oldest or ''} to {newest or ''} for it, got {here}."
        raise ValueError(msg)


def export_parts(model: nn.Module, folder: Path, task: str, caches: Sequence[Sequence[Tensor]], **shapes: int) -> None:
    """Lets optimum-intel write a network that generates: its parts as IR, ``config.json``, ``generation_config.json``.

    :param model: of transformers, on the CPU. The exporter changes its config and its mode.
    :param folder: exists.
    :param task: as optimum names it, such as ``text-generation``.
    :param caches: what the model keeps of the past, see :func:`caches_of`.
    :param shapes: of optimum's example inputs, such as ``nb_max_frames``, where its defaults do not fit the model.
    :raises Exception: the exporter's.
    """
    exporter = require_package("optimum.exporters.openvino", PACKAGE)
    with _caches_like(caches):
        exporter.export_from_model(model, folder, task=f"{task}-with-past", preprocessors=[], **shapes)


def caches_of(output: Any) -> list[tuple[Tensor, ...]]:
    """Keys and values that a model of transformers keeps of the past, layer by layer.

    :param output: what the model returns with ``use_cache=True``.
    :return: for each layer keys and values ``[n, heads, tokens, width]``; of a decoder beside an encoder those of its
        own tokens, then those of the encoder. Empty where the model keeps something else, too.
    """
    past = getattr(output, "past_key_values", None)
    parts = [getattr(past, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [_layers(part) for part in ([past] if None in parts else parts)]
    found = [tuple(tensor for part in row for tensor in part) for row in zip(*layers, strict=True)]
    return found if all(isinstance(one, Tensor) and one.dim() == 4 for row in found for one in row) else []


def _layers(cache: Any) -> list[tuple[Any, Any]]:
    if hasattr(cache, "layers"):
        return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return list(zip(getattr(cache, "key_cache", ()), getattr(cache, "value_cache", ()), strict=True))  # before 4.56


@contextmanager
def _caches_like(caches: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """In the body, the exporter traces with caches of a model's own heads and widths. It takes them from the config,
    which knows one number for all layers, where a cut may have left each layer its own."""
    tasks = require_package("optimum.exporters.tasks", PACKAGE).TasksManager
    name = "get_exporter_config_constructor"
    original = vars(tasks)[name]

    def constructor(*args: Any, **kwargs: Any) -> Any:
        made = original.__func__(*args, **kwargs)  # a partial of the class

        def generate_dummy_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = made.func.generate_dummy_inputs(self, *args, **kwargs)
            past = inputs.get("past_key_values") or ()
            if len(past) == len(caches):
                inputs["past_key_values"] = [
                    # Some decoders beside an encoder are traced with the keys and values of their own tokens alone.
                    tuple(_with_widths(dummy, own) for dummy, own in zip(*rows, strict=False))
                    for rows in zip(past, caches, strict=True)
                ]
            return inputs

        kind = type(made.func.__name__, (made.func,), {"generate_dummy_inputs": generate_dummy_inputs})
        return partial(kind, *made.args, **made.keywords)

    setattr(tasks, name, staticmethod(constructor))
    try:
        yield
    finally:
        setattr(tasks, name, original)


def _with_widths(dummy: Tensor, own: Tensor) -> Tensor:
    if dummy.dim() != own.dim():  # of a layout of its own
        return dummy
    rows, _, tokens, _ = dummy.shape
    return torch.rand(rows, own.shape[1], tokens, own.shape[3], dtype=dummy.dtype)
