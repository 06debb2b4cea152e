"""What a masked and a cut network are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nncf_compactprune.host.calls import image_lists, rows_of, with_rows
from nncf_compactprune.host.torch_internals import tensors_of, tree_map

LARGE_IMAGE = 128
PROBED_IMAGE = 96


def check_inputs(example_inputs: Any) -> list[Any]:
    """What a comparison may run on, cheapest first, the example input itself last.

    One example tells as much about channels as many, and every other pixel of a large image as much as all: what
    differs between a masked and a wrongly cut model are channels, at every position. Not every model runs on these, so
    the next one is for when the masked model does not.
    """
    if image_lists(example_inputs):
        return [rows_of(example_inputs, 0, 1), example_inputs]
    tensors = with_rows(example_inputs)
    if not tensors:
        return [example_inputs]
    candidates = [example_inputs]
    batch = len(tensors[0])
    if batch > 1 and all(len(leaf) == batch for leaf in tensors):
        candidates.append(_on_tensors(lambda leaf: leaf[:1], example_inputs, 1))
    smaller = _halved(candidates[-1], LARGE_IMAGE)
    return [*([] if smaller is None else [smaller]), *candidates[::-1]]


@dataclass(frozen=True)
class Trial:
    """What a comparison runs on.

    :param inputs: what both models are called with.
    :param in_pairs: two examples, of which the second gets the noise. Otherwise both models run twice, once with noise.
    """

    inputs: Any
    in_pairs: bool


def trials(example_inputs: Any) -> list[Trial]:
    """What a comparison may run on, cheapest first: two examples, as small as images may be, are enough for all."""
    found = []
    pair = _pair(example_inputs)
    if pair is not None:
        sizes = [pair]
        while (smaller := _halved(sizes[-1], PROBED_IMAGE)) is not None:
            sizes.append(smaller)
        found = [Trial(inputs, in_pairs=True) for inputs in [*sizes[:0:-1][:2], pair]]
    return found + [Trial(inputs, in_pairs=False) for inputs in check_inputs(example_inputs)[-2:]]


def _pair(example_inputs: Any) -> Any:
    """The first two examples, the only one twice; None where the inputs have no leading dimension in common, or are
    pictures each of its own size."""
    tensors = with_rows(example_inputs)
    if image_lists(example_inputs) or not tensors or not len(tensors[0]):
        return None
    if any(len(leaf) != len(tensors[0]) for leaf in tensors):
        return None
    if len(tensors[0]) == 1:
        return _on_tensors(lambda leaf: torch.cat([leaf, leaf]), example_inputs, 1)
    return _on_tensors(lambda leaf: leaf[:2], example_inputs, 1)


def _halved(inputs: Any, least: int) -> Any:
    """Every other row and column of the images among the inputs, None where none has so many pixels a side."""
    images = [leaf for leaf in tensors_of(inputs) if leaf.dim() > 2]
    if len(images) == 1 and images[0].dim() == 4 and min(images[0].shape[2:]) >= least:
        return _on_tensors(lambda leaf: leaf[..., ::2, ::2], inputs, 4)
    return None


def _on_tensors(change: Callable[[Tensor], Tensor], inputs: Any, least_dims: int) -> Any:
    return tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.dim() >= least_dims else leaf, inputs
    )
