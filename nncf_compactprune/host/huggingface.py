"""What the package takes from the internals of transformers and accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nncf_compactprune.host.nncf_hooks import unwrap_if_empty
from nncf_compactprune.host.packages import require_package


def image_classifiers() -> Mapping[str, str]:
    """Model types that transformers classifies images with, and the names of their classes.

    :raises ResolveError: transformers is not installed.
    """
    auto = require_package("transformers.models.auto.modeling_auto", "nncf-compactprune[transformers]")
    return auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES  # type: ignore[no-any-return]


def restore_forward(model: nn.Module) -> None:
    """Takes accelerate's mixed precision off, which an exporter would bake in, and NNCF's empty wrapper below it."""
    original = vars(model).pop("_original_forward", None)
    if original is not None:
        vars(model)["forward"] = original
        unwrap_if_empty(model)
        if getattr(vars(model).get("forward"), "__func__", None) is type(model).forward:
            del vars(model)["forward"]


@contextmanager
def tied(model: Any, tie: Callable[[Any], object]) -> Iterator[None]:
    """Ties a model's weights for the body, as in use. ``from_pretrained`` builds them apart, to fill each of them.

    :param model: a ``PreTrainedModel`` that is being built.
    :param tie: its ``tie_weights``, taken before ``from_pretrained`` replaced it.
    """
    tie(model)
    yield
    for name in getattr(model, "all_tied_weights_keys", ()):
        owner, _, leaf = name.rpartition(".")
        weight = model.get_parameter(name)
        apart = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
        setattr(model.get_submodule(owner), leaf, apart)


def names_in_files(model: nn.Module) -> dict[str, str]:
    """What ``save_pretrained`` calls parameters and buffers, where it is not what the model calls them.

    :param model: a ``PreTrainedModel``. Empty for those of versions before 5, which had no second names.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    names = list(model.state_dict())
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    try:
        saved = revert_weight_conversion(model, numbers)
    except Exception:  # tensors that are taken apart or put together have no second name
        return {}
    found = {names[int(number)]: file for file, number in saved.items() if number.dim() == 0}
    return {name: file for name, file in found.items() if file != name}


#: settings of transformers' configs that no file can follow, and what takes their place: keys and values of the past,
#: which a file that takes none has no use for, and a mixture's experts in turns, whose sizes depend on the values
_IN_FILES = (("use_cache", True, False), ("_experts_implementation", "grouped_mm", "batched_mm"))


@contextmanager
def set_for_files(model: nn.Module) -> Iterator[None]:
    """In the body, a model of transformers computes what it does, in the way that a file can hold."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if config is not None}
    changed = [
        (config, *setting)
        for config in configs.values()
        for setting in _IN_FILES
        if getattr(config, setting[0], None) == setting[1]
    ]
    for config, key, _, value in changed:
        setattr(config, key, value)
    try:
        yield
    finally:
        for config, key, value, _ in changed:
            setattr(config, key, value)
