"""``filter_pruning``, after NNCF 2.19's: which layers lose filters, how many, and which.

Deviations: filters are removed, not only zeroed; a layer keeps a tenth of its filters also where the target counts
filters of all layers together; grouped convolutions and whatever else the channel analysis proves prunable lose
channels too; a learned ranking also serves a target that counts filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from nncf.common.logging import nncf_logger
from torch import Tensor

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.channel_pruning import ChannelPruning
from nncf_compactprune.algorithms.filter_pruning.config import FilterPruningConfig
from nncf_compactprune.algorithms.filter_pruning.importance import (
    Norms,
    Ranking,
    Scores,
    filter_norms,
    importances,
    widths_of_lowest,
)
from nncf_compactprune.algorithms.filter_pruning.learned_ranking import learn
from nncf_compactprune.algorithms.filter_pruning.ranking_file import load_ranking, save_ranking
from nncf_compactprune.algorithms.filter_pruning.schedules import level
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.decide.budgets import AllocationProblem, Limits, choose, uniform
from nncf_compactprune.decide.scopes import ScopeRules
from nncf_compactprune.errors import BudgetError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.distributed import averaged
from nncf_compactprune.host.nncf_layers import positions
from nncf_compactprune.plan import PruningPlan, make_plan
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

#: of the filters that a layer has, where all layers are ranked together
_LARGEST_SHARE = 0.9
#: widths are multiples of this, where every layer loses the same share
_ROUND_TO = 8


class FilterPruning(ChannelPruning):
    """Structured pruning in NNCF 2.x's grammar.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    name = "filter_pruning"
    summary = "Filter pruning with NNCF 2.x's keys: a target of filters or FLOPs, schedules, learned ranking (LeGR)"
    Config: ClassVar[type[AlgorithmConfig]] = FilterPruningConfig
    at_once: ClassVar[Mapping[str, Any]] = {"schedule": "baseline"}
    left_out_by: ClassVar[str] = "the scopes, prune_first_conv, prune_downsample_convs or prune_last_conv"
    config: FilterPruningConfig  # type: ignore[assignment]

    def __init__(self, config: FilterPruningConfig, context: Context) -> None:
        super().__init__(config, context)  # type: ignore[arg-type]
        self.scope_rules = ScopeRules(nncf2=True, validate=config.validate_scopes)
        self.ranking: Ranking | None = None
        params = config.params
        if not params.prune_batch_norms:
            nncf_logger.warning(
                "filter_pruning: prune_batch_norms is false, but a removed channel takes its BatchNorm parameters too."
            )
        if "legr_params" in params.model_fields_set and not params.learned:
            nncf_logger.warning(
                'filter_pruning: legr_params are read with "interlayer_ranking_type": "learned_ranking" only.'
            )

    # -- how much ------------------------------------------------------------------------------------------------

    @property
    def target_rate(self) -> float:
        return self.config.params.target if self._counts_filters else super().target_rate

    @property
    def limits(self) -> Limits:
        if self.config.params.ranks_all:
            return Limits(1, _LARGEST_SHARE, 1)
        return Limits(1, 1.0, _ROUND_TO)

    def rate_at(self, epoch: int) -> float:
        params = self.config.params
        return level(
            params.schedule,
            epoch,
            initial=self.config.pruning_init,
            target=self.target_rate,
            steps=params.pruning_steps,
        )

    def rate_of(self, plan: PruningPlan) -> float:
        target = self.target_rate
        if not self._counts_filters or target <= 0:
            return super().rate_of(plan)
        # Widths are rounded, so the level is told from how far they are on the way to those of the target.
        any_scores = [np.zeros(group.size) for group in self.graph.groups]
        most = float((self.graph.sizes - self.widths(target, any_scores)).sum())
        removed = sum(group.before - group.after for group in plan.groups)
        return target * removed / most if most else super().rate_of(plan)

    def problem(self, rate: float) -> AllocationProblem:
        if self._counts_filters:
            return AllocationProblem(self.graph, self.prunable, {}, self.limits)
        try:
            return super().problem(rate)
        except BudgetError as error:
            msg = f"pruning_flops_target {self.config.params.target} cannot be reached. {error}"
            raise BudgetError(msg) from error

    @property
    def maximal_compression_rate(self) -> float:
        if not self._counts_filters:
            return super().maximal_compression_rate
        return _LARGEST_SHARE if self.config.params.ranks_all else 1 - 1e-9

    @property
    def _counts_filters(self) -> bool:
        return self.config.params.pruning_flops_target is None

    # -- which ---------------------------------------------------------------------------------------------------

    def decide(self, rate: float) -> PruningPlan:
        params = self.config.params
        if params.learned and self.ranking is None:
            self.ranking = self._ranking()
        with self.context.timed("scores"):
            found = averaged(self.scores(self.graph))
            scores = [score.detach().double().cpu().numpy() for score in found]
        with self.context.timed("allocation"):
            widths = self.widths(rate, scores)
            if rate >= self.target_rate > 0 and (widths == self.graph.sizes).all():
                nncf_logger.warning(
                    f"filter_pruning: at level {rate} no layer loses a filter, as widths stay multiples of "
                    f"{_ROUND_TO}. Raise the target, or set all_weights to true."
                )
            return make_plan(self.graph, choose(widths, scores), algorithm=self.name)

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        return importances(self.norms(graph), self.ranking)

    def norms(self, graph: ChannelGraph) -> Norms:
        """The norms of all filters, made comparable where layers are ranked together without a learned ranking.

        :param graph: the model's channels.
        """
        params = self.config.params
        normalised = params.ranks_all and not params.learned
        return filter_norms(self.context.model, graph, params.filter_importance, normalised=normalised)

    def widths(self, rate: float, scores: Scores) -> npt.NDArray[np.float64]:
        """How many channels every group keeps.

        :param rate: level to reach, of filters or of MACs.
        :param scores: importances, one a channel for every group.
        """
        problem = self.problem(rate)
        if self.config.params.ranks_all:
            return self._ranked(problem, rate, scores)
        if not self._counts_filters:
            return uniform(problem, scores)
        return np.array([problem.round_up(g, (1 - rate) * size) for g, size in enumerate(problem.sizes)], np.float64)

    def _ranked(self, problem: AllocationProblem, rate: float, scores: Scores) -> npt.NDArray[np.float64]:
        """The least important of all go: a share of the filters, or as many as the MACs ask for."""
        most = (problem.sizes - problem.floor).astype(int).tolist()
        free = sum(int(size) for size, may_go in zip(problem.sizes, most, strict=True) if may_go)
        if self._counts_filters:
            return widths_of_lowest(scores, int(rate * free + 1e-9), most)
        low, high = 0, sum(most)
        while low < high:  # the fewest that fit
            middle = (low + high) // 2
            low, high = (low, middle) if problem.fits(widths_of_lowest(scores, middle, most)) else (middle + 1, high)
        return widths_of_lowest(scores, low, most)

    def _ranking(self) -> Ranking:
        params = self.config.params
        if params.load_ranking_coeffs_path is not None:
            return load_ranking(params.load_ranking_coeffs_path, self.context, self.graph)
        with self.context.timed("ranking"):
            found = learn(self)
        if params.save_ranking_coeffs_path is not None:
            save_ranking(found, params.save_ranking_coeffs_path)
        return found

    # -- where ---------------------------------------------------------------------------------------------------

    def may_go(self, graph: ChannelGraph) -> list[bool]:
        params, model = self.config.params, self.context.model
        with evaluating(model):
            found = positions(model, self.context.example_inputs)
        left: set[str] = set()
        for kept, layers in (
            (not params.prunes_first, found.first),
            (not params.prunes_downsampling, found.downsampling),
            (params.prune_last_conv is False, found.last),
        ):
            left |= {graph.tied.get(name, name) for name in layers} if kept else set()
        return [
            free and not any(member.parameter in left for member in group.with_role("producer"))
            for free, group in zip(super().may_go(graph), graph.groups, strict=True)
        ]

    # -- state ---------------------------------------------------------------------------------------------------

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if state is not None and state.get("ranking") is not None:
            self.ranking = {name: (float(a), float(b)) for name, (a, b) in state["ranking"].items()}
        super().prepare(state)
        if state is None and self._masks is not None and self.config.pruning_init > 0:
            self.compression_rate = min(self.config.pruning_init, self.target_rate)

    def get_state(self) -> dict[str, Any]:
        ranking = None if self.ranking is None else {name: list(pair) for name, pair in self.ranking.items()}
        return {**super().get_state(), "ranking": ranking}

    def statistics(self) -> Mapping[str, Any]:
        sizes = [group.size for group, free in zip(self.graph.groups, self.prunable, strict=True) if free]
        total = sum(sizes)
        kept = total
        if self.plan is not None:
            widths = zip(self.plan.groups, self.prunable, strict=True)
            kept = sum(group.after for group, free in widths if free)
        return {
            **super().statistics(),
            "pruning level": f"{self.compression_rate:.3f} of {self.target_rate:.3f}",
            "filters": f"{kept:,} of {total:,} in layers that may lose some",
        }


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`FilterPruning`."""
    return [FilterPruning]
