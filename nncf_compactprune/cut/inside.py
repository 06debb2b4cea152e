"""What happens inside two runs of a network, masked and compact, layer by layer.

Outputs alone can say nothing: a detector finds no box in noise, an untrained net of many layers gives a constant, and
a layer scale of 1e-6 hides its branch. So every layer that was cut is looked at, on the channels that stay, relative to
its own size. The same noise is then added to what it passes on, in both runs: the next layer has something to work on
at every channel, even behind layers that are dead or constant on this input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.host.tensors import computed_tensors, model_tensors, named_modules, own_tensors
from nncf_compactprune.plan import PruningPlan

SAMPLE = 4096
LEAST_NOISE = 1e-3
NOISE_PERIOD = 65521
SIGNAL, NOISE = 0.4, 0.8  # shares that keep the size of what passes, so that nothing grows from layer to layer

Call = tuple[str, int]  # module, and the how many-th of its calls


@dataclass(frozen=True)
class Inside:
    """How far two runs differ inside.

    :param error: largest difference in one layer over the largest value of that layer.
    :param worst: name of that layer, empty where none was compared.
    :param compared: names of the layers that were compared.
    :param unseen: names of the cut layers that were not: not called as modules, nothing but zeros, no known channels.
    """

    error: float
    worst: str
    compared: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class _Axis:
    """Where an output's channels are.

    :param dim: the dimension that was cut.
    :param kept: which of its dense positions stay, None where the output has its dense shape.
    """

    dim: int = 0
    kept: Tensor | None = None


class Probe:
    """Looks at every module that owns a cut tensor.

    :param model: dense.
    :param plan: what is cut.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._axes: dict[str, list[tuple[int, Tensor]]] = {}
        tensors = model_tensors(model).all()
        names = {id(tensors[name]): name for name in plan.kept}
        for name, module in named_modules(model):
            axes = [
                (tensor.shape[dim], plan.indices(names[id(tensor)], dim))
                for tensor in _looked_at(module)
                if id(tensor) in names
                for dim in _outputs_first(module, plan.kept[names[id(tensor)]])
            ]
            if axes:
                self._modules[name], self._axes[name] = module, axes + _joined_groups(module, axes)
        self._shapes: dict[str, dict[Call, tuple[int, ...]]] = {}
        self._expected: dict[Call, tuple[Tensor, float]] = {}
        self._errors: dict[str, float] = {}
        self._noise = torch.randn(NOISE_PERIOD, generator=torch.Generator().manual_seed(0)).abs()  # alive behind a ReLU

    @contextmanager
    def shapes(self, of: str) -> Iterator[None]:
        """Notes the shapes of a run: ``"masked"`` or ``"compact"``."""
        noted = self._shapes[of] = {}

        def look(call: Call, out: Tensor) -> None:
            noted[call] = tuple(out.shape)

        with self._watching(look):
            yield

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Remembers what a masked run holds, with noise added. Both shapes must be known."""
        expected = self._expected = {}

        def look(call: Call, out: Tensor) -> Tensor | None:
            axis = self._axis(call)
            if axis is None:
                return None
            kept = out if axis.kept is None else out.index_select(axis.dim, axis.kept.to(out.device))
            sample = _sample(kept, axis).clone()
            size = float(torch.linalg.vector_norm(sample)) / math.sqrt(max(sample.numel(), 1))
            if not math.isfinite(size):
                return None
            size = NOISE * max(size, LEAST_NOISE)
            expected[call] = sample, size
            noise = self._noise_like(kept)
            if axis.kept is None:
                return out.mul(SIGNAL).add_(noise, alpha=size)
            return out.mul(SIGNAL).index_add_(axis.dim, axis.kept.to(out.device), noise, alpha=size)

        with self._watching(look):
            yield

    @contextmanager
    def compact(self) -> Iterator[None]:
        """Compares a compact run with what was remembered, the same noise added."""
        self._errors = {}

        def look(call: Call, out: Tensor) -> Tensor | None:
            if call not in self._expected:
                return None
            expected, size = self._expected[call]
            actual = _sample(out, self._axis(call))
            if actual.shape != expected.shape:
                return None
            difference = _largest(actual - expected)
            largest = _largest(expected)
            if difference or largest:  # zeros on both sides tell nothing
                error = difference / largest if largest else math.inf
                self._errors[call[0]] = max(self._errors.get(call[0], 0.0), math.inf if math.isnan(error) else error)
            return out.mul(SIGNAL).add_(self._noise_like(out), alpha=size)

        with self._watching(look):
            yield

    def result(self) -> Inside:
        """What the last comparison found."""
        worst = max(self._errors, key=self._errors.__getitem__, default="")
        unseen = tuple(name for name in self._modules if name not in self._errors)
        return Inside(self._errors.get(worst, 0.0), worst, tuple(self._errors), unseen)

    @contextmanager
    def _watching(self, look: Callable[[Call, Tensor], Tensor | None]) -> Iterator[None]:
        counts: Counter[str] = Counter()

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
            def hook(module: nn.Module, args: Any, out: Any) -> Tensor | None:
                counts[name] += 1
                floating = isinstance(out, Tensor) and out.is_floating_point()
                return look((name, counts[name]), out) if floating else None

            return hook

        handles: list[Any] = []
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_hook(hook_of(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _axis(self, call: Call) -> _Axis | None:
        """Which channels of an output stay, or None where that is not known."""
        dense, compact = (self._shapes[of].get(call, ()) for of in ("masked", "compact"))
        if not dense or len(dense) != len(compact):
            return None
        cut = [dim for dim, sizes in enumerate(zip(dense, compact, strict=True)) if sizes[0] != sizes[1]]
        if not cut:
            return _Axis()
        fitting = [kept for size, kept in self._axes[call[0]] if (size, len(kept)) == (dense[cut[0]], compact[cut[0]])]
        return _Axis(cut[0], fitting[0]) if len(cut) == 1 and fitting else None

    def _noise_like(self, out: Tensor) -> Tensor:
        """The same noise for the same shape, whoever asks."""
        self._noise = self._noise.to(out)
        if self._noise.numel() < out.numel():
            self._noise = self._noise.repeat(-(-out.numel() // self._noise.numel()))
        return self._noise[: out.numel()].view(out.shape)


def _looked_at(module: nn.Module) -> list[Tensor]:
    """Tensors of a module, vectors first (they lie along its output), parts of computed ones too."""
    parts = [part for found in computed_tensors(module).values() for part in found]
    return sorted([*own_tensors(module).values(), *parts], key=lambda tensor: tensor.dim() > 1)


def _outputs_first(module: nn.Module, dims: Any) -> list[int]:
    """The dimensions that are cut of a weight, that of its outputs first."""
    return sorted(dims, reverse=getattr(module, "transposed", False))


def _joined_groups(module: nn.Module, axes: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """A grouped transposed convolution has its outputs of one group in its weight: the same of every group stay."""
    groups = getattr(module, "groups", 1)
    if not getattr(module, "transposed", False) or groups == 1:
        return []
    size, kept = axes[0]
    return [(groups * size, (torch.arange(groups)[:, None] * size + kept).reshape(-1))]


def _largest(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0


def _sample(out: Tensor, axis: _Axis | None) -> Tensor:
    """All channels at some positions: what differs between two runs are channels, at every position."""
    if out.numel() <= SAMPLE:
        return out
    if axis is None or axis.kept is None:
        return out.reshape(-1)[:: -(-out.numel() // SAMPLE)]
    rows = out.movedim(axis.dim, 0).flatten(1)
    return rows[:, :: -(-out.numel() // SAMPLE)]
