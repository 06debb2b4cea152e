"""BatchNorm statistics of a compressed model, measured anew on training data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nncf.common.logging import nncf_logger

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.errors import DataError, first_line
from nncf_compactprune.host.calls import call_model, count_of, evaluating
from nncf_compactprune.host.distributed import averaged, process_count
from nncf_compactprune.host.nncf_progress import no_bars_in_pipes
from nncf_compactprune.host.nncf_versions import batch_norm_adaptation
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import BatchNorm


def adapt_batch_norm(context: Context, samples: int, *, asked_for: bool = False) -> None:
    """Re-estimates the running statistics of every BatchNorm, through NNCF, in place: they become the means over these
    batches. A BatchNorm's own momentum would leave much of the dense statistics behind a few large batches (0.1 leaves
    two thirds behind four), and all of them where it is 0.

    Nothing happens with 0 samples, without a BatchNorm, or without a training loader.

    :param context: the model and its training loader.
    :param samples: how many examples of the training loader to use, at least.
    :param asked_for: warn where there is no training loader.
    """
    model = context.model
    has_norm = any(isinstance(m, BatchNorm) for _, m in named_modules(model))
    if samples == 0 or not has_norm:
        return
    if context.train_loader is None:
        if asked_for:
            nncf_logger.warning("BatchNorm statistics are not adapted after pruning: no train_loader was given.")
        return
    with context.timed("batchnorm_adaptation"):
        batches = first_batches(context.batches(), samples)
        if not batches:
            nncf_logger.warning("BatchNorm statistics are not adapted after pruning: train_loader gave no batch.")
            return
        with no_bars_in_pipes(), _plain_means(model):
            batch_norm_adaptation(model, batches)
        pool_over_ranks(model)


def check_batch(context: Context) -> None:
    """Runs the network on its training loader's first batch: what cannot be run would be found out behind the cut.

    A loader that gives its batches once is left alone.

    :param context: the model and its training loader.
    :raises DataError: the model does not run on it.
    """
    if context.train_loader is None or isinstance(context.train_loader, Iterator):
        return
    try:
        with torch.random.fork_rng(devices=[]), evaluating(context.model):
            for batch in itertools.islice(context.batches(), 1):
                call_model(context.model, batch)
    except Exception as error:
        msg = (
            f"train_loader: {type(context.model).__name__} does not run on its first batch: {type(error).__name__}: "
            f"{first_line(error)} Batches are (inputs, labels), or dicts of what the network is called with and labels."
        )
        raise DataError(msg) from error


def _norms(model: torch.nn.Module) -> list[Any]:
    """BatchNorms with running statistics."""
    return [m for _, m in named_modules(model) if isinstance(m, BatchNorm) and m.running_mean is not None]


@contextmanager
def _plain_means(model: torch.nn.Module) -> Iterator[None]:
    """Inside, running statistics are means over what comes."""
    norms = [norm for norm in _norms(model) if norm.num_batches_tracked is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.num_batches_tracked.zero_()
    try:
        yield
    finally:
        for norm, momentum, counted in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(counted)


def pool_over_ranks(model: torch.nn.Module) -> None:
    """Mean and variance over the data of all processes: each has seen its own part, all equally much."""
    if process_count() == 1:
        return
    norms = _norms(model)
    means = averaged([norm.running_mean for norm in norms])
    squares = averaged([norm.running_var + norm.running_mean.square() for norm in norms])
    for norm, mean, square in zip(norms, means, squares, strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean.square())


def first_batches(batches: Iterator[Any], samples: int) -> list[Any]:
    """The first batches with at least this many examples in all.

    :param batches: of tensors, examples first.
    :param samples: how many examples are wanted.
    """
    chosen, seen = [], 0
    for batch in batches:
        chosen.append(batch)
        seen += count_of(batch) or 1
        if seen >= samples:
            break
    return chosen
