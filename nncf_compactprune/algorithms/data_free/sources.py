"""Where layer inputs come from: settings, checks, generation with a progress bar and a cache that a killed run goes on
from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.generation import Inversion, dead_leaves, invert, labels_in_turn
from nncf_compactprune.algorithms.data_free.network import (
    ImageNetwork,
    batch_norms,
    check_statistics,
    check_weights,
    fingerprint,
)
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.nncf_progress import track
from nncf_compactprune.host.torch_internals import tree_leaves
from nncf_compactprune.storage.writing import write_whole

Source = Literal["inversion", "bn_sampling", "inversion+bn_sampling", "dataset"]
SAMPLES = 512  # inverted ones of 32 x 32 pixels; fewer of larger images, which take as long each as they are large
REAL_SAMPLES, LARGE_REAL_SAMPLES = 2000, 300  # of a loader, of up to 64 x 64 pixels and of larger ones
BATCH, LEAST_BATCH = 128, 32  # images optimised together, of up to 64 x 64 pixels; never fewer of larger ones
SAMPLED_SHARE = 4  # one re-sampled row for so many inverted images, where both are used


@dataclass(frozen=True)
class LayerInputs:
    """What a network is run on to learn about its layers.

    :param images: model inputs, ``[n, c, h, w]``.
    :param resampled: how many of the last images only start a run whose BatchNorm outputs are drawn anew.
    """

    images: Tensor
    resampled: int = 0


@dataclass(frozen=True)
class Generation:
    """Settings.

    :param source: see :data:`Source`.
    :param samples: how many inputs; None: 512 of 32 x 32 pixels, fewer of larger ones, never below 64; of a loader
        2,000 of up to 64 x 64 pixels and 300 of larger ones.
    :param cache: a safetensors file for inverted images, extended batch by batch; None: none.
    """

    source: Source = "inversion"
    samples: int | None = None
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    cache: str | None = None

    def count(self, shape: tuple[int, int, int]) -> int:
        """Number of inputs for images of a shape."""
        if self.samples is not None:
            return self.samples
        if self.source == "dataset":
            return REAL_SAMPLES if shape[1] * shape[2] <= 64 * 64 else LARGE_REAL_SAMPLES
        return min(SAMPLES, max(64, SAMPLES * 32 * 32 // (shape[1] * shape[2])))


def check(model: nn.Module, settings: Generation, *, has_data: bool) -> None:
    """Refuses what cannot work, before any work; the model is only looked at.

    :param model: it is not run.
    :param settings: of the generation.
    :param has_data: whether there is a loader.
    :raises DataFreeError: values that are not finite, statistics that are missing or untrained, a source without
        what it needs.
    """
    check_weights(model)
    if settings.source == "dataset":
        if not has_data:
            msg = 'generation.source is "dataset", but no train_loader was given. Give one, or use "inversion".'
            raise DataFreeError(msg)
        return
    check_statistics(model)
    if "bn_sampling" in settings.source and not batch_norms(model):
        msg = (
            f'generation.source is "{settings.source}", but {type(model).__name__} has no BatchNorm to draw from. Use '
            '"inversion", which needs only class scores, or "dataset".'
        )
        raise DataFreeError(msg)


def layer_inputs(
    model: nn.Module, network: ImageNetwork, settings: Generation, batches: Iterator[Any] | None = None
) -> LayerInputs:
    """Makes the inputs, on the model's device.

    :param model: trained; it is only run.
    :param network: how to run it.
    :param settings: of the generation.
    :param batches: of the loader, for ``"dataset"``.
    :raises DataFreeError: as :func:`check`; the model is no classifier and has no BatchNorm; the loader holds nothing.
    """
    check(model, settings, has_data=batches is not None)
    count = settings.count(network.shape)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if settings.source == "dataset":
        return LayerInputs(_from_batches(batches or iter(()), count).to(device))
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.source == "bn_sampling":
        return LayerInputs(dead_leaves(count, network.shape, generator).to(device), count)
    if not batch_norms(model) and network.classes < 2:
        msg = (
            f"{type(model).__name__} has neither BatchNorm statistics nor class scores [n, classes]: nothing in it "
            'tells what its inputs look like. Use "source": "dataset" and give a train_loader.'
        )
        raise DataFreeError(msg)
    images = _inverted(model, network, settings, count, generator).to(device)
    if settings.source == "inversion":
        return LayerInputs(images)
    drawn = dead_leaves(count // SAMPLED_SHARE, network.shape, generator).to(device)
    return LayerInputs(torch.cat([images, drawn]), len(drawn))


def _inverted(
    model: nn.Module, network: ImageNetwork, settings: Generation, count: int, generator: torch.Generator
) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    _, height, width = network.shape
    batch = max(LEAST_BATCH, min(BATCH, BATCH * 64 * 64 // (height * width)))
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


def _from_batches(batches: Iterator[Any], count: int) -> Tensor:
    found: list[Tensor] = []
    for batch in batches:
        found += [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)][:1]
        if sum(map(len, found)) >= count:
            break
    if not found:
        msg = 'generation.source is "dataset", but the train_loader holds no batch.'
        raise DataFreeError(msg)
    return torch.cat(found)[:count]
