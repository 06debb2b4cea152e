"""Quantizers as files and checkpoints hold them: 8-bit levels, a step and a zero point, exported to ONNX and OpenVINO
alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.host.nncf_hooks import HookState, hook_input, hook_output, hooks
from nncf_compactprune.host.nncf_quantization import PAIRS, belongs_into_files, smooth_quant_factors
from nncf_compactprune.host.tensors import NNCF_HOOKS, device_of


class StoredQuantizer(torch.ao.quantization.FakeQuantizeBase, HookState):
    """Rounds to 8-bit levels, -128 ... 127 or 0 ... 255.

    Fewer bits are fewer levels of the same 8-bit grid: activations are clamped first, weights are on the grid already.
    So every runtime that knows INT8 runs the file, and ONNX, whose quantizers know 8 bits only, can hold it.

    :param signed: whether levels lie on both sides of zero.
    :param size: number of steps; above 1 they belong to the slices along ``axis``.
    :param bits: 2 to 8.
    """

    # what nncf.strip leaves of a quantizer has torch's class, which goes to OpenVINO only
    exports_to_onnx = True

    def __init__(self, *, signed: bool, size: int = 1, axis: int = 0, bits: int = 8) -> None:
        super().__init__()
        self.signed, self.axis, self.bits = signed, axis, bits
        self.rounds = True  # a plain value: tracers take a buffer's for data
        # declared here: TorchScript, which OpenVINO traces with, takes annotations of a class for its own
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("zero_point", torch.zeros(size, dtype=torch.int32))
        self._note_numbers()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Rounds, or only cuts off at the ends of the range.

        :param enabled: whether it rounds.
        """
        self.rounds = enabled

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Step sizes and zero points."""
        return self.scale, self.zero_point

    @torch.no_grad()
    def set(self, scale: Tensor, zero_point: Tensor | int = 0) -> None:
        """Sets what a level means.

        :param scale: step sizes, ``[size]``.
        :param zero_point: the level that means 0, ``[size]`` or one for all.
        """
        self.scale.copy_(scale.reshape(-1))
        self.zero_point.copy_(torch.as_tensor(zero_point, dtype=torch.int32).reshape(-1))
        self._note_numbers()

    def _note_numbers(self) -> None:
        """One step as plain numbers: exporters know the operation with numbers, not with tensors."""
        self._step, self._zero = float(self.scale[0]), int(self.zero_point[0])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_numbers()

    @property
    def levels(self) -> tuple[int, int]:
        """The first and the last level."""
        return (-128, 127) if self.signed else (0, 255)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes."""
        low, high = self.levels
        if not self.signed and self.bits < 8:
            x = x.clamp(-self._zero * self._step, (2**self.bits - 1 - self._zero) * self._step)
        per_channel = self.scale.numel() > 1
        if torch.compiler.is_exporting():  # torch.export cannot trace torch's fake quantization: it has no meta kernel
            return (self._as_onnx if torch.onnx.is_in_onnx_export() else self._as_pair)(x, per_channel)
        if not self.rounds:
            shape = [-1 if dim == self.axis and per_channel else 1 for dim in range(x.dim())]
            ends = ((level - self.zero_point) * self.scale for level in (low, high))
            return x.clamp(*(end.view(shape) for end in ends))
        if per_channel:
            return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, low, high)
        return torch.fake_quantize_per_tensor_affine(x, self._step, self._zero, low, high)

    def _as_onnx(self, x: Tensor, per_channel: bool) -> Tensor:
        """ONNX's pair of operations."""
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

    def _as_pair(self, x: Tensor, per_channel: bool) -> Tensor:
        """Torch's pair of operations, which OpenVINO takes from an exported program."""
        kind = torch.int8 if self.signed else torch.uint8
        if per_channel:
            meaning = (self.scale, self.zero_point, self.axis, *self.levels, kind)
            levels = PAIRS.quantize_per_channel(x, *meaning)
            return PAIRS.dequantize_per_channel(levels, *meaning)  # type: ignore[no-any-return]
        numbers = (self._step, self._zero, *self.levels, kind)
        levels = PAIRS.quantize_per_tensor(x, *numbers)
        return PAIRS.dequantize_per_tensor(levels, *numbers)  # type: ignore[no-any-return]

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {"signed": self.signed, "size": self.scale.numel(), "axis": self.axis, "bits": self.bits}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> StoredQuantizer:
        """Builds one with unit steps; the buffers come from the state dict."""
        return cls(**state)


def stored_hooks(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a checkpoint holds of a quantized network's hooks: quantizers, and SmoothQuant's factors.

    :param model: any.
    :return: what they are and where, as plain data, and their tensors by name; None where it has none, or other hooks.
    """
    found = hooks(model, shared=True)
    modules = list(dict.fromkeys(one.module for one in found))
    if not modules or not all(isinstance(one, StoredQuantizer) or belongs_into_files(one) for one in modules):
        return None
    number = {module: at for at, module in enumerate(modules)}
    plain = {
        "modules": [
            {"signed": one.signed, "axis": one.axis, "bits": one.bits} if isinstance(one, StoredQuantizer) else None
            for one in modules
        ],
        "places": [[number[one.module], one.before, one.operation, one.port] for one in found],
    }
    tensors = {
        f"{NNCF_HOOKS}.{at}.{name}": value
        for module, at in number.items()
        for name, value in module.state_dict().items()
    }
    return plain, tensors


def read_hooks(plain: Any, tensors: Mapping[str, Tensor]) -> Callable[[nn.Module], None]:
    """Checks what :func:`stored_hooks` gave, which may come from anyone by now.

    :param plain: read from a file.
    :param tensors: the hooks' tensors.
    :return: puts them on a model without hooks, in place.
    :raises ValueError: it is no such data, or the tensors do not fit.
    """
    try:
        modules = [_module_of(one, _of_hook(at, tensors)) for at, one in enumerate(plain["modules"])]
        places = [(modules[at], before, operation, port) for at, before, operation, port in plain["places"]]
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    for _, before, operation, port in places:
        if (type(before), type(operation), type(port)) != (bool, str, int):
            msg = f"the place {[before, operation, port]}"
            raise ValueError(msg)

    def put_on(model: nn.Module) -> None:
        device = device_of(model)
        for module, before, operation, port in places:
            (hook_input if before else hook_output)(model, operation, port, module.to(device).eval())

    return put_on


def _module_of(options: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A hook with its values; sizes are the tensors'."""
    module: nn.Module
    if options is None:
        (factors,) = tensors.values()
        module = smooth_quant_factors(factors.shape)
    else:
        signed, axis, bits = bool(options["signed"]), int(options["axis"]), int(options["bits"])
        module = StoredQuantizer(signed=signed, size=tensors["scale"].numel(), axis=axis, bits=bits)
    module.load_state_dict(tensors)
    return module


def _of_hook(at: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{NNCF_HOOKS}.{at}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
