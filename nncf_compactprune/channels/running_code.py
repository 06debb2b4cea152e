"""The code that runs while a model is traced: its line, and the numbers of its modules that it reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from nncf_compactprune.channels.terms import COUNTING_ATTRIBUTES, AttributeValue, width_of

_TORCH_ROOT = os.path.dirname(torch.__file__) + os.sep
_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OWN_NETWORKS = os.path.join(_PACKAGE_ROOT, "run", "networks") + os.sep


class Number(NamedTuple):
    """A number, or several, that a module keeps and that the running code reads by name."""

    module: str
    attribute: str
    value: AttributeValue


def user_location(depth: int) -> str:
    """The innermost line of code outside torch and this package that is running, ``depth`` frames up or more."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if _is_user_code(frame):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def numbers_in_code(names: Mapping[int, str]) -> list[Number]:
    """What the code of the innermost running module reads from modules at hand and could be a count of channels.

    A count of heads is left out: :meth:`~nncf_compactprune.channels.tracer.Tracer.head_axis` knows what it counts.

    :param names: names of the model's modules, by ``id``.
    """
    return [
        Number(name, attribute, value)
        for name, module, attribute in dict.fromkeys(_read_by_code(names))
        if attribute not in COUNTING_ATTRIBUTES
        if (value := width_of(module, attribute)) is not None
    ]


def _read_by_code(names: Mapping[int, str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules in local variables, each with every name that the same code speaks of."""
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None:
        if _is_user_code(frame):
            inside = True
            for held in frame.f_locals.values():
                if isinstance(held, nn.Module) and id(held) in names:
                    yield from ((names[id(held)], held, attribute) for attribute in frame.f_code.co_names)
        elif inside and frame.f_code.co_filename == torch_module.__file__:
            return  # another module called this one
        frame = frame.f_back


def _is_user_code(frame: FrameType) -> bool:
    filename = frame.f_code.co_filename
    return not filename.startswith((_TORCH_ROOT, _PACKAGE_ROOT, "<")) or filename.startswith(_OWN_NETWORKS)
