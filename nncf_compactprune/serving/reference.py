"""What torch computes on real inputs, for files to be compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.export.options import Pixels
from nncf_compactprune.export.prepared import Array, FlatModel, ModelInputs, evaluation_on_cpu, named_outputs
from nncf_compactprune.export.preprocessing import normalised, pictures_of
from nncf_compactprune.host.torch_internals import Convolution, TransposedConvolution

SINGLES = 4  # requests of batch 1 that are compared


@dataclass(frozen=True)
class ServedBatch:
    """One request and what torch answers.

    :param inputs: the request, as torch takes it.
    :param outputs: torch's.
    :param labels: ``[n]``, of its samples; None without labels or where other batches hold these samples.
    """

    inputs: ModelInputs
    outputs: tuple[Array, ...]
    labels: Tensor | None


@dataclass(frozen=True)
class RealInputs:
    """What a file is served where its torch model is not at hand, as a quantized one's is not after its run.

    :param samples: ``[n, ...]``, of a file of one input.
    :param labels: ``[n]``, their classes, or None.
    :param batch_size: of the requests, beside those of one sample.
    """

    samples: Tensor
    labels: Tensor | None
    batch_size: int = 32

    def requests(self, fixed: int | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Samples and their labels, which are None without labels or where other batches hold these samples.

        :param fixed: the only batch size that the file takes; None: single samples first, then larger batches.
        """
        if fixed is None and self.batch_size > 1:
            yield from ((one[None], None) for one in self.samples[:SINGLES])
        size = fixed or self.batch_size
        for start in range(0, len(self.samples), size):
            chunk = self.samples[start : start + size]
            if len(chunk) == size or fixed is None:
                yield chunk, None if self.labels is None else self.labels[start : start + size]


class TorchSide:
    """A torch model on real inputs.

    :param model: the network; it is left as it was.
    :param example_inputs: what it is called with; also the inputs where there are no samples.
    :param samples: ``[n, ...]`` real inputs of a network of one input, or None.
    :param labels: ``[n]``, their classes.
    :param batch_size: of the requests, beside those of one sample.
    :param classes: where only the scores of some outputs count.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        samples: Tensor | None = None,
        labels: Tensor | None = None,
        batch_size: int = 32,
        classes: Sequence[int] = (),
    ) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.samples, self.labels, self.batch_size = samples, labels, batch_size
        self.classes = list(classes)
        #: which output holds the class scores
        self.scores_at = 0
        self._known: dict[tuple[int | None, Pixels | None], list[ServedBatch]] = {}

    @property
    def inputs(self) -> ModelInputs:
        """The example, flat."""
        return ModelInputs.of(self.model, self.example_inputs)

    def batches(self, fixed: int | None, pixels: Pixels | None = None) -> list[ServedBatch]:
        """Requests and answers.

        :param fixed: the only batch size that the file takes; None: single samples first, then larger batches.
        :param pixels: for a file that takes whole pixels: torch is asked about the same ones, normalised like this.
        """
        key = (fixed, pixels)
        if key not in self._known:
            with evaluation_on_cpu(self.model) as model, torch.no_grad():
                flat = FlatModel(model, self.inputs)
                self._known[key] = [
                    self._answered(flat, inputs if pixels is None else _of_whole_pixels(inputs, pixels), labels)
                    for inputs, labels in self._requests(fixed)
                ]
        return self._known[key]

    def widths(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of all convolutions and linear layers, by name."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (Convolution, nn.Linear)):
                shape = tuple(module.weight.shape)
                # A runtime's transposed convolution has torch's layout: [in, out / groups, k, k].
                del_groups = isinstance(module, TransposedConvolution) and module.groups > 1
                if not del_groups:
                    found[f"{name}.weight"] = shape
        return found

    def _requests(self, fixed: int | None) -> Iterator[tuple[ModelInputs, Tensor | None]]:
        if self.samples is None:
            sizes = [fixed] if fixed is not None else [1, max(2, self.inputs.batch_size)]
            yield from ((self.inputs.with_batch(size), None) for size in sizes)
            return
        for chunk, labels in RealInputs(self.samples, self.labels, self.batch_size).requests(fixed):
            yield self._called_with(chunk), labels

    def _called_with(self, samples: Tensor) -> ModelInputs:
        example = self.example_inputs
        if isinstance(example, Mapping):
            return ModelInputs.of(self.model, {**example, **dict.fromkeys(list(example)[:1], samples)})
        return ModelInputs.of(self.model, samples)

    def _answered(self, flat: FlatModel, inputs: ModelInputs, labels: Tensor | None) -> ServedBatch:
        output = flat.call([tensor.clone() for tensor in inputs.tensors])
        tensors = [tensor for _, tensor in named_outputs(output)]
        if labels is not None:
            scores = class_scores(output)
            self.scores_at = next(position for position, tensor in enumerate(tensors) if tensor is scores)
        return ServedBatch(inputs, tuple(tensor.numpy().copy() for tensor in tensors), labels)


def _of_whole_pixels(inputs: ModelInputs, pixels: Pixels) -> ModelInputs:
    return replace(inputs, tensors=tuple(normalised(pictures_of(one, pixels), pixels) for one in inputs.tensors))
