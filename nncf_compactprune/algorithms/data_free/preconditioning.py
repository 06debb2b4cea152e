"""A network made easier to compress that computes what it did: BatchNorm folding, cross-layer equalisation, bias
absorption.

After Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction". Where one scale holds
for a whole weight, channels of very unlike size cost accuracy; through ReLU, a channel's size can be moved between its
producer and its consumer. Deviations: a folded BatchNorm stays as a shift (its statistics can
follow later changes); ReLU6 gets one limit for each channel, so that the scaled network stays exact, where the paper
replaces it by ReLU; biases are absorbed only by layers without padding, where that is exact up to the tail that
:data:`ABSORBED_SIGMAS` leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.network import statistics
from nncf_compactprune.cut.transaction import Transaction
from nncf_compactprune.decide.scopes import layers_by_operation
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import nncf_graph
from nncf_compactprune.host.tensors import children, named_modules
from nncf_compactprune.host.torch_internals import BatchNorm

ROUNDS = 20  # of equalisation over all pairs, as a chain's pairs pull at each other
ABSORBED_SIGMAS = 3.0
PASSING = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "dropout", "identity"}


class ChannelClip(nn.Module):
    """ReLU6 of a network whose channels were scaled: clips channel c of ``[n, c, ...]`` to [0, limit_c]."""

    def __init__(self, limit: Tensor) -> None:
        super().__init__()
        self.limit: Tensor
        self.register_buffer("limit", limit)

    def forward(self, x: Tensor) -> Tensor:
        """Clips."""
        limit = self.limit.view(1, -1, *(1,) * (x.dim() - 2))
        return torch.minimum(torch.relu(x), limit)


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them but a BatchNorm and a ReLU, each run once.

    :param first: the producer of the channels.
    :param second: their only consumer.
    :param norm: the BatchNorm between, or empty.
    :param clip: the ReLU6 module between, or empty.
    """

    first: str
    second: str
    norm: str = ""
    clip: str = ""


def find_pairs(model: nn.Module, example_inputs: Any) -> list[Pair]:
    """All pairs, in network order; the model is as it was afterwards.

    :param model: without NNCF hooks.
    :param example_inputs: as the model is called.
    """
    with evaluating(model):
        graph = nncf_graph(model, example_inputs)
    modules = dict(named_modules(model))
    owners = layers_by_operation(model, example_inputs)

    def layer(node: Any) -> str:
        return owners.get(node.node_name) or ".".join(node.node_name.split("/")[:-2])

    nodes = [node for node in graph.get_all_nodes() if layer(node) in modules]
    calls = [layer(node) for node in nodes]
    result = []
    for node in nodes:
        first = layer(node)
        if not _scalable(modules[first]) or calls.count(first) != 1:
            continue
        norm = clip = ""
        at = node
        while len(following := graph.get_next_nodes(at)) == 1:
            at = following[0]
            name = layer(at)
            module = modules.get(name)
            if isinstance(module, BatchNorm) and not norm and not clip and module.running_mean is not None:
                norm = name
            elif _scalable(module):
                if calls.count(name) == 1 and _consumes(module, modules[first]):
                    result.append(Pair(first, name, norm, clip))
                break
            elif at.node_type in PASSING:
                if at.node_type not in ("relu", "relu_", "dropout", "identity"):
                    if not isinstance(module, nn.ReLU6) or clip or calls.count(name) != 1:
                        break  # a functional ReLU6 cannot get a limit for each channel
                    clip = name
            else:
                break
    return result


def fold_batch_norms(log: Transaction, model: nn.Module, pairs: list[Pair]) -> None:
    """Moves the scale of each pair's BatchNorm into the layer before it; what stays is a shift.

    :param log: notes every change.
    :param model: changed in place.
    :param pairs: of this model.
    """
    modules = dict(named_modules(model))
    for pair in pairs:
        if not pair.norm:
            continue
        norm, layer = modules[pair.norm], modules[pair.first]
        if not isinstance(norm, BatchNorm) or norm.weight is None:
            continue
        mean, var = statistics(norm)
        factor = norm.weight.data / (var + norm.eps).sqrt()
        _scale_rows(log, layer, factor)
        log.set_data(norm.weight, torch.ones_like(factor))
        log.set_data(mean, mean.data * factor)
        log.set_data(var, torch.full_like(var, 1 - norm.eps))


def equalise(log: Transaction, model: nn.Module, pairs: list[Pair]) -> None:
    """Scales channels until both layers of every pair have the same range for each: ``s = sqrt(range_1 / range_2)``.

    :param log: notes every change.
    :param model: changed in place.
    :param pairs: of this model.
    """
    modules = dict(named_modules(model))
    for _ in range(ROUNDS):
        for pair in pairs:
            first, second = modules[pair.first], modules[pair.second]
            produced, consumed = _rows(first).abs().amax(1), _columns(second).abs().amax(1)
            usable = (produced > 1e-9) & (consumed > 1e-9)
            scale = torch.where(usable, (produced / consumed.clamp_min(1e-12)).sqrt(), torch.ones_like(produced))
            _divide_channels(log, model, modules, pair, scale)


