"""A model of a network's time by its widths, fitted to measured networks.

A layer with ``O`` outputs and ``I`` inputs takes ``a + b·O + c·I + d·O·I``, with no coefficient below zero: something
for being called, for what it writes, for what it reads, and for what it multiplies. Devices work in vectors, so ``O``
and ``I`` count as rounded up to whole vectors, of the width that fits the measurements best. What runs between two
layers (activations, additions, pooling) counts with the layer before it. Layers of a branch that is gone take nothing.

Where a device does not say what layers take, the whole network takes ``a + b·MACs + c·parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from nncf_compactprune.channels import ChannelGraph

VECTORS = (1, 4, 8, 16, 32)
_BETTER = 0.9  # of the error without vectors, for a width of vectors to be believed
_RATE = (0.2, 5.0)  # bounds of the exponent that makes the model agree with the last measurements

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A network of some widths, compared with the dense one in turns.

    :param widths: of all groups, ``[groups]``.
    :param ratio: its time over the dense network's.
    :param spread: what ``ratio`` is uncertain by, relative.
    :param dense_ms: median time of one request of the dense network meanwhile.
    :param layers: microseconds by module; empty where the device does not say.
    :param seconds: what exporting and measuring it took.
    """

    widths: tuple[int, ...]
    ratio: float
    spread: float
    dense_ms: float
    layers: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class TimeModel:
    """Nanoseconds of one request at any widths of the groups: a cost like the polynomials of MACs and parameters.

    :param graph: the dense model's channels.
    :param dense_ns: what the dense network takes.
    """

    def __init__(self, graph: ChannelGraph, dense_ns: int) -> None:
        self.dense_ns = dense_ns
        #: outputs or inputs, as many as one vector holds, fit the measurements best
        self.vector = 1
        self._graph, self._sizes = graph, graph.sizes.astype(np.float64)
        self._modules: list[str] = []
        self._slopes: Floats = np.zeros((0, len(self._sizes)))
        self._offsets: Floats = np.zeros(0)
        self._in_branches: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # groups, layers
        self._dense_times: dict[int, float] = {}
        self._coefficients: Floats = np.zeros((0, 4))
        self._exponent = 1.0

    def fit(self, measured: Sequence[Measured]) -> None:
        """Learns from measured networks.

        :param measured: networks of several widths, the dense one among them.
        """
        self._exponent = 1.0
        self._dense_times.clear()
        known = [one for one in measured if one.layers]
        self._modules = [name for name in (known[0].layers if known else ()) if f"{name}.weight" in self._weights]
        if not self._modules:
            self._coefficients = self._fitted_whole(measured)
            return
        sides = [self._dim(dim) for dim in (0, 1)]
        self._slopes = np.concatenate([slopes for slopes, _ in sides])  # outputs, then inputs
        self._offsets = np.concatenate([offsets for _, offsets in sides])
        self._in_branches = [
            (np.array(groups), np.array([row for row, name in enumerate(self._modules) if branch.owns(name)], np.int64))
            for branch, groups in self._graph.branches.items()
        ]
        times = np.array([self._shares(one) for one in known])
        fits = {vector: self._fitted_layers(known, times, vector) for vector in VECTORS}
        best = min(VECTORS, key=lambda vector: fits[vector][1])
        self.vector = best if fits[best][1] < _BETTER * fits[1][1] else 1
        self._coefficients = fits[self.vector][0]

    def agree(self, points: Iterable[Measured], asked: float) -> None:
        """Bends the model so that it says what was measured around the ratio that is asked for; the dense network keeps
        its time.

        :param points: measured networks.
        :param asked: time over the dense network's.
        """
        wanted = math.log(asked)
        at = [(math.log(self._ratio(np.array(p.widths, float))), math.log(p.ratio)) for p in points]
        # A network that the model calls faster may be slower. So the model is taken to be too hopeful, if anything: the
        # search goes below the fastest, by its word, of those that were too slow.
        slow = min((p for p in at if p[1] > wanted), default=(0.0, 0.0))
        fast = max((p for p in at if p[1] <= wanted and p[0] < slow[0]), default=None)
        if wanted >= 0 or (fast is None and slow[0] >= 0):
            return
        said = slow[0] if fast is None else float(np.interp(wanted, [fast[1], slow[1]], [fast[0], slow[0]]))
        self._exponent = float(np.clip(wanted / said, *_RATE))

    def __call__(self, widths: Floats) -> int:
        """Nanoseconds of one request at the given group widths, ``[groups]``."""
        ratio = self._ratio(np.asarray(widths, np.float64))
        return round(float(self.dense_ns * ratio**self._exponent))

    def saved(self, widths: Floats, group: int, removed: int) -> float:
        """What removing channels of one group saves, with vectors left out: a step smaller than a vector saves nothing
        by itself, and is on the way.

        :param widths: of all groups before, ``[groups]``.
        :param group: its index.
        :param removed: how many of its channels go.
        """
        after = widths.copy()
        after[group] -= removed
        return self.dense_ns * (self._relative(widths, 1) - self._relative(after, 1)) * self._exponent

    @property
    def _weights(self) -> Mapping[str, tuple[int, ...]]:
        return self._graph.parameters

    def _dim(self, dim: int) -> tuple[Floats, Floats]:
        """Slopes ``[layers, groups]`` and offsets ``[layers]`` of one dimension of the layers' weights."""
        rows = {f"{name}.weight": row for row, name in enumerate(self._modules)}
        slopes = np.zeros((len(rows), len(self._sizes)))
        for at, group in enumerate(self._graph.groups):
            for member in group.members:
                if member.dim == dim and member.parameter in rows:
                    slopes[rows[member.parameter], at] += member.indices.shape[1]
        shapes = [self._weights[name] for name in rows]
        dense = np.array([shape[dim] if len(shape) > dim else 1 for shape in shapes], np.float64)
        return slopes, dense - slopes @ self._sizes

    def _features(self, widths: Floats, vector: int) -> Floats:
        """``[layers, 4]``: 1, outputs, inputs and their product, relative to the dense layer; zeros of a layer that is
        gone."""
        outputs, inputs = self._sides(widths, vector)
        features = np.stack([np.ones_like(outputs), outputs, inputs, outputs * inputs], axis=1)
        for groups, layers in self._in_branches:
            if not widths[groups].any():
                features[layers] = 0
        return features

    def _sides(self, widths: Floats, vector: int) -> Sequence[Floats]:
        """Outputs and inputs of every layer, ``[layers]`` each, relative to the dense layer."""
        now, dense = self._slopes @ widths + self._offsets, self._slopes @ self._sizes + self._offsets
        if vector > 1:
            now, dense = (np.ceil(sides / vector - 1e-9) for sides in (now, dense))
        return np.split(now / np.maximum(dense, 1), 2)

    def _whole(self, widths: Floats) -> Floats:
        """``[3]``: 1, MACs and parameters, relative to the dense network."""
        cost = self._graph.cost
        return np.array([1.0, *(one(widths) / max(one(self._sizes), 1) for one in (cost.macs, cost.params))])

    def _shares(self, one: Measured) -> Floats:
        """Time of every layer, so that all of them come to the ratio that was measured: the device's clocks were read
        at another moment, and cost time themselves."""
        times = np.array([one.layers.get(name, 0.0) for name in self._modules])
        return times * one.ratio / max(float(times.sum()), 1e-9)

    def _fitted_layers(self, known: Sequence[Measured], times: Floats, vector: int) -> tuple[Floats, float]:
        features = np.array([self._features(np.array(one.widths, np.float64), vector) for one in known])
        found = [nnls(features[:, row], times[:, row]) for row in range(len(self._modules))]
        return np.array([coefficients for coefficients, _ in found]), sum(error**2 for _, error in found)

    def _fitted_whole(self, measured: Sequence[Measured]) -> Floats:
        features = np.array([self._whole(np.array(one.widths, np.float64)) for one in measured])
        coefficients: Floats = nnls(features, np.array([one.ratio for one in measured]))[0]
        return coefficients

    def _time(self, widths: Floats, vector: int) -> float:
        if not self._modules:
            return float(self._coefficients @ self._whole(widths))
        return float((self._coefficients * self._features(widths, vector)).sum())

    def _ratio(self, widths: Floats) -> float:
        return max(self._relative(widths, self.vector), 1e-6)

    def _relative(self, widths: Floats, vector: int) -> float:
        if vector not in self._dense_times:
            self._dense_times[vector] = self._time(self._sizes, vector)
        return self._time(widths, vector) / self._dense_times[vector]
