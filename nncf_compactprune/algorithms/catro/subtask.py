"""Pruning for some of the classes: the classifier keeps their rows, and labels are counted anew."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.base import TARGET_KEYS, model_inputs, targets
from nncf_compactprune.channels import ChannelGraph, trace
from nncf_compactprune.cut.surgery import cut
from nncf_compactprune.cut.transaction import transaction
from nncf_compactprune.decide.labelled import checked_labels, output_classes, taken
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.plan import Cost, PruningPlan
from nncf_compactprune.plugins import Plugins


class ClassSubset:
    """The batches of a loader with only the samples of some classes, labels counted from 0 in ascending order of the
    classes: what a model is trained and measured with whose classifier was cut to them.

    :param batches: ``(inputs, labels)`` or dicts with a label key; iterated anew each time.
    :param classes: class indices, such as a plan's ``output_classes``.
    """

    def __init__(self, batches: Iterable[Any], classes: Sequence[int]) -> None:
        self._batches = batches
        self._classes = torch.tensor(output_classes(classes))

    def __iter__(self) -> Iterator[Any]:
        """Batches of the same kind; those without a sample of the classes are left out."""
        for batch in self._batches:
            labels = checked_labels(targets(batch), torch.iinfo(torch.int64).max, "ClassSubset").cpu()
            hit = labels[:, None] == self._classes
            chosen = hit.any(1).nonzero().ravel()
            if not len(chosen):
                continue
            inputs, renamed = taken(model_inputs(batch), chosen, len(labels)), hit[chosen].int().argmax(1)
            if isinstance(batch, Mapping):
                key = next(key for key in TARGET_KEYS if key in batch)
                yield {**inputs, key: renamed}
            else:
                yield inputs, renamed


def with_classifier_cut(
    plan: PruningPlan,
    model: nn.Module,
    graph: ChannelGraph,
    classes: Sequence[int],
    example_inputs: Any,
    plugins: Plugins,
) -> PruningPlan:
    """The plan that also cuts the layers whose outputs are the model's scores down to some classes.

    :param plan: the plan to extend.
    :param model: the dense model.
    :param graph: the dense model's channels.
    :param classes: ascending.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param plugins: where rules come from.
    :raises CompactPruneError: the scores do not come straight from linear layers or convolutions.
    """
    outputs = {p.name for p in graph.pinned if p.reason == "model output"}
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in outputs and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    kept: dict[str, dict[int, tuple[int, ...]]] = {name: dict(dims) for name, dims in plan.kept.items()}
    for name, layer in layers.items():
        if layer.weight.shape[0] <= max(classes):
            continue
        for leaf, tensor in layer.named_parameters(prefix=name, recurse=False):
            if isinstance(tensor, Tensor) and leaf in graph.parameters:
                kept.setdefault(leaf, {})[0] = tuple(classes)
    if not any(dims.get(0) == tuple(classes) for dims in kept.values()):
        msg = (
            f"params.classes: the classifier of {type(model).__name__} cannot be cut: its scores do not come straight "
            f"from a linear layer or a convolution ({', '.join(sorted(outputs)) or 'none found'})."
        )
        raise CompactPruneError(msg)
    draft = dataclasses.replace(plan, kept=kept, output_classes=tuple(classes))
    small = copy.deepcopy(model)
    with transaction() as log:
        cut(log, small, draft, plugins=plugins)
    after = trace(small, example_inputs, plugins=plugins)
    return dataclasses.replace(draft, after=Cost(after.macs, after.params))
