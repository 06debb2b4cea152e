"""``accuracy_control``: the layers that cost most accuracy stay in float, as few as hold an allowed drop.

What ``nncf.quantize_with_accuracy_control`` does for OpenVINO and ONNX models, for the torch model: layers are ranked
by what their quantizers alone change at the output, and left out one after the other. Ours: 1, 2, 4 ... layers are
tried, at most all but one, and then the range between the last two is halved, so that the network is quantized about
2 log2(n) times, not n.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.decide.labelled import checked_labels, class_scores
from nncf_compactprune.errors import QuantizationError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.nncf_quantization import not_compiled, quantizers_by_operation, without

RANKING_BATCHES = 2
Batches = Sequence[tuple[Any, Tensor]]


@dataclass(frozen=True)
class Controlled:
    """What was found.

    :param in_float: NNCF's names of the operations that stay in float, those that cost most first.
    :param float_accuracy: of the network before, on the samples.
    :param accuracy: of the quantized network, on the same.
    """

    in_float: tuple[str, ...]
    float_accuracy: float
    accuracy: float


def labelled_samples(context: Context, count: int) -> Batches:
    """The first labelled batches of the training loader, until so many samples are there.

    :param context: with a training loader.
    :param count: how many, at least, where the loader has them.
    :raises DataError: labels are missing, or no classes of the model.
    """
    found: list[tuple[Any, Tensor]] = []
    with evaluating(context.model):
        classes = class_scores(call_model(context.model, context.example_inputs)).shape[-1]
    for inputs, labels in context.labelled_batches():
        found.append((inputs, checked_labels(labels, classes, "accuracy_control").to(context.device)))
        if sum(len(labels) for _, labels in found) >= count:
            break
    return found


def accuracy_on(model: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy in [0, 1].

    :param model: a classifier; runs in evaluation mode.
    :param batches: inputs and classes.
    """
    correct = 0
    with evaluating(model), not_compiled():
        for inputs, labels in batches:
            correct += int((class_scores(call_model(model, inputs)).argmax(1) == labels).sum())
    return correct / max(sum(len(labels) for _, labels in batches), 1)


def control(
    model: nn.Module,
    quantize: Callable[[nn.Module, Sequence[str]], None],
    example_inputs: Any,
    batches: Batches,
    max_drop: float,
) -> Controlled:
    """Finds the layers to leave in float. The model stays as it is: copies are quantized.

    :param model: without hooks.
    :param quantize: quantizes a model in place but for operations of given names.
    :param example_inputs: what NNCF's graph is built with.
    :param batches: inputs and classes.
    :param max_drop: allowed loss of accuracy, in [0, 1).
    :raises QuantizationError: the drop cannot be held with any layer quantized.
    """
    before = accuracy_on(model, batches)
    quantized = copy.deepcopy(model)
    quantize(quantized, ())
    accuracies = {0: accuracy_on(quantized, batches)}
    ranked: list[str] = []

    def holds(count: int) -> bool:
        if count not in accuracies:
            trial = copy.deepcopy(model)
            quantize(trial, ranked[:count])
            accuracies[count] = accuracy_on(trial, batches)
        return before - accuracies[count] <= max_drop + 1e-9

    enough = 0
    if not holds(0):
        ranked += _by_their_effect(model, quantized, example_inputs, batches[:RANKING_BATCHES])
        most = max(len(ranked) - 1, 0)
        few, enough = 0, min(1, most)
        while not holds(enough):
            if enough >= most:
                best = max(accuracies, key=lambda count: accuracies[count])
                msg = (
                    f"'quantization': accuracy_control.max_drop of {max_drop:.2%} cannot be held: {before:.2%} in "
                    f"float, at best {accuracies[best]:.2%} with {best} of {len(ranked)} layers in float. Allow a "
                    "larger drop, train with the quantizers (params.start_epoch), or leave the entry out."
                )
                raise QuantizationError(msg)
            few, enough = enough, min(2 * enough, most)
        while enough - few > 1:
            middle = (few + enough) // 2
            few, enough = (few, middle) if holds(middle) else (middle, enough)
    return Controlled(tuple(ranked[:enough]), before, accuracies[enough])


def _by_their_effect(model: nn.Module, quantized: nn.Module, example_inputs: Any, batches: Batches) -> list[str]:
    """Operations with quantizers, those first that change the output most: how much nearer to the float network's it
    comes without the quantizers of an operation's weight and inputs."""
    with evaluating(quantized):
        met = quantizers_by_operation(quantized, example_inputs)
    of = {name: (*one.weights, *one.activations) for name, one in met.items() if one.weights}

    def scores(network: nn.Module) -> list[Tensor]:
        with evaluating(network), not_compiled():
            return [class_scores(call_model(network, inputs)).float() for inputs, _ in batches]

    wanted = scores(model)

    def distance() -> float:
        return sum(float((a - b).square().mean()) for a, b in zip(scores(quantized), wanted, strict=True))

    rest: dict[str, float] = {}
    for name, keys in of.items():
        with without(quantized, keys), torch.no_grad():
            rest[name] = distance()
    return sorted(rest, key=lambda name: rest[name])
