"""What generation must know of a network: how to call it on what is generated, how many classes it tells apart, and
whether its weights and statistics are any basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nncf
import torch
from torch import Tensor, nn

from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.errors import DataFreeError, UntrainedError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import model_tensors, named_modules
from nncf_compactprune.host.torch_internals import BatchNorm, tensors_of, tree_map
from nncf_compactprune.storage.digests import tensors_digest

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The model's BatchNorm modules with running statistics, by name."""
    return {
        name: module
        for name, module in named_modules(model)
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }


@dataclass(frozen=True)
class SingleInput:
    """How to put one floating tensor into what a network is called with.

    :param example_inputs: as the model is called, with that one tensor in it.
    :param shape: of one example: ``(c, *places)`` of an image, a sound or a film, ``(features,)``.
    :param classes: width of a two-dimensional output; 0 for another kind of network.
    """

    example_inputs: Any
    shape: tuple[int, ...]
    classes: int

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> SingleInput:
        """Looks at a model.

        :param model: it is run once.
        :param example_inputs: as it is called.
        :raises DataFreeError: see :func:`example_shape`.
        """
        shape = example_shape(example_inputs)
        with evaluating(model):
            output = class_scores(call_model(model, example_inputs))
        return cls(example_inputs, shape, output.shape[1] if output.dim() == 2 else 0)

    def wrap(self, examples: Tensor) -> Any:
        """The model's inputs with these examples in them, ``[n, *shape]``, of their dtype."""
        return wrapped(self.example_inputs, examples.to(tensors_of(self.example_inputs)[0].dtype))


def example_shape(example_inputs: Any) -> tuple[int, ...]:
    """The shape of one example of what can be generated.

    :param example_inputs: as a model is called.
    :raises DataFreeError: there is not exactly one tensor in it, or it is not of floats.
    """
    tensors = tensors_of(example_inputs)
    if len(tensors) != 1 or tensors[0].dim() < 2 or not tensors[0].is_floating_point():
        found = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors) or "no tensor"
        msg = (
            f"inputs are generated for networks with one floating tensor [n, ...], but this one takes {found}. "
            'Use "source": "dataset" and give a train_loader.'
        )
        raise DataFreeError(msg)
    return tuple(tensors[0].shape[1:])


def wrapped(example_inputs: Any, examples: Tensor) -> Any:
    """Inputs with another tensor in the place of theirs.

    :param example_inputs: with one tensor.
    :param examples: what takes its place.
    """
    return tree_map(lambda leaf: examples if isinstance(leaf, Tensor) else leaf, example_inputs)


def check_weights(model: nn.Module) -> None:
    """
    :raises DataFreeError: naming the first parameter or statistic that is not finite.
    """
    for name, tensor in model_tensors(model).named():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            msg = f"'{name}': {bad} of {tensor.numel()} values are NaN or infinite. Load weights without such values."
            raise DataFreeError(msg)


def check_statistics(model: nn.Module) -> None:
    """
    :raises DataFreeError: a BatchNorm keeps no running statistics, or all are those of an untrained network.
    """
    missing = [n for n, m in named_modules(model) if isinstance(m, BATCH_NORMS) and m.running_mean is None]
    if missing:
        msg = (
            f"'{missing[0]}': BatchNorm without running statistics (track_running_stats=False), one of {len(missing)}. "
            'Inputs are generated from these statistics. Use "source": "dataset" and give a train_loader.'
        )
        raise DataFreeError(msg)
    norms = batch_norms(model)
    if norms and all(_is_fresh(module) for module in norms.values()):
        msg = (
            f"all {len(norms)} BatchNorms have the statistics of an untrained network (mean 0, variance 1), the "
            f"first is '{next(iter(norms))}'. Load trained weights, running_mean and running_var included."
        )
        raise UntrainedError(msg)


def statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of one of :func:`batch_norms`, each ``[c]``."""
    if norm.running_mean is None or norm.running_var is None:
        msg = "a BatchNorm without running statistics"
        raise nncf.InternalError(msg)
    return norm.running_mean, norm.running_var


def _is_fresh(norm: BatchNorm) -> bool:
    mean, var = statistics(norm)
    return bool((mean == 0).all()) and bool((var == 1).all())


def fingerprint(model: nn.Module, *more: Any) -> str:
    """SHA-256 of all weights and statistics, and of what else a cached result depends on.

    :param model: its counters of batches do not count.
    :param more: values that differ where their ``repr`` does.
    :return: hexadecimal digits.
    """
    counted = {name: tensor for name, tensor in model_tensors(model).named() if "num_batches_tracked" not in name}
    return tensors_digest(counted, repr(more))
