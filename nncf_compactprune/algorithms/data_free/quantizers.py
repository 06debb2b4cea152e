"""Fake quantizers: where NNCF puts them, with levels and ranges of ours.

NNCF decides the places (which activations share a quantizer, what stays in front of a BatchNorm) and knows what its
runtimes fuse. Its quantizers are then exchanged for :class:`GridQuantizer`, as ``nncf.strip`` exchanges them for
torch's; that exchange knows 8 bits only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.sources import LayerInputs
from nncf_compactprune.errors import DataFreeError, first_line
from nncf_compactprune.host.nncf_hooks import Hook, hook_input, hook_output
from nncf_compactprune.host.nncf_quantization import quantizer_places
from nncf_compactprune.host.stored_quantizers import StoredQuantizer
from nncf_compactprune.host.tensors import device_of, named_modules
from nncf_compactprune.host.torch_internals import TransposedConvolution

SEARCH_VALUES = 2**19  # values of an activation that its range is searched on
CHUNK = 32  # images in a batch of NNCF's statistics


class GridQuantizer(StoredQuantizer):
    """Finds its range on what comes first, then rounds to ``-high .. high`` or ``0 .. high`` levels of it.

    :param bits: 2 to 8.
    :param signed: levels from ``-high`` (weights, symmetric), else from 0 (activations).
    :param size: number of scales; above 1 they belong to the slices along ``axis``.
    """

    def __init__(self, bits: int, *, signed: bool, size: int = 1, axis: int = 0) -> None:
        super().__init__(signed=signed, size=size, axis=axis, bits=bits)
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.pending = False

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes. While ``pending``, the range is first searched on what comes."""
        if self.pending:
            self._search(x)
        return super().forward(x)

    def _search(self, x: Tensor) -> None:
        """Sets the range of what comes: a weight's largest value, or what :func:`search_range` finds."""
        if self.signed:
            rows = x.detach().abs().movedim(self.axis, 0).flatten(1)
            largest = rows.amax(1) if self.scale.numel() > 1 else rows.amax()
            self.set(largest.clamp_min(1e-12) / self.high)
        else:
            self.set(*search_range(x, self.high))
        self.pending = False


def search_range(x: Tensor, high: int) -> tuple[Tensor, int]:
    """The range of one quantizer for a whole tensor, by squared error over clipped ranges.

    The layer behind gives an error that is linear in the activation's, so for layers that mix many channels the squared
    error of the activation is the squared error of the output, up to a factor.

    :param x: the tensor, of any shape.
    :param high: the largest level; levels start at 0.
    :return: step size ``[1]`` and the level that means 0.
    """
    values = x.detach().flatten()
    values = values[:: max(1, values.numel() // SEARCH_VALUES)].float()
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    best = (float("inf"), (most - least) / high or 1.0, 0)
    for step in range(40):
        clip = 1 - 0.02 * step
        scale = clip * (most - least) / high or 1.0
        zero = round(-clip * least / scale)
        error = values - ((values / scale).round() + zero).clamp(0, high).sub(zero) * scale
        best = min(best, (float(error.square().sum()), scale, zero))
    return torch.tensor([best[1]]), best[2]


@torch.no_grad()
def install(
    model: nn.Module,
    inputs: LayerInputs,
    *,
    weight_bits: Mapping[str, int],
    activation_bits: int,
    edge_activations: int,
    owners: Mapping[str, str],
    last: Collection[str],
    per_channel: bool,
    target_device: str,
    ignored: Collection[str] = (),
) -> tuple[dict[str, GridQuantizer], list[GridQuantizer]]:
    """Puts quantizers on a model, in place, where NNCF would.

    :param model: without hooks.
    :param inputs: what NNCF collects its statistics on; the first batches only.
    :param weight_bits: by layer name, in network order, 2 to 8.
    :param activation_bits: of what enters a layer, 2 to 8.
    :param edge_activations: bits of the model's input, and of what enters a last layer.
    :param owners: the layer of each of NNCF's operations,
        :func:`~nncf_compactprune.decide.scopes.layers_by_operation`.
    :param last: NNCF's names of the last layers' operations.
    :param per_channel: a scale for every output channel of a weight; else one for each weight.
    :param target_device: NNCF's name of the device whose fused operations decide the places.
    :param ignored: NNCF's names of operations that are not quantized.
    :return: quantizers of weights by layer, and of activations. Each finds its range on what comes first.
    """
    placed = _placed_by_nncf(model, inputs, target_device, ignored)
    modules = dict(named_modules(model))
    device = device_of(model)
    weights: dict[str, GridQuantizer] = {}
    activations: list[GridQuantizer] = []
    for place in placed:
        layer = owners.get(place.operation, "")
        is_weight = place.before and place.port == 1 and layer in weight_bits
        if is_weight:
            hook = _weight_quantizer(modules[layer], weight_bits[layer], per_channel)
            weights[layer] = hook
        else:
            edge = "/" not in place.operation or (place.before and place.operation in last)
            hook = GridQuantizer(edge_activations if edge else activation_bits, signed=False)
            activations.append(hook)
        hook.pending = True
        register = hook_input if place.before else hook_output
        register(model, place.operation, place.port, hook.to(device))
    return weights, activations


def _weight_quantizer(module: nn.Module, bits: int, per_channel: bool) -> GridQuantizer:
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, TransposedConvolution)
    axis = 1 if transposed else 0
    return GridQuantizer(bits, signed=True, size=weight.shape[axis] if per_channel else 1, axis=axis)


def _placed_by_nncf(model: nn.Module, inputs: LayerInputs, target_device: str, ignored: Collection[str]) -> list[Hook]:
    """Every quantizer that NNCF puts on a copy."""
    batches = list(islice(inputs.split(CHUNK), 2))
    try:
        return quantizer_places(model, batches, target_device=target_device, ignored=ignored)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        msg = f"NNCF cannot place quantizers on {type(model).__name__}: {what}"
        raise DataFreeError(msg) from error
