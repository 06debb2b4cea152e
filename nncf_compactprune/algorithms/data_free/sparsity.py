"""``data_free_sparsity``: single weights or N:M patterns set to zero with no data (arXiv 2011.09058), the others
re-fitted.

The zeros are real zeros in the weights. Nothing shrinks: runtimes with sparse kernels, and compressed files, gain from
it. Layers are treated in network order on what the sparse prefix delivers (``sparsity.py``). Ours, as only
the paper's abstract was at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nncf_compactprune.algorithms.base import CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.data_free import Reconstruction, Refits
from nncf_compactprune.algorithms.data_free.gram import Moments
from nncf_compactprune.algorithms.data_free.inputs import FOLLOWS, GenerationConfig, check_generation, inputs_for
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.reconstruction import (
    LayerStep,
    dense_moments,
    solve,
    whole_or_nothing,
)
from nncf_compactprune.algorithms.data_free.thinning import shares, sparsify
from nncf_compactprune.config import AlgorithmConfig, Section
from nncf_compactprune.decide.scopes import parameters_in_scope
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl


class SparsityParams(Section):
    """Which weights go.

    :param granularity: ``"element"`` takes single weights, ``"2:4"`` two of every four neighbouring inputs.
    :param sparsity: share of zeros over all layers, in (0, 1); for ``"element"``.
    :param ridge: how strongly re-fitted weights are held to the dense ones, relative to the inputs' variance.
    """

    granularity: Literal["element", "2:4"] = "element"
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    ridge: float = Field(default=0.03, gt=0)

    @model_validator(mode="after")
    def _pattern_has_its_own(self) -> SparsityParams:
        if self.granularity == "2:4" and "sparsity" in self.model_fields_set and self.sparsity != 0.5:
            msg = f"'sparsity' {self.sparsity} contradicts \"2:4\", which is 0.5. Leave it out."
            raise ValueError(msg)
        return self


class DataFreeSparsityConfig(AlgorithmConfig):
    """A ``data_free_sparsity`` entry."""

    unread: ClassVar[Mapping[str, str]] = {"initializer": FOLLOWS}
    params: SparsityParams = SparsityParams()
    generation: GenerationConfig = GenerationConfig()


class DataFreeSparsity(CompressionAlgorithm):
    """Sparsifies at once. Training after it would fill the zeros again: fine-tune before."""

    name = "data_free_sparsity"
    summary = "Unstructured and 2:4 sparsity with no data (arXiv 2011.09058)"
    Config: ClassVar[type[AlgorithmConfig]] = DataFreeSparsityConfig
    config: DataFreeSparsityConfig

    def __init__(self, config: DataFreeSparsityConfig, context: Context) -> None:
        super().__init__(config, context)
        self.refits = Refits()
        self.names: Set[str] = set()
        self._done = False

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        check_generation(self.context, self.config.generation)
        self._in_scope()  # a wrong scope is told now, not after hours of training

    def _in_scope(self) -> set[str]:
        """Names of the layers that the scopes leave.

        :raises DataFreeError: there are none.
        """
        model, config = self.context.model, self.config
        weights = {f"{name}.weight" for name in refittable(model, self.context.example_inputs).found}
        scopes = config.ignored_scopes, config.target_scopes
        found = parameters_in_scope(model, self.context.example_inputs, weights, *scopes)
        if not found:
            msg = (
                f"'{self.name}': none of the {len(weights)} layers of {type(model).__name__} that can be sparsified is "
                "in scope. Widen target_scopes or ignored_scopes."
            )
            raise DataFreeError(msg)
        return {name.removesuffix(".weight") for name in found}

    def strip(self) -> None:
        if self._done:
            return
        model, params = self.context.model, self.config.params
        inputs = inputs_for(self.context, self.config.generation)
        self.names = names = self._in_scope()
        with self.context.timed("sparsity"), evaluating(model, changes=True), whole_or_nothing(model):
            if params.granularity == "2:4":
                ratios: dict[str, float] = {}
            else:
                found = dense_moments(model, inputs, names)
                weights = {n: m.operation.rows(model.get_parameter(f"{n}.weight")) for n, m in found.items()}
                ratios = shares(weights, found, params.sparsity, params.ridge)
            step = sparse_step(ratios, params.ridge, names)
            run = Reconstruction(copy.deepcopy(model), model, inputs, step=step)
            self.refits = Refits(run.run(progress="Sparsifying layers"), run.left)
        self._done = True

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED if self._done else CompressionStage.UNCOMPRESSED

    def _zeros(self) -> float:
        """Share of zeros in the weights of the layers in scope."""
        names = self.names or self._in_scope()
        weights = [self.context.model.get_parameter(f"{name}.weight") for name in names]
        return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)

    def statistics(self) -> Mapping[str, Any]:
        left = {"layers left": ", ".join(self.refits.left)} if self.refits.left else {}
        return {"stage": self.stage().name.lower(), "zeros": f"{self._zeros():.1%} of the layers' weights", **left}


def sparse_step(ratios: Mapping[str, float], ridge: float, names: Set[str]) -> LayerStep:
    """The step that re-fits a layer and sets weights to zero.

    :param ratios: share of zeros by layer; empty for 2:4.
    :param ridge: how strongly re-fitted weights are held to the dense ones, relative to the inputs' variance.
    :param names: the layers to sparsify; others are re-fitted only.
    """

    def step(name: str, rows: Tensor, found: Moments) -> Tensor:
        refitted = solve(rows, found, ridge)
        if name not in names:
            return refitted
        if ratios:
            return sparsify(refitted, found.trusted, ridge, ratio=ratios[name])
        return _two_of_four(refitted, found, ridge)

    return step


def _two_of_four(weight: Tensor, found: Moments, ridge: float) -> Tensor:
    """2:4 runs along input channels, tap by tap, as sparse kernels have it: columns are brought into that order."""
    taps = found.operation.taps
    if weight.shape[2] // taps % 4:
        return weight
    order = torch.arange(weight.shape[2], device=weight.device).view(-1, taps).T.reshape(-1)
    sparse = sparsify(weight[:, :, order], found.trusted[:, order][:, :, order], ridge, pattern=(2, 4))
    return sparse[:, :, order.argsort()]


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`DataFreeSparsity`."""
    return [DataFreeSparsity]
