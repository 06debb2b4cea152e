"""What flows through a network's layers, sample by sample: inputs, and what the loss says of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.decide.labelled import class_scores, scored
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import Convolution, RunningNorm, TransposedConvolution

LAST = (nn.Linear, nn.LayerNorm)  # channels are the last dimension
SECOND = (Convolution, RunningNorm, nn.GroupNorm)
Rows = Mapping[str, Tensor]


def reads_plainly(module: nn.Module) -> bool:
    """Whether position i of the weight's input dimension reads channel i: linear layers, convolutions of one group."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, Convolution) and not isinstance(module, TransposedConvolution) and module.groups == 1
    )


def writes_plainly(module: nn.Module) -> bool:
    """Whether position i of the weight's first dimension is channel i of the output."""
    return isinstance(module, LAST + SECOND) and not isinstance(module, TransposedConvolution)


def input_squares(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Sum of squares of every input channel of linear layers and convolutions, by module name, ``[samples, channels]``.

    :param model: runs in eval mode.
    :param batches: model inputs; labels are not looked at.
    :raises DataError: there is no batch.
    """
    found: dict[str, list[Tensor]] = {}
    for inputs, _ in batches:
        seen: dict[str, list[Tensor]] = {}
        with _watched(model, reads_plainly, inputs_to=seen), evaluating(model):
            samples = _samples(call_model(model, inputs))
        _add(found, {name: [x.square() for x in each] for name, each in seen.items()}, model, samples)
    return _joined(found, "samples")


def output_changes(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """``Σ z·∂L/∂z`` over the positions of every output channel, by module name, ``[samples, channels]``: to first
    order, by how much a sample's cross-entropy falls when the channel becomes zero.

    :param model: a classifier; runs in eval mode.
    :param batches: model inputs with labels.
    :raises DataError: no batch, no labels, or labels that are no class indices.
    """
    found: dict[str, list[Tensor]] = {}
    for inputs, labels in batches:
        seen: dict[str, list[Tensor]] = {}
        with _watched(model, writes_plainly, outputs_to=seen), evaluating(model), torch.enable_grad():
            scores, wanted = scored(model, inputs, labels)
            loss = nn.functional.cross_entropy(scores.float(), wanted, reduction="sum")
            outputs = [z for each in seen.values() for z in each]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        products = {name: [_product(z, next(gradients)) for z in each] for name, each in seen.items()}
        _add(found, products, model, len(wanted))
    return _joined(found, "labelled samples")


def _product(z: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(z) if gradient is None else z.detach() * gradient


@contextmanager
def _watched(
    model: nn.Module,
    fits: Callable[[nn.Module], bool],
    inputs_to: dict[str, list[Tensor]] | None = None,
    outputs_to: dict[str, list[Tensor]] | None = None,
) -> Iterator[None]:
    """Keeps what layers take or give, as it is then: operations in place may follow."""

    def before(name: str, args: tuple[Any, ...]) -> None:
        if inputs_to is not None and args and isinstance(args[0], Tensor):
            inputs_to.setdefault(name, []).append(args[0].detach().clone())

    def after(name: str, output: Any) -> Any:
        if outputs_to is None or not isinstance(output, Tensor):
            return output
        kept = output if output.requires_grad else output.detach().requires_grad_()
        outputs_to.setdefault(name, []).append(kept)
        return kept.clone()

    handles = []
    for name, module in named_modules(model):
        if fits(module):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: after(name, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _samples(scores: Any) -> int:
    return len(class_scores(scores))


def _add(found: dict[str, list[Tensor]], seen: Mapping[str, list[Tensor]], model: nn.Module, samples: int) -> None:
    """Adds a batch, summed over positions. A layer whose first dimension does not hold the samples is left out."""
    modules = dict(named_modules(model))
    for name, each in seen.items():
        axis = -1 if isinstance(modules[name], LAST) else 1
        if all(len(values) % samples == 0 for values in each):
            rows = [v.movedim(axis, -1).reshape(samples, -1, v.shape[axis]).sum(1) for v in each]
            found.setdefault(name, []).append(torch.stack(rows).sum(0))


def _joined(found: Mapping[str, list[Tensor]], what: str) -> dict[str, Tensor]:
    if not found:
        msg = f"the criterion looks at {what}, but there are none. Give a train_loader of (inputs, labels)."
        raise DataError(msg)
    return {name: torch.cat(rows).double().cpu() for name, rows in found.items()}
