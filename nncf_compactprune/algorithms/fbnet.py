"""``fbnet_pruning``: Pruning Compact ConvNets for Efficient Inference (Ghosh et al. 2023, arXiv 2301.04502).

The paper prunes networks that architecture search already made compact (FBNetV3) further down by weight magnitude,
uniformly and globally, and finds that a family of pruned networks beats the unpruned family at equal compute.

Deviations, as only the paper's abstract was at hand: channels are removed, not single weights; the budget is stated in
MACs or parameters and met exactly; a greedy allocation by score lost per MAC saved is offered beside uniform and
global.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import model_validator
from torch import Tensor

from nncf_compactprune.algorithms.channel_pruning import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import AlgorithmConfig, Registered
from nncf_compactprune.decide.budgets import Normalizer
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.plugins.hookspecs import Algorithm, Importance, hookimpl


class FBNetParams(ChannelPruningParams):
    """Parameters of ``fbnet_pruning``.

    :param importance: the criterion: ``"l1"``, ``"l2"``, ``"geometric_median"``, ``"batch_norm_scale"``, ``"lamp"``,
        ``"random"``, ``"activation_norm"`` (needs images), ``"taylor"``, ``"fisher"`` (by gradients: need labels), or a
        plugin's. In Python it may be a callable.
    :param normalizer: what the allocations ``"global"`` and ``"greedy"`` divide the scores of a group by, as the scales
        of layers differ: their ``"mean"``, ``"max"`` or ``"sum"``; ``"none"``: nothing.
    """

    searched: ClassVar[Mapping[str, Sequence[Any]]] = {
        "importance": ["l2", "geometric_median", "taylor"], "allocation": ["balanced", "uniform", "global"],
    }  # fmt: skip

    importance: Annotated[str | Callable[..., Tensor], Registered("importance")] = "l2"
    normalizer: Normalizer = "mean"

    @model_validator(mode="after")
    def _normalizes_what_is_compared(self) -> FBNetParams:
        if self.normalizer != "mean" and self.allocation in ("balanced", "uniform", "least_loss"):
            msg = (
                f'normalizer: the allocation "{self.allocation}" does not compare scores of groups with each other '
                'by it. Leave it out, or set "allocation": "global" or "greedy".'
            )
            raise ValueError(msg)
        return self


class FBNetConfig(ChannelPruningConfig):
    """An ``fbnet_pruning`` entry."""

    params: FBNetParams = FBNetParams()

    @property
    def needs_labels(self) -> str:
        return "params.importance" if self.params.importance in ("taylor", "fisher") else super().needs_labels


class FBNetPruning(ChannelPruning):
    """Magnitude pruning of channels, scheduled, under exact budgets."""

    name = "fbnet_pruning"
    summary = "Structured magnitude pruning of compact ConvNets under exact budgets (arXiv 2301.04502)"
    Config: ClassVar[type[AlgorithmConfig]] = FBNetConfig
    config: FBNetConfig

    @property
    def normalizer(self) -> Normalizer:
        return self.config.params.normalizer

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        contexts = criterion_contexts(self.context.model, graph, self.context.labelled_batches)
        criterion: Importance = self.context.plugins.resolve("importance", self.config.params.importance)
        return [criterion(context) for context in contexts]


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`FBNetPruning`."""
    return [FBNetPruning]
