"""What happens inside two runs of a network, masked and compact, layer by layer.

Outputs alone can say nothing: a detector finds no box in noise, an untrained net of many layers gives a constant, and
a layer scale of 1e-6 hides its branch. So every layer that was cut is looked at, on the channels that stay, relative to
its own size. The same noise is then added to what it passes on, in both runs: the next layer has something to work on
at every channel, even behind layers that are dead or constant on this input.

Where a network takes two examples at once, the second alone gets the noise, and one run of each network tells both: the
outputs for the first example are the network's own.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.channels.terms import goes_by_groups
from nncf_compactprune.host.tensors import computed_tensors, model_tensors, named_modules, own_tensors
from nncf_compactprune.host.torch_internals import TransposedConvolution, unseen_by_modes
from nncf_compactprune.plan import PruningPlan

SAMPLE = 4096
LEAST_NOISE = 1e-3
NOISE_PERIOD = 65521
SIGNAL, NOISE = 0.4, 0.8  # shares that keep the size of what passes, so that nothing grows from layer to layer

Call = tuple[str, int]  # module, and the how many-th of its calls


@dataclass(frozen=True)
class _Held:
    """What the compact run had at one call.

    :param shape: of the output.
    :param sample: some of it.
    :param noise: size of the noise that was added; None: the output is not finite.
    """

    shape: tuple[int, ...]
    sample: Tensor
    noise: float | None


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
    """Looks at every module that owns a cut tensor, and at every block that loses a branch.

    :param model: dense.
    :param plan: what is cut.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan) -> None:
        started = time.perf_counter()
        self._model = model
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
                self._axes[name] = axes + _joined_groups(module, axes) + _joined_directions(module, axes)
        for branch in plan.removed:
            self._axes.setdefault(branch.block, [])
        self._widths = {name: {len(kept) for _, kept in axes} for name, axes in self._axes.items()}
        self._unknown: set[str] = set()  # outputs whose channels cannot be told
        self._bare: set[str] = set()  # outputs without examples, such as computed weights: they get no noise in pairs
        self._learned = False
        self._held: dict[Call, _Held] = {}
        self._errors: dict[str, float] = {}
        self._noise = torch.randn(NOISE_PERIOD, generator=torch.Generator().manual_seed(0)).abs()  # alive behind a ReLU
        self.seconds = time.perf_counter() - started

    @contextmanager
    def compact(self, *, in_pairs: bool) -> Iterator[None]:
        """Notes what the compact run holds, and adds noise.

        :param in_pairs: to the second of two examples alone; to all otherwise.
        """
        self._held = {}

        def look(call: Call, out: Tensor) -> Tensor | None:
            name = call[0]
            part = _second(out) if in_pairs and name not in self._bare else out
            sample = _sample(part, self._widths[name]).clone()
            size = float(torch.linalg.vector_norm(sample)) / math.sqrt(max(sample.numel(), 1))
            noise = NOISE * max(size, LEAST_NOISE) if math.isfinite(size) else None
            self._held[call] = _Held(tuple(out.shape), sample, noise)
            if noise is None or (in_pairs and name in self._bare):
                return None
            noisy, part = _quieter(out, in_pairs=in_pairs)
            part.add_(self._noise_like(part.shape, part), alpha=noise)
            return noisy

        with self._watching(look):
            yield

    @contextmanager
    def masked(self, *, in_pairs: bool) -> Iterator[None]:
        """Compares a masked run with what was noted, the same noise added.

        :param in_pairs: as in the compact run.
        """
        self._errors = {}
        self._learned = False

        def look(call: Call, out: Tensor) -> Tensor | None:
            name, held = call[0], self._held.get(call)
            axis = None if held is None else self._axis(name, tuple(out.shape), held.shape)
            if held is None:
                return None
            if axis is None:
                self._learn(self._unknown, name)
                return None
            if in_pairs and axis.kept is not None and axis.dim == 0 and name not in self._bare:
                self._learn(self._bare, name)
                return None
            part = _second(out) if in_pairs and name not in self._bare else out
            self._compare(name, _sample(part, self._widths[name], axis), held)
            if held.noise is None or (in_pairs and name in self._bare):
                return None
            noisy, part = _quieter(out, in_pairs=in_pairs)
            if axis.kept is None:
                part.add_(self._noise_like(part.shape, part), alpha=held.noise)
            else:
                kept = axis.kept.to(part.device)
                shape = (*part.shape[: axis.dim], len(kept), *part.shape[axis.dim + 1 :])
                part.index_add_(axis.dim, kept, self._noise_like(shape, part), alpha=held.noise)
            return noisy

        with self._watching(look):
            yield

    @property
    def to_be_repeated(self) -> bool:
        """Whether the last masked run met outputs that the compact run should have treated otherwise. Now it will."""
        return self._learned

    def result(self) -> Inside:
        """What the last comparison found."""
        worst = max(self._errors, key=self._errors.__getitem__, default="")
        unseen = tuple(name for name in self._axes if name not in self._errors)
        return Inside(self._errors.get(worst, 0.0), worst, tuple(self._errors), unseen)

    def _learn(self, names: set[str], name: str) -> None:
        names.add(name)
        self._learned = True

    def _compare(self, name: str, expected: Tensor, held: _Held) -> None:
        largest = _largest(expected)
        if not math.isfinite(largest):
            return
        difference = _largest(held.sample - expected)
        if difference or largest:  # zeros on both sides tell nothing
            error = difference / largest if largest else math.inf
            self._errors[name] = max(self._errors.get(name, 0.0), math.inf if math.isnan(error) else error)

    @contextmanager
    def _watching(self, look: Callable[[Call, Tensor], Tensor | None]) -> Iterator[None]:
        counts: Counter[str] = Counter()

        def hook_of(name: str) -> Callable[[nn.Module, Any, Any], Any]:
            def hook(module: nn.Module, args: Any, out: Any) -> Any:
                counts[name] += 1
                first, *rest = out if type(out) is tuple and out else (out,)  # recurrent layers give their state, too
                if not isinstance(first, Tensor) or not first.is_floating_point():
                    return None
                with unseen_by_modes():
                    noisy = look((name, counts[name]), first)
                return (noisy, *rest) if noisy is not None and type(out) is tuple else noisy

            return hook

        handles: list[Any] = []
        try:
            for name, module in named_modules(self._model):  # another one, where a block lost a branch
                if name in self._axes and name not in self._unknown:
                    handles.append(module.register_forward_hook(hook_of(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _axis(self, name: str, dense: tuple[int, ...], compact: tuple[int, ...]) -> _Axis | None:
        """Which channels of an output stay, or None where that is not known."""
        if len(dense) != len(compact):
            return None
        cut = [dim for dim, sizes in enumerate(zip(dense, compact, strict=True)) if sizes[0] != sizes[1]]
        if not cut:
            return _Axis()
        fitting = [kept for size, kept in self._axes[name] if (size, len(kept)) == (dense[cut[0]], compact[cut[0]])]
        return _Axis(cut[0], fitting[0]) if len(cut) == 1 and fitting else None

    def _noise_like(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The same noise for the same shape, whoever asks."""
        self._noise = self._noise.to(like)
        numel = math.prod(shape)
        if self._noise.numel() < numel:
            self._noise = self._noise.repeat(-(-numel // self._noise.numel()))
        return self._noise[:numel].view(shape)


def _looked_at(module: nn.Module) -> list[Tensor]:
    """Tensors of a module, vectors first (they lie along its output), parts of computed ones too."""
    parts = [part for found in computed_tensors(module).values() for part in found]
    return sorted([*own_tensors(module).values(), *parts], key=lambda tensor: tensor.dim() > 1)


def _outputs_first(module: nn.Module, dims: Any) -> list[int]:
    """The dimensions that are cut of a weight, that of its outputs first."""
    return sorted(dims, reverse=getattr(module, "transposed", False))


def _joined_groups(module: nn.Module, axes: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """A grouped transposed convolution has its outputs of one group in its weight: the same of every group stay, or all
    of the groups that stay. A bias lies along all outputs."""
    if not isinstance(module, TransposedConvolution) or module.groups == 1 or module.bias is not None:
        return []
    size, kept = axes[0]
    groups = torch.arange(module.groups)
    if goes_by_groups(module.groups, module.in_channels, module.out_channels):
        groups = torch.unique(kept // (module.in_channels // module.groups))
        size, kept = module.out_channels // module.groups, torch.arange(module.out_channels // module.groups)
    return [(module.out_channels, (groups[:, None] * size + kept).reshape(-1))]


def _joined_directions(module: nn.Module, axes: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """A recurrent layer gives the states of both directions side by side: the same of both stay."""
    if not isinstance(module, nn.RNNBase) or not module.bidirectional:
        return []
    states = {size: kept for size, kept in axes if size == module.hidden_size}
    return [(2 * size, torch.cat([kept, size + kept])) for size, kept in states.items()]


def _largest(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, math.inf)) if tensor.numel() else 0.0


def _second(out: Tensor) -> Tensor:
    """What belongs to the second of two examples; all where that cannot be told."""
    half, odd = divmod(out.shape[0], 2) if out.dim() else (0, 1)
    return out if odd else out[half:]


def _quieter(out: Tensor, *, in_pairs: bool) -> tuple[Tensor, Tensor]:
    """A copy of an output, and the part of it that gets noise, scaled down."""
    part = _second(out) if in_pairs else out
    if part is out:
        noisy = out.mul(SIGNAL)
        return noisy, noisy
    noisy = out.clone()
    return noisy, _second(noisy).mul_(SIGNAL)


def _sample(out: Tensor, widths: set[int], axis: _Axis | None = None) -> Tensor:
    """All channels at some positions: what differs between two runs are channels, at every position.

    :param out: of the compact network, or of the masked one.
    :param widths: how many channels may stay: dimensions of these sizes are taken whole.
    :param axis: which channels of the masked network's output stay.
    """
    sizes = list(out.shape)
    if axis is not None and axis.kept is not None:
        sizes[axis.dim] = len(axis.kept)
    thinned = {dim: size for dim, size in enumerate(sizes) if size not in widths}
    steps = dict.fromkeys(thinned, 1)
    numel = math.prod(sizes)
    while numel > SAMPLE and any(size > 1 for size in thinned.values()):
        dim = max(thinned, key=lambda d: thinned[d])
        numel = numel // thinned[dim] * -(-thinned[dim] // 2)
        thinned[dim], steps[dim] = -(-thinned[dim] // 2), steps[dim] * 2
    chosen = out[tuple(slice(None, None, steps.get(dim, 1)) for dim in range(out.dim()))]
    kept = None if axis is None or axis.kept is None else axis.kept.to(out.device)
    return chosen if kept is None or axis is None else chosen.index_select(axis.dim, kept)
