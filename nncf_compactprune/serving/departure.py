"""Where two computations that should be one begin to differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_compactprune.export.prepared import Array, FlatModel
from nncf_compactprune.serving.server import Tap


@dataclass(frozen=True)
class ModuleValue:
    """What a module of the torch model returned.

    :param module: its name.
    :param kind: its class.
    :param value: the first tensor that it returned.
    :param given: which tensors it took, as numbers that tell tensors apart.
    :param returned: the number of the tensor that it returned.
    """

    module: str
    kind: str
    value: Array
    given: tuple[int, ...]
    returned: int


def module_values(flat: FlatModel, inputs: Sequence[Tensor]) -> list[ModuleValue]:
    """Runs a torch model and keeps what its innermost modules return, in their order.

    :param flat: the model.
    :param inputs: what to run it on.
    """
    found: list[ModuleValue] = []
    alive: list[Any] = []  # the number of a tensor that is gone is given to another one

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            alive.append((args, output))
            if isinstance(output, Tensor) and output.is_floating_point():
                given = tuple(id(one) for one in args if isinstance(one, Tensor))
                found.append(ModuleValue(name, type(module).__name__, output.numpy().copy(), given, id(output)))

        return note

    with ExitStack() as hooks, torch.no_grad():
        for name, module in flat.model.named_modules():
            innermost = name and not any(True for _ in module.children())
            if innermost and not isinstance(module, torch.jit.ScriptModule):  # those take no hooks
                hooks.callback(module.register_forward_hook(noting(name)).remove)
        flat.call([tensor.clone() for tensor in inputs])
    return found


def from_torch(modules: Sequence[ModuleValue], taps: Sequence[Tap], tolerance: float) -> str | None:
    """The first module whose value is nowhere in the file, in words; None where all are there.

    Exporters fold operations into one another (a BatchNorm into its convolution), so a module may be missing whose
    value is only taken by a module that is found.

    :param modules: of the torch model.
    :param taps: of the file, on the same inputs.
    :param tolerance: relative to the largest value.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for position, tap in enumerate(taps):
        by_shape.setdefault(_plain(tap.value.shape), []).append(position)
    at = [_match(one.value, taps, by_shape, tolerance) for one in modules]
    taken_by_found = {
        number for one, place in zip(modules, at, strict=True) if place is not None for number in one.given
    }
    last = -1
    for one, place in zip(modules, at, strict=True):
        if place is not None:
            last = max(last, place)
        elif one.returned not in taken_by_found:
            alike = [tap for tap in taps[last + 1 :] if _plain(tap.value.shape) == _plain(one.value.shape)]
            after = next((tap for tap in alike if _is_kind(one.kind, tap.kind)), next(iter(alike), None))
            module = f"module '{one.module}' ({one.kind}, {list(one.value.shape)})"
            if after is None:
                return f"{module}: no later operation of the file gives this shape"
            return f"operation '{after.operation}' ({after.kind}), which stands for {module}"
    return None


def between(reference: Sequence[Tap], taps: Sequence[Tap], tolerance: float) -> str | None:
    """The first operation of a file that gives something else than the same operation did, in words.

    :param reference: values in another arithmetic.
    :param taps: values of the same file.
    :param tolerance: relative to the largest value.
    """
    expected = {tap.operation: tap.value for tap in reference}
    for tap in taps:
        if tap.operation in expected and (error := relative_error(expected[tap.operation], tap.value)) > tolerance:
            return f"operation '{tap.operation}' ({tap.kind}), by {error:.1e}"
    return None


def relative_error(expected: Array, got: Array) -> float:
    """The largest difference, relative to the largest value that is expected; infinite where it is no number.

    :param expected: what should be.
    :param got: what is, of the same shape.
    """
    if expected.size == 0:
        return 0.0
    difference = float(np.abs(expected.astype(np.float64) - got.astype(np.float64)).max())
    if not np.isfinite(difference):
        return float("inf")
    scale = float(np.abs(expected.astype(np.float64)).max())
    return difference / scale if scale else difference


def _is_kind(module: str, operation: str) -> bool:
    """Whether an operation is what a module of this class becomes."""
    if "Linear" in module:
        return operation in ("Gemm", "MatMul")
    return module[:4] == operation.removeprefix("Group")[:4]  # a Conv2d is a Conv, Convolution or GroupConvolution


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of 1, which exporters add and remove."""
    return tuple(side for side in shape if side != 1)


def _match(
    value: Array, taps: Sequence[Tap], by_shape: dict[tuple[int, ...], list[int]], tolerance: float
) -> int | None:
    for position in by_shape.get(_plain(value.shape), ()):
        if relative_error(value.reshape(-1), taps[position].value.reshape(-1)) <= tolerance:
            return position
    return None
