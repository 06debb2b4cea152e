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

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.channel_pruning import (
    ChannelPruning,
    ChannelPruningConfig,
    ChannelPruningParams,
    PruningInitializer,
)
from nncf_compactprune.algorithms.rotation.rotate import RotateConfig, RotatedModel
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import AlgorithmConfig, Registered
from nncf_compactprune.cut.transaction import transaction
from nncf_compactprune.decide.budgets import Normalizer
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.plan import PruningPlan
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


class FBNetInitializer(PruningInitializer):
    """What happens before training.

    :param rotate: ``{}`` rotates the streams that transformer blocks add to before the cut, so that it takes the
        directions that hold least; null: no rotation.
    """

    rotate: RotateConfig | None = None


class FBNetConfig(ChannelPruningConfig):
    """An ``fbnet_pruning`` entry."""

    initializer: FBNetInitializer = FBNetInitializer()
    params: FBNetParams = FBNetParams()

    @model_validator(mode="after")
    def _rotates_what_is_cut(self) -> FBNetConfig:
        if self.initializer.rotate is not None:
            wanted = {
                '"allow_approximate": true': self.params.allow_approximate,
                '"schedule": "one_shot" and "num_init_steps": 0': self.params.prunes_before_training,
            }
            missing = " and ".join(keys for keys, there in wanted.items() if not there)
            if missing:
                msg = (
                    "initializer.rotate prepares a cut at once of channels that norms run over: set params "
                    f"{missing}, or leave out the rotation."
                )
                raise ValueError(msg)
        return self

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

    def __init__(self, config: FBNetConfig, context: Context) -> None:
        super().__init__(config, context)
        self._rotated: RotatedModel | None = None

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        config = self.config.initializer.rotate
        if state is not None or config is None:
            super().prepare(state)
            return
        with transaction() as log:  # where nothing can be cut, the model is as before
            self._rotated = RotatedModel.start(self.context, config, log)
            super().prepare()

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        contexts = criterion_contexts(self.context.model, graph, self.context.labelled_batches)
        criterion: Importance = self.context.plugins.resolve("importance", self.config.params.importance)
        directions = {} if self._rotated is None else self._rotated.scores(graph)
        return [directions[g] if g in directions else criterion(context) for g, context in enumerate(contexts)]

    def before_cut(self) -> Callable[[PruningPlan], None]:
        make_up, rotated = super().before_cut(), self._rotated
        if rotated is None:
            return make_up

        def rescale(plan: PruningPlan) -> None:
            rotated.rescale(plan)
            make_up(plan)

        return rescale

    def statistics(self) -> Mapping[str, Any]:
        rotation = {} if self._rotated is None else {"rotated": str(self._rotated.rotation)}
        return {**super().statistics(), **rotation}


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`FBNetPruning`."""
    return [FBNetPruning]
