"""Static facts that modules keep about their own shapes, and what they become when parameters are cut.

A facts function receives a module and the new shapes of its own parameters and buffers (``{"weight": (8, 16, 3, 3)}``;
names of uncut tensors are there too) and returns the attributes to set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nncf_compactprune.channels.terms import goes_by_groups
from nncf_compactprune.host.nncf_quantization import SCALES, BaseQuantizer
from nncf_compactprune.host.torch_internals import Convolution, RunningNorm
from nncf_compactprune.plugins.hookspecs import hookimpl

Shapes = Mapping[str, tuple[int, ...]]
Facts = Callable[[nn.Module, Shapes], dict[str, Any]]


def convolution(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``in_channels``, ``out_channels`` and ``groups``; where a group has one channel, the groups shrink along."""
    first, second = shapes["weight"][:2]
    groups = module.groups
    if goes_by_groups(groups, module.in_channels, module.out_channels):
        groups = first // ((module.in_channels if module.transposed else module.out_channels) // groups)
    across = second * groups
    inputs, outputs = (first, across) if module.transposed else (across, first)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def linear(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``in_features`` and ``out_features``."""
    out_features, in_features = shapes["weight"]
    return {"in_features": in_features, "out_features": out_features}


def batch_norm(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``num_features``, from the affine weight or the running statistics."""
    for name in ("weight", "running_mean"):
        if name in shapes:
            return {"num_features": shapes[name][0]}
    return {}


def layer_norm(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``normalized_shape``."""
    return {"normalized_shape": shapes["weight"]} if "weight" in shapes else {}


def group_norm(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``num_channels`` and ``num_groups``; the width of a group stays unless there is one group only."""
    if "weight" not in shapes:
        return {}
    channels = shapes["weight"][0]
    groups = 1 if module.num_groups == 1 else channels // (module.num_channels // module.num_groups)
    return {"num_channels": channels, "num_groups": groups}


def embedding(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``embedding_dim``."""
    return {"embedding_dim": shapes["weight"][1]}


def prelu(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``num_parameters``."""
    return {"num_parameters": shapes["weight"][0]}


def recurrent(module: Any, shapes: Shapes) -> dict[str, Any]:
    """``input_size`` and ``hidden_size``; of one step or of layers over a sequence."""
    level = "" if "weight_ih" in shapes else "_l0"
    return {"input_size": shapes[f"weight_ih{level}"][1], "hidden_size": shapes[f"weight_hh{level}"][1]}


def quantizer(module: Any, shapes: Shapes) -> dict[str, Any]:
    """The shape of the scales, which NNCF keeps beside them; scales of one channel each are cut with their channels."""
    return {"_scale_shape": next(shapes[name] for name in SCALES if name in shapes)}


@hookimpl
def compactprune_module_facts() -> Mapping[type[nn.Module], Facts]:
    """Facts of torch's own layers and NNCF's quantizers; subclasses (timm's, Hugging Face's) inherit them."""
    return {
        Convolution: convolution,
        nn.Linear: linear,
        RunningNorm: batch_norm,
        nn.LayerNorm: layer_norm,
        nn.RMSNorm: layer_norm,
        nn.GroupNorm: group_norm,
        nn.Embedding: embedding,
        nn.PReLU: prelu,
        nn.RNNBase: recurrent,
        nn.RNNCellBase: recurrent,
        BaseQuantizer: quantizer,
    }


def facts_for(module: nn.Module, registry: Mapping[type[nn.Module], Facts]) -> Facts | None:
    """The facts function of the closest base class.

    :param module: any.
    :param registry: facts functions by class.
    :return: the function, or None where no base class has one.
    """
    for base in type(module).__mro__:
        if base in registry:
            return registry[base]
    return None
