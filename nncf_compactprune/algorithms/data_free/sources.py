"""Where layer inputs come from: settings, checks, generation with a progress bar and a cache that a killed run goes on
from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from nncf.common.logging import nncf_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nncf_compactprune.algorithms.base import to_device
from nncf_compactprune.algorithms.data_free.generation import Inversion, dead_leaves, invert, labels_in_turn
from nncf_compactprune.algorithms.data_free.network import (
    SingleInput,
    batch_norms,
    check_statistics,
    check_weights,
    example_shape,
    fingerprint,
    wrapped,
)
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.calls import (
    count_of,
    has_rows,
    image_lists,
    one_of,
    rows_of,
    shape_of_one,
    with_rows,
)
from nncf_compactprune.host.nncf_progress import track
from nncf_compactprune.host.tensors import device_of
from nncf_compactprune.host.torch_internals import tensors_of, tree_leaves, tree_map, tree_structure
from nncf_compactprune.storage.writing import write_whole

Source = Literal["inversion", "bn_sampling", "inversion+bn_sampling", "dataset"]
SAMPLES = 512  # inverted ones of 32 x 32 pixels; fewer of larger images, which take as long each as they are large
SMALL = 64 * 64  # places of an example
REAL_SAMPLES, LARGE_REAL_SAMPLES = 2000, 300  # of a loader, small ones and larger ones
BATCH, LEAST_BATCH = 128, 32  # images optimised together, of up to 64 x 64 pixels; never fewer of larger ones
SAMPLED_SHARE = 4  # one re-sampled row for so many inverted images, where both are used


@dataclass(frozen=True)
class LayerInputs:
    """What a network is run on to learn about its layers.

    :param batch: model inputs, as a model is called with. Tensors of as many rows as the first one hold an example a
        row; the others belong to all examples.
    :param resampled: how many of the last examples only start a run whose BatchNorm outputs are drawn anew.
    """

    batch: Any
    resampled: int = 0

    def __len__(self) -> int:
        return count_of(self.batch)

    def rows(self, begin: int, end: int) -> Any:
        """Model inputs with some of the examples.

        :param begin: the first one.
        :param end: one behind the last one.
        """
        return rows_of(self.batch, begin, end)

    def split(self, size: int) -> Iterator[Any]:
        """Model inputs with all of the examples, some at a time.

        :param size: how many.
        """
        for begin in range(0, len(self), size):
            yield self.rows(begin, begin + size)


@dataclass(frozen=True)
class Generation:
    """Settings.

    :param source: see :data:`Source`.
    :param samples: how many inputs; None: 512 of 32 x 32 places, fewer of larger ones, never below 64; of a loader
        2,000 of up to 64 x 64 places and 300 of larger ones.
    :param cache: a safetensors file for inverted images, extended batch by batch; None: none.
    """

    source: Source = "inversion"
    samples: int | None = None
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    cache: str | None = None

    def count(self, shape: Sequence[int]) -> int:
        """Number of inputs.

        :param shape: of one.
        """
        if self.samples is not None:
            return self.samples
        if self.source == "dataset":
            return REAL_SAMPLES if is_small(shape) else LARGE_REAL_SAMPLES
        return min(SAMPLES, max(64, SAMPLES * 32 * 32 // places_of(shape)))


def places_of(shape: Sequence[int]) -> int:
    """How many places an example has: pixels, moments, words.

    :param shape: of one, ``(c, *places)`` or ``(places,)``.
    """
    return math.prod(shape[1:] if len(shape) > 1 else shape)


def is_small(shape: Sequence[int]) -> bool:
    """Whether an example has no more places than a picture of 64 x 64.

    :param shape: of one.
    """
    return places_of(shape) <= SMALL


def check(model: nn.Module, example_inputs: Any, settings: Generation, *, has_data: bool) -> None:
    """Refuses what cannot work, before any work; the model is only looked at.

    :param model: it is not run.
    :param example_inputs: as it is called.
    :param settings: of the generation.
    :param has_data: whether there is a loader.
    :raises DataFreeError: values that are not finite, statistics that are missing or untrained, a source without
        what it needs, inputs of a kind that is not generated.
    """
    check_weights(model)
    if settings.source == "dataset":
        if not has_data:
            msg = 'generation.source is "dataset", but no train_loader was given. Give one, or use "inversion".'
            raise DataFreeError(msg)
        return
    example_shape(example_inputs)
    check_statistics(model)
    if "bn_sampling" in settings.source and not batch_norms(model):
        msg = (
            f'generation.source is "{settings.source}", but {type(model).__name__} has no BatchNorm to draw from. Use '
            '"inversion", which needs only class scores, or "dataset".'
        )
        raise DataFreeError(msg)


def layer_inputs(
    model: nn.Module, example_inputs: Any, settings: Generation, batches: Iterator[Any] | None = None
) -> LayerInputs:
    """Makes the inputs, on the model's device.

    :param model: trained; it is only run.
    :param example_inputs: as it is called.
    :param settings: of the generation.
    :param batches: of the loader, for ``"dataset"``.
    :raises DataFreeError: as :func:`check`; the model is no classifier and has no BatchNorm; the loader holds nothing.
    """
    check(model, example_inputs, settings, has_data=batches is not None)
    device = device_of(model)
    if settings.source == "dataset":
        return LayerInputs(to_device(_from_batches(batches or iter(()), example_inputs, settings), device))
    network = SingleInput.of(model, example_inputs)
    count = settings.count(network.shape)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.source == "bn_sampling":
        return LayerInputs(network.wrap(dead_leaves(count, network.shape, generator).to(device)), count)
    if not batch_norms(model) and network.classes < 2:
        msg = (
            f"{type(model).__name__} has neither BatchNorm statistics nor class scores [n, classes]: nothing in it "
            'tells what its inputs look like. Use "source": "dataset" and give a train_loader.'
        )
        raise DataFreeError(msg)
    images = _inverted(model, network, settings, count, generator).to(device)
    if settings.source == "inversion":
        return LayerInputs(network.wrap(images))
    drawn = dead_leaves(count // SAMPLED_SHARE, network.shape, generator).to(device)
    return LayerInputs(network.wrap(torch.cat([images, drawn])), len(drawn))


def _inverted(
    model: nn.Module, network: SingleInput, settings: Generation, count: int, generator: torch.Generator
) -> Tensor:
    device = device_of(model)
    batch = max(LEAST_BATCH, min(BATCH, BATCH * SMALL // places_of(network.shape)))
    starts = torch.split(dead_leaves(count, network.shape, generator), batch)
    labels: Sequence[Tensor | None] = [None] * len(starts)
    if network.classes > 1:
        labels = torch.split(labels_in_turn(count, network.classes, generator), batch)
    key = fingerprint(model, settings.inversion, settings.seed, count, network.shape, "classes in random order", batch)
    done = _read_cache(settings.cache, key)[: len(starts)]
    missing = list(zip(starts, labels, strict=True))[len(done) :]
    bar: Iterator[Any] = iter(())
    if missing:
        bar = iter(track(range(len(missing) * settings.inversion.steps), description="Generating images"))
    for start, shown in missing:
        tick, shown = partial(next, bar, None), None if shown is None else shown.to(device)
        images = invert(model, network, start.to(device), settings.inversion, labels=shown, on_step=tick)
        done.append(images.cpu())
        if settings.cache is not None:
            tensors = {f"batch_{at}": one.contiguous() for at, one in enumerate(done)}
            write_whole(Path(settings.cache), save(tensors, {"fingerprint": key}))
    next(bar, None)  # lets the bar finish its line
    images = torch.cat(done)
    if not bool(torch.isfinite(images).all()):
        msg = "the generated images are not finite: the network's outputs overflow. Check its weights and statistics."
        raise DataFreeError(msg)
    return images


def _read_cache(path: str | None, key: str) -> list[Tensor]:
    """Batches of an earlier run on the same weights with the same settings; anything else counts as no cache."""
    if path is None or not Path(path).is_file():
        return []
    try:
        with safe_open(path, "pt") as opened:
            if (opened.metadata() or {}).get("fingerprint") != key:
                return []
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return []
    return [tensors[f"batch_{at}"] for at in range(len(tensors))]


def _from_batches(batches: Iterator[Any], example_inputs: Any, settings: Generation) -> Any:
    """The first examples of a loader, as one batch of model inputs."""
    found: list[Any] = []
    left = have = wanted = 0
    for batch in batches:
        inputs = _as_called(batch, example_inputs)
        if not found:
            wanted = settings.count(shape_of_one(inputs))
        if found and _form(inputs) != _form(found[0]):
            left += count_of(inputs)
            continue
        found.append(inputs)
        have += count_of(inputs)
        if have >= wanted:
            break
    if not found:
        msg = 'generation.source is "dataset", but the train_loader holds no batch.'
        raise DataFreeError(msg)
    if left and have < wanted:
        nncf_logger.warning(
            "%d examples of %d are left out, as their shapes differ from the first batch's. Pad all to one shape.",
            left,
            left + have,
        )

    count, is_pictures = count_of(found[0]), one_of(image_lists(found[0]))

    def joined(part: Any, *others: Any) -> Any:
        if is_pictures(part):
            return list(itertools.chain(part, *others))
        return torch.cat([part, *others]) if has_rows(part, count) else part

    return LayerInputs(tree_map(joined, *found, is_leaf=is_pictures)).rows(0, wanted)


def _as_called(batch: Any, example_inputs: Any) -> Any:
    """A batch as the model is called: where that takes one tensor, the batch's first one in its place."""
    if not with_rows(batch):
        msg = f'generation.source is "dataset", but the train_loader gives {type(batch).__name__} without a tensor.'
        raise DataFreeError(msg)
    if len(tensors_of(example_inputs)) != 1 or image_lists(example_inputs):
        return batch
    named = []
    if isinstance(batch, Mapping) and isinstance(example_inputs, Mapping):
        named = tensors_of([batch[key] for key in example_inputs if key in batch])
    return wrapped(example_inputs, (named or tensors_of(batch))[0])


def _form(inputs: Any) -> Any:
    """Kinds and shapes of inputs, without the number of examples."""
    count, is_pictures = count_of(inputs), one_of(image_lists(inputs))

    def form(part: Any) -> Any:
        if is_pictures(part):
            return "pictures", part[0].dtype, len(part[0])
        if isinstance(part, Tensor):
            return part.shape[1:] if has_rows(part, count) else part.shape, part.dtype
        return None

    leaves = tree_leaves(inputs, is_leaf=is_pictures)
    return tree_structure(inputs, is_leaf=is_pictures), [form(part) for part in leaves]