def absorb_biases(log: Transaction, model: nn.Module, pairs: list[Pair]) -> None:
    """Moves the part of a shift that (nearly) always passes ReLU into the bias of the consumer.

    Before :func:`fold_batch_norms`, as the BatchNorm's weight tells the spread. Exact but for values that lie more than
    :data:`ABSORBED_SIGMAS` below the mean.

    :param log: notes every change.
    :param model: changed in place.
    :param pairs: of this model.
    """
    modules = dict(named_modules(model))
    for pair in pairs:
        norm, second = modules.get(pair.norm), modules[pair.second]
        padded = isinstance(second, nn.Conv2d) and (isinstance(second.padding, str) or any(second.padding))
        if not isinstance(norm, BatchNorm) or norm.bias is None or pair.clip or padded or second.bias is None:
            continue
        spread = (norm.weight if norm.weight is not None else torch.ones_like(norm.bias)).data.abs()
        surplus = (norm.bias.data - ABSORBED_SIGMAS * spread).clamp_min(0)
        log.set_data(norm.bias, norm.bias.data - surplus)
        added = (_columns(second).reshape(len(surplus), -1).T * surplus).T
        bias: Any = second.bias
        log.set_data(bias, bias.data + _per_output(second, added))


def precondition(log: Transaction, model: nn.Module, example_inputs: Any) -> list[Pair]:
    """Absorbs biases (their spread shows in the BatchNorm while it stands), folds, equalises; in place.

    :param log: undoes everything if what follows fails.
    :param model: without NNCF hooks.
    :param example_inputs: as the model is called.
    :return: the pairs found.
    """
    with evaluating(model, changes=True):
        pairs = find_pairs(model, example_inputs)
        absorb_biases(log, model, pairs)
        fold_batch_norms(log, model, pairs)
        equalise(log, model, pairs)
    return pairs


def _scalable(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups in (1, module.in_channels) and isinstance(module.weight, nn.Parameter)
    return isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter)


def _consumes(second: nn.Module | None, first: nn.Module) -> bool:
    """Whether the second layer takes in what the first gives, channel by channel."""
    return second is not None and len(_rows(first)) == len(_columns(second))


def _rows(module: nn.Module) -> Tensor:
    """``[out, d]``."""
    return module.weight.data.flatten(1)  # type: ignore[operator]


def _columns(module: nn.Module) -> Tensor:
    """``[in, ...]``: what multiplies each input channel; in a depthwise convolution its own filters."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return weight.reshape(module.in_channels, -1)
    return weight.transpose(0, 1).flatten(1)


def _per_output(module: nn.Module, columns: Tensor) -> Tensor:
    """Sums ``[in, ...]`` of :func:`_columns` to one value for each output."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return columns.reshape(len(weight), -1).sum(1)
    return columns.reshape(weight.shape[1], weight.shape[0], -1).sum((0, 2))


def _scale_rows(log: Transaction, module: nn.Module, factor: Tensor) -> None:
    """Multiplies every output of a layer."""
    weight: Any = module.weight
    log.set_data(weight, weight.data * factor.view(-1, *(1,) * (weight.dim() - 1)))
    if module.bias is not None:
        bias: Any = module.bias
        log.set_data(bias, bias.data * factor)


def _divide_channels(
    log: Transaction, model: nn.Module, modules: dict[str, nn.Module], pair: Pair, scale: Tensor
) -> None:
    """Divides the channels between two layers, and makes up for it in the second."""
    _scale_rows(log, modules[pair.first], 1 / scale)
    norm = modules.get(pair.norm)
    if isinstance(norm, BatchNorm):
        mean, _ = statistics(norm)
        log.set_data(mean, mean.data / scale)
        if norm.bias is not None:
            log.set_data(norm.bias, norm.bias.data / scale)
    if pair.clip:
        found = modules[pair.clip]
        clip = found if isinstance(found, ChannelClip) else ChannelClip(torch.full_like(scale, 6.0))
        if clip is not found:
            modules[pair.clip] = clip
            parent, _, leaf = pair.clip.rpartition(".")
            log.set_item(children(model.get_submodule(parent)), leaf, clip)
        log.set_data(clip.limit, clip.limit / scale)
    second = modules[pair.second]
    weight: Any = second.weight
    depthwise = isinstance(second, nn.Conv2d) and second.groups > 1
    repeated = scale.repeat_interleave(len(weight) // len(scale)) if depthwise else scale
    shape = [1] * weight.dim()
    shape[0 if depthwise else 1] = -1
    log.set_data(weight, weight.data * repeated.view(shape))
