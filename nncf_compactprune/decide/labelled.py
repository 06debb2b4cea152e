"""A few labelled samples of every class, taken from a loader in its order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import call_model, has_rows, with_rows
from nncf_compactprune.host.distributed import summed
from nncf_compactprune.host.torch_internals import results_of, tree_map


def output_classes(classes: Iterable[int]) -> tuple[int, ...]:
    """The order of the outputs of a model that was cut to some classes: ascending, however they were named.

    >>> output_classes([8, 3])
    (3, 8)
    """
    return tuple(sorted(classes))


def class_scores(output: Any) -> Tensor:
    """Returns the scores ``[n, classes]`` in a classifier's output: the output itself, what it calls ``logits``, or its
    first tensor."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else next(iter(results_of(output)), output)


def checked_labels(labels: Any, classes: int, where: str = "train_loader") -> Tensor:
    """Labels as a vector of class indices, ``[n]``, int64.

    :param labels: a tensor or a sequence; ``[n]`` or ``[n, 1]``, integers in [0, classes).
    :param classes: the model's number of classes.
    :param where: what to call the labels in messages.
    :raises DataError: there are none, they are no integers, of another shape, or out of range.
    """
    if labels is None:
        msg = f"{where}: batches hold no labels. Give (inputs, labels) or a dict with a key such as 'labels'."
        raise DataError(msg)
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"{where}: expected labels as integer class indices, got {type(labels).__name__}."
        raise DataError(msg) from error
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        msg = (
            f"{where}: expected integer class indices as labels, got {values.dtype}. Turn soft or one-hot labels "
            "into indices first (labels.argmax(1))."
        )
        raise DataError(msg)
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dim() != 1:
        msg = f"{where}: expected one label a sample, shape [n], got {list(values.shape)}."
        raise DataError(msg)
    values = values.long()
    outside = values[(values < 0) | (values >= classes)]
    if len(outside):
        msg = f"{where}: label {int(outside[0])} is out of range: the model has {classes} classes, 0 to {classes - 1}."
        raise DataError(msg)
    return values


def scored(model: nn.Module, inputs: Any, labels: Any, where: str = "train_loader") -> tuple[Tensor, Tensor]:
    """Runs a classifier on labelled samples.

    :param model: in the mode that it is in.
    :param inputs: as it is called.
    :param labels: see :func:`checked_labels`.
    :param where: what asks for them, in messages.
    :return: class scores ``[n, classes]``, and labels ``[n]`` on their device.
    :raises DataError: the model gives no such scores, or labels are wrong.
    """
    scores: Any = class_scores(call_model(model, inputs))
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        msg = (
            f"{where}: labels are compared with class scores of shape [n, classes], but {type(model).__name__} gives "
            f"{got}. Choose what needs no labels."
        )
        raise DataError(msg)
    return scores, checked_labels(labels, scores.shape[1], where).to(scores.device)


class FewPerClass:
    """The first samples of every class that a loader gives, batch by batch.

    :param batches: pairs of model inputs and labels.
    :param classes: the model's number of classes.
    :param samples: how many of each class, at most; of each process where several run.
    :param wanted: the classes that count, default: all.
    """

    def __init__(
        self, batches: Iterable[tuple[Any, Any]], classes: int, samples: int, wanted: Sequence[int] | None = None
    ) -> None:
        self._batches = batches
        self._classes = classes
        self._limit = torch.zeros(classes, dtype=torch.int64)
        self._limit[list(range(classes)) if wanted is None else list(wanted)] = samples
        self._required = wanted is not None
        self.count = torch.zeros(classes, dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels of the samples that were chosen, in the loader's order.

        :raises DataError: wrong labels, no sample at all, or fewer than two classes; also where a class that was asked
            for is missing. Other missing classes are told in a warning.
        """
        for inputs, labels in self._batches:
            if not (self.count < self._limit).any():
                break
            values = checked_labels(labels, self._classes)
            chosen = self._chosen(values.cpu())
            if len(chosen):
                yield taken(inputs, chosen, len(values)), values[chosen.to(values.device)]
        self._check_classes()

    def _chosen(self, labels: Tensor) -> Tensor:
        chosen = []
        for at, label in enumerate(labels.tolist()):
            if self.count[label] < self._limit[label]:
                self.count[label] += 1
                chosen.append(at)
        return torch.tensor(chosen, dtype=torch.int64)

    def _check_classes(self) -> None:
        (total,) = summed([self.count])
        missing = ((total == 0) & (self._limit > 0)).nonzero().ravel().tolist()
        if int((total > 0).sum()) < 2 or (missing and self._required):
            msg = (
                f"train_loader: found samples of {int((total > 0).sum())} classes, none of {_listed(missing)}. Classes "
                "are told apart by samples of each: give a loader with all of them."
            )
            raise DataError(msg)
        if missing:
            nncf_logger.warning(
                "The training loader holds no sample of %s: channels are chosen for the others.",
                _listed(missing),
            )


def _listed(classes: Sequence[int]) -> str:
    shown = ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
    return f"class {shown}" if len(classes) == 1 else f"classes {shown}"


def taken(inputs: Any, chosen: Tensor, samples: int) -> Any:
    """The chosen samples of every tensor with one row a sample.

    :param inputs: any nesting of tensors; those without a row a sample are passed on.
    :param chosen: positions of the samples, ``[chosen]``.
    :param samples: how many there are.
    :return: the same nesting.
    :raises DataError: inputs and labels differ in number.
    """
    leaves = with_rows(inputs)
    if not any(len(leaf) == samples for leaf in leaves):
        shapes = [list(leaf.shape) for leaf in leaves]
        msg = f"train_loader: {samples} labels for inputs of shapes {shapes}. Expected one label for each sample."
        raise DataError(msg)

    def take(leaf: Any) -> Any:
        return leaf[chosen.to(leaf.device)] if has_rows(leaf, samples) else leaf

    return inputs if len(chosen) == samples else tree_map(take, inputs)
