"""Fake quantizers: where NNCF puts them, with levels and ranges of ours.

NNCF decides the places (which activations share a quantizer, what stays in front of a BatchNorm) and knows what its
runtimes fuse. Its quantizers are then exchanged for :class:`GridQuantizer`, as ``nncf.strip`` exchanges them for
torch's; that exchange knows 8 bits only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.network import ImageNetwork
from nncf_compactprune.algorithms.data_free.sources import LayerInputs
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.nncf_hooks import Hook, HookState, hook_input, hook_output
from nncf_compactprune.host.nncf_quantization import quantizer_places
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import TransposedConvolution

SEARCH_VALUES = 2**19  # values of an activation that its range is searched on
CHUNK = 32  # images in a batch of NNCF's statistics


class GridQuantizer(torch.ao.quantization.FakeQuantizeBase, HookState):
    """Rounds to ``low .. high`` levels of a fixed step, always stored as an 8-bit quantizer.

    Fewer bits are fewer levels of the same 8-bit grid: activations are clamped first, weights are on the grid already.
    So every runtime that knows INT8 runs the file, and ONNX, whose quantizers know 8 bits only, can hold it.

    :param bits: 2 to 8.
    :param signed: levels from ``-high`` (weights, symmetric), else from 0 (activations).
    :param size: number of scales; above 1 they belong to the slices along ``axis``.
    """

    # what NNCF leaves of a quantizer after strip has torch's class; this one can go into ONNX too
    exports_to_onnx = True

    def __init__(self, bits: int, *, signed: bool, size: int = 1, axis: int = 0) -> None:
        super().__init__()
        self.bits, self.signed, self.axis = bits, signed, axis
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.low = -self.high if signed else 0
        # declared here: TorchScript, which OpenVINO traces with, takes annotations of a class for its own
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))
        self.pending = False
        self._note_numbers()

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Step sizes and zero points."""
        return self.scale, self.zero_point

    @torch.no_grad()
    def set(self, scale: Tensor, zero_point: int = 0) -> None:
        """Sets the grid.

        :param scale: step sizes, ``[size]``, above 0.
        :param zero_point: the level that means 0, in ``low .. high``.
        """
        self.scale.copy_(scale.reshape(-1))
        self.zero_point.fill_(zero_point)
        self._note_numbers()

    def _note_numbers(self) -> None:
        """One scale as plain numbers: exporters know the operation with numbers, not with tensors."""
        self._step, self._zero = float(self.scale[0]), int(self.zero_point[0])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_numbers()

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes. While ``pending``, the range is first searched on what comes."""
        if self.pending:
            self._search(x)
        low, high = (-128, 127) if self.signed else (0, 255)
        per_channel = self.scale.numel() > 1
        if not self.signed and self.bits < 8:
            x = x.clamp((self.low - self._zero) * self._step, (self.high - self._zero) * self._step)
        if torch.compiler.is_exporting():
            return self._as_onnx(x, per_channel)
        if per_channel:
            return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, low, high)
        return torch.fake_quantize_per_tensor_affine(x, self._step, self._zero, low, high)

    def _search(self, x: Tensor) -> None:
        """Sets the range of what comes: a weight's largest value, or what :func:`search_range` finds."""
        if self.signed:
            rows = x.detach().abs().movedim(self.axis, 0).flatten(1)
            largest = rows.amax(1) if self.scale.numel() > 1 else rows.amax()
            self.set(largest.clamp_min(1e-12) / self.high)
        else:
            self.set(*search_range(x, self.high))
        self.pending = False

    def _as_onnx(self, x: Tensor, per_channel: bool) -> Tensor:
        """ONNX's pair of operations: torch.export cannot trace torch's fake quantization, which has no meta kernel."""
        kind = torch.int8 if self.signed else torch.uint8
        scale = self.scale if per_channel else self.scale[0]
        zero = (self.zero_point if per_channel else self.zero_point[0]).to(kind)
        attributes: dict[str, Any] = {"axis": self.axis} if per_channel else {}
        levels = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, scale, zero), attributes, dtype=kind, shape=x.shape, version=18
        )
        back: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", (levels, scale, zero), attributes, dtype=x.dtype, shape=x.shape, version=18
        )
        return back

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {"bits": self.bits, "signed": self.signed, "size": self.scale.numel(), "axis": self.axis}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> GridQuantizer:
        """Builds one with unit steps; the buffers come from the state dict."""
        return cls(state["bits"], signed=state["signed"], size=state["size"], axis=state["axis"])


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
    network: ImageNetwork,
    inputs: LayerInputs,
    *,
    weight_bits: Mapping[str, int],
    activation_bits: int,
    edge_activations: int,
    per_channel: bool,
    target_device: str,
    ignored: Collection[str] = (),
) -> tuple[dict[str, GridQuantizer], list[GridQuantizer]]:
    """Puts quantizers on a model, in place, where NNCF would.

    :param model: without hooks.
    :param network: how to run it.
    :param inputs: what NNCF collects its statistics on; the first batches only.
    :param weight_bits: by layer name, in network order, 2 to 8.
    :param activation_bits: of what enters a layer, 2 to 8.
    :param edge_activations: bits of the model's input, and of what enters the last layer.
    :param per_channel: a scale for every output channel of a weight; else one for each weight.
    :param target_device: NNCF's name of the device whose fused operations decide the places.
    :param ignored: NNCF's names of operations that are not quantized.
    :return: quantizers of weights by layer, and of activations. Each finds its range on what comes first.
    """
    placed = _placed_by_nncf(model, network, inputs, target_device, ignored)
    modules = dict(named_modules(model))
    weights: dict[str, GridQuantizer] = {}
    activations: list[GridQuantizer] = []
    last = list(weight_bits)[-1]
    for place in placed:
        layer = ".".join(place.operation.split("/")[:-2])
        is_weight = place.before and place.port == 1 and layer in weight_bits
        if is_weight:
            hook = _weight_quantizer(modules[layer], weight_bits[layer], per_channel)
            weights[layer] = hook
        else:
            edge = "/" not in place.operation or (place.before and layer == last)
            hook = GridQuantizer(edge_activations if edge else activation_bits, signed=False)
            activations.append(hook)
        hook.pending = True
        register = hook_input if place.before else hook_output
        register(model, place.operation, place.port, hook.to(inputs.images.device))
    return weights, activations


def _weight_quantizer(module: nn.Module, bits: int, per_channel: bool) -> GridQuantizer:
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, TransposedConvolution)
    axis = 1 if transposed else 0
    return GridQuantizer(bits, signed=True, size=weight.shape[axis] if per_channel else 1, axis=axis)


def _placed_by_nncf(
    model: nn.Module, network: ImageNetwork, inputs: LayerInputs, target_device: str, ignored: Collection[str]
) -> list[Hook]:
    """Every quantizer that NNCF puts on a copy."""
    batches = [network.wrap(part) for part in inputs.images[: 2 * CHUNK].split(CHUNK)]  # type: ignore[no-untyped-call]
    try:
        return quantizer_places(model, batches, target_device=target_device, ignored=ignored)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        msg = f"NNCF cannot place quantizers on {type(model).__name__}: {type(error).__name__}: {first}"
        raise DataFreeError(msg) from error
