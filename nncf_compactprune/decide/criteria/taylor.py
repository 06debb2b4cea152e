"""The Taylor criterion: what the loss changes, to first order, when a channel goes. Needs labelled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.channels import ChannelGroup, Member
from nncf_compactprune.decide.labelled import checked_labels, class_scores
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.plugins.hookspecs import Importance, hookimpl

REMEDY = "Give a train_loader of (inputs, labels)."


def taylor(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> Tensor:
    """``(Σ w·∂L/∂w)²`` over what scales a channel (Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", eq. 8): over the normalisation's scale and shift where the group has one (their "gate"), else over the
    producing filters. Summed over the members of a coupled group.

    :param parameters: tensors that carry a gradient in ``.grad``, as :func:`with_gradients` gives them.
    :raises DataError: they carry none.
    """
    gates = [m for m in group.with_role("norm") if not m.is_buffer]
    members = gates or [m for m in group.with_role("out") if not m.is_buffer] or list(group.members)
    if gates:
        layers: dict[str, list[Member]] = {}
        for member in gates:
            layers.setdefault(member.parameter.rpartition(".")[0], []).append(member)
        parts = [sum((_change(m, parameters) for m in layer), torch.zeros(())) for layer in layers.values()]
    else:
        parts = [_change(member, parameters) for member in members if not member.is_buffer]
    return torch.stack([part.square() for part in parts]).sum(0).float()


taylor.needs_gradients = True  # type: ignore[attr-defined]


def _change(member: Member, parameters: Mapping[str, Tensor]) -> Tensor:
    """``Σ w·∂L/∂w`` over each channel's part of one parameter, ``[channels]``."""
    weight = parameters[member.parameter]
    if weight.grad is None:
        msg = f"importance 'taylor': no gradient of '{member.parameter}'. {REMEDY}"
        raise DataError(msg)
    product = (weight.detach() * weight.grad).double().cpu()
    rows = product.movedim(member.dim, 0).reshape(weight.shape[member.dim], -1).sum(1)
    return rows[torch.as_tensor(member.indices)].sum(1)


def with_gradients(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> dict[str, Tensor]:
    """A model's tensors by name, floating ones with the gradient of the mean cross-entropy over all batches in
    ``.grad``: views of the parameters, whose own gradients are left alone.

    The model runs in eval mode. Frozen parameters have gradients here too.

    :param batches: model inputs with labels.
    :raises DataError: no batch, no labels, or labels that are no class indices.
    """
    tensors = model_tensors(model)
    parameters = {name: p for name, p in tensors.parameters.items() if p.is_floating_point()}
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    samples = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for inputs, labels in batches:
            with evaluating(model), torch.enable_grad():
                scores = class_scores(call_model(model, inputs))
                wanted = checked_labels(labels, scores.shape[1]).to(scores.device)
                loss = nn.functional.cross_entropy(scores.float(), wanted, reduction="sum")
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
            samples += len(wanted)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not samples:
        msg = f"importance 'taylor': needs gradients of labelled samples, but there are none. {REMEDY}"
        raise DataError(msg)
    result = {name: tensor.detach() for name, tensor in tensors.all().items()}
    for name, total in sums.items():
        result[name].grad = total / samples
    return result


def needs_gradients(criterion: Callable[..., Tensor]) -> bool:
    """Whether a criterion reads ``parameters[name].grad``: it says so by an attribute ``needs_gradients = True``."""
    return bool(getattr(criterion, "needs_gradients", False))


@hookimpl
def compactprune_importance() -> Mapping[str, Importance]:
    """Offers :func:`taylor`."""
    return {"taylor": taylor}
