"""A model's modules, parameters and buffers in one pass, under the names that torch gives them.

``nn.Module.named_parameters`` walks the whole tree at every call through nested generators; on networks of several
hundred modules that alone would cost as much as the analysis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.torch_internals import UninitializedBuffer, UninitializedParameter

NNCF_HOOKS = "__nncf_hooks"
#: the copy of a network that NNCF 2's knowledge distillation keeps inside it
NNCF_TEACHER = "_kd_original_model"


def carries_hooks(model: nn.Module) -> bool:
    """Whether a model has NNCF function hooks at work (masks, quantizers, re-parameterised weights)."""
    storage = getattr(model, NNCF_HOOKS, None)
    return storage is not None and bool(storage.pre_hooks or storage.post_hooks)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in torch's order, shared ones once, NNCF's hook storage and teacher left out."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None and key not in (NNCF_HOOKS, NNCF_TEACHER):
                stack.append((prefix + key, child))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by local name, without those of its children."""
    both = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in both if tensor is not None}


def temporary_buffers(module: nn.Module) -> list[Tensor]:
    """A module's own buffers that its state dict leaves out."""
    left_out = (module._buffers.get(name) for name in getattr(module, "_non_persistent_buffers_set", ()))
    return [buffer for buffer in left_out if buffer is not None]


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children, in the dictionary that it looks them up in."""
    return module._modules


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Lets a module that takes another's place call its hooks, for as long as they are registered.

    :param old: has the hooks.
    :param new: has none.
    """
    for name, value in vars(old).items():
        if isinstance(value, dict) and name.startswith(("_forward", "_backward")):
            vars(new)[name] = value


def computed_tensors(module: nn.Module) -> dict[str, list[Tensor]]:
    """Parameters behind each computed one, by its local name: ``torch.nn.utils.parametrize``, and what is older:
    ``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune``."""
    parts = {name: list(p._parameters.values()) for name, p in getattr(module, "parametrizations", {}).items()}
    for name, parameter in module._parameters.items():
        direction = module._parameters.get(f"{name[:-2]}_v") if name.endswith("_g") else None
        if direction is not None:
            parts[name[:-2]] = [parameter, direction]
        if name.endswith("_orig"):
            parts[name.removesuffix("_orig")] = [parameter]
    return {name: [part for part in found if part is not None] for name, found in parts.items()}


@dataclass(frozen=True)
class ModelTensors:
    """What a plan could cut.

    :param parameters: by name, shared ones once, in model order.
    :param buffers: the same.
    :param tied: other names of shared parameters, to the name used in ``parameters``.
    :param fleeting: buffers that no checkpoint holds. A run may give them another shape, as tables of positions.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tied: dict[str, str]
    fleeting: frozenset[str] = frozenset()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, then buffers."""
        yield from self.parameters.items()
        yield from self.buffers.items()

    def all(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**self.parameters, **self.buffers}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of those that can carry channels."""
        return {name: tuple(tensor.shape) for name, tensor in self.named() if carries_channels(tensor)}

    def lasting_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same without fleeting buffers: what tells an architecture from others."""
        return {name: shape for name, shape in self.shapes().items() if name not in self.fleeting}


def model_tensors(model: nn.Module) -> ModelTensors:
    """Collects a model's parameters and buffers."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    fleeting: set[str] = set()
    for module_name, module in named_modules(model):
        prefix = f"{module_name}." if module_name else ""
        passing = {id(buffer) for buffer in temporary_buffers(module)}
        for own, collected in ((module._parameters, parameters), (module._buffers, buffers)):
            for local, tensor in own.items():
                if tensor is None:
                    continue
                name = first.setdefault(id(tensor), prefix + local)
                if name == prefix + local:
                    collected[name] = tensor
                    if id(tensor) in passing:
                        fleeting.add(name)
                else:
                    tied[prefix + local] = name
    return ModelTensors(parameters, buffers, tied, frozenset(fleeting))


def copy_in(ema: object, model: nn.Module) -> nn.Module:
    """The copy of a model in an EMA: the EMA itself, or what it holds in an attribute, wrapped once or not (as timm's,
    torch's and most others do).

    Any attribute may have any name, ``module`` may be a child of the model too, so the names of the parameters decide.

    :param ema: a copy of the model, or a holder of one.
    :param model: whose copy it is, cut or not.
    :raises CompactPruneError: there is no copy of the model in it.
    """
    names = model_tensors(model).parameters.keys()
    found: list[object] = [ema]
    for _ in range(3):
        for one in found:
            if isinstance(one, nn.Module) and one is not model and model_tensors(one).parameters.keys() == names:
                return one
        found = [held for one in found if one is ema or isinstance(one, nn.Module) for held in _held(one)]
    msg = (
        f"ema: expected a copy of {type(model).__name__}, or an object that holds one in an attribute (as timm's "
        f"ModelEmaV3 and torch's AveragedModel do), got {type(ema).__name__} without a module of the same parameters. "
        "Lists of averaged tensors do not say whose they are."
    )
    raise CompactPruneError(msg)


def _held(holder: object) -> list[object]:
    own = holder._modules if isinstance(holder, nn.Module) else {}
    return [*own.values(), *getattr(holder, "__dict__", {}).values()]


def with_copy(model: nn.Module, ema: object | None) -> list[nn.Module]:
    """A model, and its copy in an EMA where there is one.

    :param model: as it is.
    :param ema: see :func:`copy_in`, or None.
    """
    return [model] if ema is None else [model, copy_in(ema, model)]


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU where it has no parameter.

    :param model: any.
    """
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and precision of a model's first floating parameter; the CPU and float32 where it has none.

    :param model: any.
    """
    first = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0, dtype=torch.float32))
    return first.device, first.dtype


def carries_channels(tensor: Tensor) -> bool:
    """Whether a tensor's dimensions may be channels: floating, not a scalar, of known shape."""
    return (
        tensor.is_floating_point()
        and not isinstance(tensor, (UninitializedParameter, UninitializedBuffer))
        and tensor.dim() > 0
    )


def select(data: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The kept part of a tensor, in the same memory format.

    :param data: a tensor of any shape.
    :param dims: kept positions by dimension; all of a dimension that is not named.
    """
    channels_last = (
        data.dim() == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last)
    )
    for dim, positions in dims.items():
        data = data.index_select(dim, positions.to(data.device))
    return data.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@functools.cache
def computes_in_bfloat16(device_type: str) -> bool:
    """Whether a kind of device has instructions for bfloat16, so that a network runs faster in it.

    :param device_type: as ``torch.device.type``.
    """
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device_type == "cpu" and any(
        torch.cpu.get_capabilities().get(n) for n in ("avx512_bf16", "amx_bf16", "bf16")
    )
