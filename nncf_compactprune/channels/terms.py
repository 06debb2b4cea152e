"""What a trace notes beside labels: terms of the cost, and numbers that modules keep about their channels."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import nn

from nncf_compactprune.channels.labels import LabelArray

HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head", "heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "key_dim")
HEAD_PRODUCTS = ("attn_dim", "all_head_size", "inner_dim", "nh_kd")
COUNTING_ATTRIBUTES = frozenset((*HEAD_COUNTS, *HEAD_PRODUCTS))
GEOMETRY = ("stride", "kernel", "pad", "dilation", "patch", "ratio", "factor", "reduction")  # never count channels
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)

UNFLATTENED = "unflattened_size"  # of nn.Unflatten

AttributeValue: TypeAlias = int | tuple[int, ...]
"""What a module keeps about its channels: a number, or one for each part of a split."""


def width_of(module: nn.Module, attribute: str) -> AttributeValue | None:
    """The value of an attribute that may say how many channels something has, a list as a tuple; None where it cannot.

    The numbers of torch's own layers follow from their weights, so they are not asked. Nor are properties, private
    names, and names of geometry (a smaller stride makes a larger image).

    :param module: any.
    :param attribute: the attribute's name.
    """
    if attribute.startswith("_") or any(word in attribute for word in GEOMETRY):
        return None
    bases = type(module).__mro__
    if any(base.__module__.startswith("torch.nn.") and base not in _CONTAINERS for base in bases):
        return None
    value = vars(module).get(attribute)
    if value is None:
        value = inspect.getattr_static(type(module), attribute, None)
    if type(value) in (list, tuple) and value and all(type(entry) is int for entry in value):
        return tuple(value)
    return value if type(value) is int else None


def unflattened(module: nn.Unflatten) -> tuple[int, ...] | None:
    """The sizes that an ``nn.Unflatten`` makes of one dimension, where it names them all.

    :param module: any.
    """
    sizes = tuple(module.unflattened_size)
    return tuple(map(int, sizes)) if all(isinstance(size, int) and size > 0 for size in sizes) else None


def goes_by_groups(groups: int, inputs: int, outputs: int) -> bool:
    """Whether whole groups of a convolution go: where a group has one input, or makes one channel of several. In other
    grouped convolutions, all groups lose the same positions. One channel of many is such, too: few groups would go.

    :param groups: of the convolution.
    :param inputs: its input channels.
    :param outputs: its output channels.
    """
    return groups > 1 and (inputs == groups or (outputs == groups and inputs // groups <= groups))


@dataclass(frozen=True)
class AttributeTerm:
    """A number that a module keeps about its channels and that parameters do not show, or a list of numbers.

    :param module: name of the module.
    :param attribute: the attribute's name.
    :param unit: what one kept channel counts.
    :param labels: the channels.
    :param entries: the list, one run of ``labels`` an entry; empty for a number.
    :param fixed: what follows the number in a list and counts no channels, such as height and width; else empty.
    """

    module: str
    attribute: str
    unit: int
    labels: LabelArray
    entries: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()

    @property
    def runs(self) -> list[LabelArray]:
        """The channels that each number counts."""
        return np.split(self.labels, np.cumsum(self.entries)[:-1]) if self.entries else [self.labels]


@dataclass(frozen=True)
class MacTerm:
    """Multiply-accumulates of one operation: ``constant`` times the kept counts of its channel dimensions.

    :param constant: MACs for one kept channel in each of ``dims`` (whole example batch).
    :param dims: label arrays; an unlabelled dimension is already in the constant.
    :param module: name of the module that ran the operation.
    """

    constant: int
    dims: tuple[LabelArray, ...]
    module: str
