"""The base of the pruning algorithms.

A subclass says how channels score; this class traces, allocates, masks while a schedule ramps up, cuts, and adapts
BatchNorm statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import nncf
import numpy as np
import numpy.typing as npt
from nncf.common.logging import nncf_logger
from torch import Tensor

from nncf_compactprune.algorithms.base import CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.batch_norm import adapt_batch_norm, check_batch
from nncf_compactprune.algorithms.channel_pruning.config import ChannelPruningConfig
from nncf_compactprune.algorithms.channel_pruning.costs import Costs
from nncf_compactprune.algorithms.data_free.reconstruction import Refits
from nncf_compactprune.algorithms.data_free.refit import DenseReference, RefitConfig, check_refit
from nncf_compactprune.algorithms.group_sparsity import GroupSparsity
from nncf_compactprune.algorithms.latency import LatencyResult, LatencyTarget
from nncf_compactprune.algorithms.search import AT_ONCE, SearchResult, search
from nncf_compactprune.algorithms.shrinking import Shrunk
from nncf_compactprune.channels import ChannelGraph, Pin, ViewByNumber, trace
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.cut.depth import with_branches
from nncf_compactprune.cut.diagnosis import analyse, culprits
from nncf_compactprune.cut.masks import Masks, drop_masks, kept_by_masks
from nncf_compactprune.cut.self_check import SelfCheck, prune_in_place
from nncf_compactprune.cut.transaction import transaction
from nncf_compactprune.decide.budgets import AllocationProblem, Limits, Normalizer, allocate, least_widths
from nncf_compactprune.decide.scopes import ScopeRules, prunable_groups
from nncf_compactprune.errors import BudgetError, CompactPruneError, NothingPrunableError, SelfCheckError, shortened
from nncf_compactprune.host.distributed import averaged, process_count, require_agreement, retire_wrappers
from nncf_compactprune.host.tensors import model_tensors, with_copy
from nncf_compactprune.plan import PruningPlan, make_plan

_Scores = TypeVar("_Scores")
#: share of the target from which on masks of unknown origin count as all
_NEARLY = 0.95


class ChannelPruning(CompressionAlgorithm):
    """Base of the pruning algorithms. A subclass implements :meth:`scores` or :meth:`decide`.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    Config: ClassVar[type[AlgorithmConfig]] = ChannelPruningConfig
    adjustable: ClassVar[bool] = True
    #: of ``params``: it cuts before training
    at_once: ClassVar[Mapping[str, Any]] = {"schedule": "one_shot"}
    #: how scopes are read
    scope_rules: ScopeRules = ScopeRules()
    #: what can leave groups out, for messages
    left_out_by: ClassVar[str] = "the scopes"
    config: ChannelPruningConfig

    def __init__(self, config: ChannelPruningConfig, context: Context) -> None:
        super().__init__(config, context)
        self.plan: PruningPlan | None = None
        self.self_check: SelfCheck | None = None
        self._shrunk: Shrunk | None = None
        self._masks: Masks | None = None
        #: what a re-fit after the cut did; None before it, and where there is none
        self.refits: Refits | None = None
        #: what a search for settings found; None where there is none
        self.found: SearchResult | None = None
        self.prunable: Sequence[bool] = ()  # which groups of the graph may be cut, [groups]
        self._latency: LatencyTarget | None = None
        self._held_scores: list[Any] | None = None  # while widths are searched: computed once
        self._sparsity: GroupSparsity | None = None
        self._rate = 0.0
        self._scheduled = True
        self._trained_masked = False  # since the masks changed last
        self._stepped = False  # the same, in this run
        self._done = False

    # -- for subclasses ------------------------------------------------------------------------------------------

    def scores(self, graph: ChannelGraph) -> Sequence[Tensor]:
        """One score a channel for every group, shape ``[group.size]``, larger kept."""
        raise NotImplementedError

    def decide(self, rate: float) -> PruningPlan:
        """Decides what goes, without changing the model: :meth:`scores` and the allocation of ``params``, by default.

        It reads :attr:`graph`, :attr:`prunable` and :meth:`problem`, all of the dense model. Where the model was cut on
        the way, it looks at :attr:`present`. Every process decides; the plans are compared.

        :param rate: share of the cost to remove, up to :attr:`target_rate`; a search may ask for more.
        """
        with self.context.timed("scores"):
            scores = self.shrunk.scores(self.held(self._checked_scores))
        with self.context.timed("allocation"):
            allocation = self.context.plugins.resolve("allocations", self.config.params.allocation)
            keep = allocate(self.problem(rate), scores, allocation)
            return make_plan(self.graph, keep, algorithm=self.name)

    def _checked_scores(self) -> list[npt.NDArray[np.float64]]:
        raw = averaged(self.scores(self.present))
        return [_checked(s, g.name) for s, g in zip(raw, self.graph.groups, strict=True)]

    def held(self, make: Callable[[], _Scores]) -> _Scores:
        """What :meth:`decide` computes from weights and data alone: once, where it is asked to decide several times.

        :param make: computes it.
        """
        if self._held_scores is None:
            return make()
        if not self._held_scores:
            self._held_scores.append(make())
        return self._held_scores[0]  # type: ignore[no-any-return]

    def problem(self, rate: float) -> AllocationProblem:
        """What is to be shared out on the way to the target: every budget loosened by the same share of its way.
        Beyond the target, every budget is tightened by the same share.

        :param rate: share of the cost to remove.
        """
        target, latency = self.target_rate, self._times
        budgets = self.costs.budgets(rate, target)
        # The floors were measured to reach the target; the model may see it otherwise.
        if latency is not None and rate <= target:
            floor = least_widths(self.graph, self.prunable, self.limits)
            budgets["latency"] = max(budgets["latency"], latency.model(floor))
        model = None if latency is None else latency.model
        widest = self.shrunk.widths
        return AllocationProblem(self.graph, self.prunable, budgets, self.limits, widest, model, self.normalizer)

    @property
    def normalizer(self) -> Normalizer:
        """How allocations make scores of different groups comparable."""
        return "mean"

    @property
    def adds_to_loss(self) -> bool:
        return self._group_sparsity is not None

    @property
    def _group_sparsity(self) -> float | None:
        """Weight of the regularisation; entries in NNCF 2.x's grammar do not know of it."""
        return getattr(self.config.params, "group_sparsity", None)

    def loss(self) -> Tensor | float:
        weight = self._group_sparsity
        if weight is None or self._done:
            return 0.0
        if self._sparsity is None or self._sparsity.graph is not self.present:  # it may have shrunk
            self._sparsity = GroupSparsity(self.context.model, self.present, self.prunable)
        return weight * self._sparsity()

    @property
    def costs(self) -> Costs:
        """What the budget is about, of the dense model."""
        return Costs(self.graph, self.config.budget, self._times)

    @property
    def _times(self) -> LatencyTarget | None:
        """The budget of time, measured when it is first asked for; None where there is none."""
        if self._latency is None and self.config.budget.latency is not None:
            params = self.config.params
            limits = Limits(params.min_channels, params.max_ratio, params.round_to)
            with self.context.timed("latency"):
                self._latency = LatencyTarget(self.config.budget, self.context, self.graph, self.prunable, limits)
        return self._latency

    @property
    def latency(self) -> LatencyResult | None:
        """What the budget of time came to; None where there is none, and before the decision."""
        return None if self._latency is None else self._latency.result

    @property
    def limits(self) -> Limits:
        """What bounds the width of every group."""
        params, vector = self.config.params, None if self._latency is None else self._latency.vector
        return Limits(params.min_channels, params.max_ratio, params.round_to, vector)

    def rate_at(self, epoch: int) -> float:
        """The share of the cost that the schedule removes in an epoch.

        :param epoch: counted from 0, where pruning starts, after ``num_init_steps``.
        """
        params = self.config.params
        schedule = self.context.plugins.resolve("schedules", params.schedule)
        rate = schedule(epoch, initial=params.pruning_init, target=self.target_rate, steps=params.pruning_steps)
        return float(rate)

    def adaptation_context(self) -> Context:
        """Whose training loader re-estimates BatchNorm statistics after the cut."""
        return self.context

    def before_cut(self) -> Callable[[PruningPlan], None]:
        """The model is about to be cut: time to keep what making up for the cut needs.

        :return: makes up for it afterwards: by a re-fit where the entry has one, otherwise by BatchNorm adaptation on
            training data.
        """
        initializer, context = self.config.initializer, self.adaptation_context()
        asked_for = "initializer" in self.config.model_fields_set

        def adapt(plan: PruningPlan) -> None:
            adapt_batch_norm(context, initializer.batchnorm_adaptation.num_bn_adaptation_samples, asked_for=asked_for)

        config = self._refit
        if config is None:
            return adapt
        ridge, reference = config.ridge, DenseReference.keep(context, config.generation(context))

        def refit(plan: PruningPlan) -> None:
            self.refits = reference.refit(plan, ridge)
            if "batchnorm_adaptation" in initializer.model_fields_set:
                adapt(plan)

        return refit

    @property
    def _refit(self) -> RefitConfig | None:
        """How layers are re-fitted; None: they are not."""
        return self.config.initializer.refit

    def check_budget(self) -> ChannelGraph:
        """Analyses the model and leaves it as it is.

        :return: its channels.
        :raises BudgetError: the budget cannot be reached.
        :raises CompactPruneError: nothing can be pruned, or a scope has no match.
        """
        self._analyse(trial=False)
        return self.graph

    # -- life ----------------------------------------------------------------------------------------------------

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if state is not None:
            if state.get("search") is not None:
                self._take_settings(SearchResult(**state["search"]))
            self._analyse(trial=not state["cut"], check=not state["cut"])
            self._restore(state)
            return
        if self._refit is not None:
            check_refit(self.context, self._refit)
        check_batch(self.context)
        self._choose_settings()
        if self.config.params.prunes_before_training and not self.context.hold_masks:
            self._analyse_and_prune()
        else:
            self._analyse(trial=True)
            self._masks = Masks(self.context.model, self.graph)

    @property
    def shrinks_on_the_way(self) -> bool:
        return self._shrink_every is not None

    @property
    def _shrink_every(self) -> int | None:
        """Epochs from cut to cut; entries in NNCF 2.x's grammar do not know of it."""
        return getattr(self.config.params, "shrink_every", None)

    def epoch_step(self, epoch: int) -> None:
        self._tell_of_idle_masks()
        params = self.config.params
        self._sparsity = None  # its factors are those of an epoch
        if self._done or not self._scheduled or epoch < params.num_init_steps:
            return
        self._refuse_other_shapes()
        at = epoch - params.num_init_steps
        rate = self.rate_at(at)
        follows = self.context.optimizer is not None and not self.context.hold_masks
        if rate >= self.target_rate and follows:
            self._prune_now()
            return
        if rate != self._rate:
            self.compression_rate = rate
        if follows and self._shrink_every and (at + 1) % self._shrink_every == 0:
            self._shrink()

    def step(self, step: int) -> None:
        self._trained_masked = self._stepped = True

    @property
    def settled(self) -> bool:
        return self._done

    def strip(self) -> None:
        self._tell_of_idle_masks()
        if not self._done:
            if self._scheduled and self._rate < self._goal - 1e-6 and (self._trained_masked or self._rate > 0):
                nncf_logger.warning(
                    f"{self.name}: training ended before the schedule did, at {self._rate:.0%} of {self._goal:.0%} "
                    "removed. The rest goes now, and no training follows it: shorten the schedule, or train longer."
                )
            self._prune_now()

    def _refuse_other_shapes(self) -> None:
        """A model that is another one than was analysed could not be cut in the end."""
        was, now = self.present.parameters, model_tensors(self.context.model).shapes()
        other = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if other:
            before, after = (list(shapes[other[0]]) if other[0] in shapes else "not there" for shapes in (was, now))
            msg = (
                f"'{self.name}': {shortened(other)}: expected the shapes that were analysed, got others: '{other[0]}' "
                f"was {before}, and is {after} now. Replace layers before create_compressed_model, and keep what grows "
                "while training outside of parameters and buffers (a plain attribute)."
            )
            raise CompactPruneError(msg)

    def _tell_of_idle_masks(self) -> None:
        if self._stepped and self._masks is not None and self._masks.idle:
            nncf_logger.warning(
                f"{self.name}: the model trained, but not under its masks, as nothing called it: masks act on calls of "
                "the model that create_compressed_model returned, not on calls of its parts, nor on a compiled copy "
                "of it. Call it itself, put what you call into its forward, or prune in one shot."
            )

    def stage(self) -> CompressionStage:
        if self._done or (self._rate >= self._goal and (self._scheduled or self._rate > 0)):
            return CompressionStage.FULLY_COMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED if self._rate > 0 else CompressionStage.UNCOMPRESSED

    @property
    def target_rate(self) -> float:
        """Share of the cost to be removed in the end: that of the tightest budget."""
        return self.costs.target

    @property
    def _goal(self) -> float:
        """The rate at which the compression is complete: the budget's, or the one set where there is no schedule."""
        return self.target_rate if self._scheduled else self._rate

    @property
    def maximal_compression_rate(self) -> float:
        return self.costs.largest_rate(self.problem(0.0).floor, self.target_rate)

    def disable_scheduler(self) -> None:
        self._scheduled = False

    @property
    def compression_rate(self) -> float:
        return self._rate

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        """
        :raises BudgetError: beyond :attr:`maximal_compression_rate`; everything is as before.
        """
        if self._masks is None:
            msg = f"compression_rate: the model is cut already. The rate stays at {self._rate:.3f}. Set it earlier."
            raise CompactPruneError(msg)
        self._mask(self._agreed(value), value)
        self.context.plugins.emit("masked", plan=self.plan)

    @property
    def graph(self) -> ChannelGraph:
        """The dense model's channels."""
        return self.shrunk.dense

    @property
    def present(self) -> ChannelGraph:
        """The channels of the model as it is while a schedule runs: with ``shrink_every``, those that were not cut yet.
        Groups are those of :attr:`graph`, in the same order."""
        return self.shrunk.graph

    @property
    def shrunk(self) -> Shrunk:
        """What is left of the dense model while a schedule runs."""
        if self._shrunk is None:
            msg = "call prepare() first"
            raise nncf.InternalError(msg)
        return self._shrunk

    @property
    def final_plan(self) -> PruningPlan:
        """The plan that the model was cut to."""
        if self.plan is None or not self._done:
            msg = "the model is not cut yet: call strip() first"
            raise nncf.InternalError(msg)
        return self.plan

    def get_state(self) -> dict[str, Any]:
        return {
            "plan": None if self.plan is None else self.plan.to_json(),
            "rate": self._rate,
            "cut": self._done,
            "shrunk": None if self._done else self.shrunk.get_state(),
            "scheduled": self._scheduled,
            "params": self.config.params.model_dump(mode="json"),
            "search": None if self.found is None else dataclasses.asdict(self.found),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        plan = None if state["plan"] is None else PruningPlan.from_json(state["plan"])
        if self._done:
            if not state["cut"] or plan is None or plan.to_json() != self.final_plan.to_json():
                msg = (
                    f"'{self.name}': the model is cut, and cannot go back to another plan. Build it anew, with that "
                    "state as compression_state."
                )
                raise CompactPruneError(msg)
        elif state["cut"] and plan is not None:
            self._cut(plan)
            self._rate = float(state["rate"])
        else:
            earlier = state.get("shrunk")
            if earlier is not None and earlier["plan"] != self._shrunk_to:
                self._cut(PruningPlan.from_json(earlier["plan"]), on_the_way=True)
                self.shrunk.load_scores(earlier)
            elif plan is not None and earlier is None:
                plan.validate(self.context.model)
            self._mask(plan, float(state["rate"]))
            self._trained_masked = True  # the weights that belong to this state were

    def adopt_masks(self, weights: Mapping[str, Tensor]) -> None:
        """Masks what the masks in a model's state dict mask, before its weights are loaded. Nothing happens where the
        model is cut, or is masked like that.

        :param weights: a state dict of this model, from when it was masked.
        """
        if not self._done:
            self.adopt_channels(kept_by_masks(self.present, weights), complete=False)

    def adopt_channels(self, kept: Sequence[npt.NDArray[np.bool_]], *, complete: bool | None) -> None:
        """Masks what another run had masked, before its weights are loaded. Nothing happens where the model is cut.

        :param kept: which channels of :attr:`present` stay, for every group.
        :param complete: whether that run's schedule had arrived: nothing more is decided then. None: not known; it had
            where all but a twentieth of the target is masked.
        """
        if self._done:
            return
        plan = make_plan(self.graph, self.shrunk.in_dense(kept), algorithm=self.name)
        rate = self.rate_of(plan)
        if complete or (complete is None and rate >= _NEARLY * self.target_rate):
            self._mask(plan, max(rate, self.target_rate))
        elif self.plan is None or plan.kept != self.plan.kept:
            self._mask(plan, rate)
        self._trained_masked = True

    @staticmethod
    def state_before() -> dict[str, Any]:
        """The state of a run that has analysed its model and masked nothing, for one whose masks come later."""
        return {"plan": None, "rate": 0.0, "cut": False, "shrunk": None, "scheduled": True}

    def rate_of(self, plan: PruningPlan) -> float:
        """The compression rate that a plan comes to: the share removed of the cost that is budgeted, the larger of two.

        :param plan: of this model.
        """
        widths = np.array([group.after for group in plan.groups], np.float64)
        return self.costs.rate_of(widths, self.target_rate)

    def statistics(self) -> Mapping[str, Any]:
        plan = self.plan
        macs, params = (self.graph.macs, self.graph.params) if plan is None else (plan.after.macs, plan.after.params)
        pruned = sum(g.after < g.before for g in plan.groups) if plan is not None else 0
        return {
            "stage": self.stage().name.lower(),
            "MACs": f"{macs:,} of {self.graph.macs:,} ({macs / max(self.graph.macs, 1):.1%})",
            "parameters": f"{params:,} of {self.graph.params:,} ({params / max(self.graph.params, 1):.1%})",
            "groups pruned": f"{pruned} of {len(self.graph.groups)}",
            "pinned": len(self.graph.pinned),
            **({} if self.found is None else {"search": str(self.found)}),
            **({} if self.latency is None else {"latency": str(self.latency)}),
            **({} if self.self_check is None else {"self-check": str(self.self_check)}),
            **({} if self.refits is None else self.refits.statistics()),
        }

    # -- how -----------------------------------------------------------------------------------------------------

    def _choose_settings(self) -> None:
        """By trial on copies of the model, where the entry has a search; those in NNCF 2.x's grammar do not."""
        search_config = getattr(self.config.initializer, "search", None)
        if search_config is None:
            return

        def cut(settings: Mapping[str, Any], context: Context) -> None:
            type(self)(self.config.with_settings({**settings, **AT_ONCE}), context).prepare()

        with self.context.timed("search"):
            self._take_settings(search(self.context, search_config, self.config.settings, cut))

    def _take_settings(self, found: SearchResult) -> None:
        self.config = self.config.with_settings(self.config.settings[found.chosen])
        self.found = found

    def _analyse_and_prune(self) -> None:
        """The cut is its own trial: groups that the network's code does not let shrink are pinned when it fails."""
        pins: list[Pin | ViewByNumber] = []
        while True:
            # Networks of other widths are measured before the cut, so they must be known to run.
            trial = self.config.budget.latency is not None
            try:
                self._analyse(trial=trial, pins=pins)
            except BudgetError:
                if trial:
                    raise
                self._analyse(trial=True, pins=pins)  # tells the least that the network's code really lets it come to
            plan = self._agreed(self.target_rate)
            try:
                self._prune_now(plan)
                return
            except SelfCheckError:
                context = self.context
                with context.timed("diagnosis"):
                    found = culprits(context.model, plan, self.graph, context.example_inputs, plugins=context.plugins)
                if not found:
                    raise
                pins += found

    def _analyse(self, *, trial: bool, pins: Sequence[Pin | ViewByNumber] = (), check: bool = True) -> None:
        """Finds the groups; with a trial, those that the network's code does not let shrink are pinned now."""
        with self.context.timed("trace"):
            find = analyse if trial else trace
            graph = find(
                self.context.model,
                self.context.example_inputs,
                pins=pins,
                plugins=self.context.plugins,
                allow_approximate=self.config.params.allow_approximate,
            )
            if self.limits.min_channels == 0:
                graph = with_branches(self.context.model, graph, self.context.example_inputs, self.context.plugins)
        self._shrunk = Shrunk(graph)
        self.prunable = self._select_groups(graph)
        if check:
            self.problem(self.target_rate)  # an impossible budget is told now, not after an hour of training
        self.context.plugins.emit("traced", graph=graph)

    def may_go(self, graph: ChannelGraph) -> list[bool]:
        """Which groups of channels the configuration leaves to prune: those in scope, by default.

        :param graph: of the model.
        """
        config, context = self.config, self.context
        scopes = config.ignored_scopes, config.target_scopes
        return prunable_groups(context.model, context.example_inputs, graph, *scopes, self.scope_rules)

    def _select_groups(self, graph: ChannelGraph) -> list[bool]:
        prunable = self.may_go(graph)
        if any(prunable):
            return prunable
        reasons = sorted({f"'{p.name}' ({p.size} channels): {p.reason}" for p in graph.pinned})
        shown = "\n  ".join(reasons[:10] + ([f"and {len(reasons) - 10} more"] if len(reasons) > 10 else []))
        scoped = f"All {len(graph.groups)} groups are left out by {self.left_out_by}. " if graph.groups else ""
        consent = any(one.kind == "approximate" for one in graph.pinned)
        hint = '\nWith "allow_approximate": true channels that are normalised over may go, too.' if consent else ""
        msg = f"nothing can be pruned in {type(self.context.model).__name__}. {scoped}Pinned:\n  {shown or 'nothing'}"
        msg += hint
        raise NothingPrunableError(msg)

    def _agreed(self, rate: float) -> PruningPlan:
        """What is decided, compared over all processes."""
        plan = self._measured(rate) if self._times is not None and rate == self.target_rate else self.decide(rate)
        require_agreement(plan.to_json() if process_count() > 1 else "", f"the plan of '{self.name}'")
        return plan

    def _measured(self, rate: float) -> PruningPlan:
        """What is decided, and measured to hold the budget of time."""
        assert self._times is not None
        self._held_scores = []
        try:
            with self.context.timed("latency"):
                return self._times.refined(partial(self.decide, rate))
        finally:
            self._held_scores = None

    def _prune_now(self, plan: PruningPlan | None = None) -> None:
        """Cuts to a plan, or to the last decision if that is complete, or decides for the full budget. Adapts BatchNorm
        unless the network was trained with these channels masked: then it computes the same before and after."""
        goal, decided = self._goal, None
        if plan is None:
            decided = self.plan if self._rate >= goal else None
            plan = decided or self._agreed(goal)
        make_up = self.before_cut()
        self._cut(plan, make_up=None if decided is not None and self._trained_masked else make_up)
        self._rate = goal
        self.context.plugins.emit("pruned", plan=plan, self_check=self.self_check)

    def _shrink(self) -> None:
        """Cuts what is masked, on the way. The network computes the same before and after. Branches stay and are masked
        until the last cut: a later decision may bring them back, and none can where nothing is left."""
        plan = self.plan
        if plan is None:
            return
        with_branches = self.shrunk.with_branches(plan)
        if self.shrunk.from_here(with_branches).is_identity:
            return
        trained = self._trained_masked
        self._cut(with_branches, on_the_way=True)
        if plan.removed:
            self._mask(plan, self._rate)
        self._trained_masked = trained
        self.context.plugins.emit("shrunk", plan=plan, self_check=self.self_check)

    def _cut(
        self,
        plan: PruningPlan,
        *,
        on_the_way: bool = False,
        make_up: Callable[[PruningPlan], None] | None = None,
    ) -> None:
        """Cuts the model as it is; where that fails, or making up for it, everything is as before.

        :param plan: in the dense model's channels.
        :param on_the_way: the schedule goes on from there.
        :param make_up: what is done to the cut model, see :meth:`before_cut`.
        """
        what_goes = self.shrunk.from_here(plan)
        retire_wrappers(self.context.model)
        if self._masks is not None:
            self._masks.share(self.context.ema)  # a copy of a masked model has masks of its own
            self._masks.remove()
        context = self.context
        copies = with_copy(context.model, context.ema)
        try:
            with transaction() as log:
                with context.timed("surgery"):
                    check = prune_in_place(
                        context.model,
                        what_goes,
                        context.example_inputs,
                        optimizer=context.optimizer,
                        ema=context.ema,
                        plugins=context.plugins,
                        within=log,
                    )
                for shadow in copies[1:]:
                    drop_masks(shadow)
                if make_up is not None:
                    for model in copies:
                        for _, tensor in model_tensors(model).named():
                            log.keep_content(tensor)
                    make_up(plan)
        except BaseException:
            if self._masks is not None:
                self._masks = Masks(context.model, self.present)
                self._masks.share(context.ema)
                if self.plan is not None:
                    self._masks.update(self.shrunk.from_here(self.plan))
            raise
        if self.self_check is None or not what_goes.is_identity:  # a last cut of nothing proves nothing
            self.self_check = check
        self.plan = plan
        self._done = not on_the_way
        if process_count() > 1 and context.optimizer is not None:
            nncf_logger.info("The network shrank: wrap it in DistributedDataParallel again before the next step.")
        if on_the_way:
            self.shrunk.cut(plan)
        self._masks = Masks(context.model, self.present) if on_the_way else None

    @property
    def _shrunk_to(self) -> str | None:
        """The plan that the model was cut to on the way, as JSON."""
        return None if self.shrunk.plan is None else self.shrunk.plan.to_json()

    def _mask(self, plan: PruningPlan | None, rate: float) -> None:
        """Masks what the plan removes and is still there; nothing, without a plan."""
        what_goes = None if plan is None else self.shrunk.from_here(plan)
        if self._masks is None:
            self._masks = Masks(self.context.model, self.present)
        self._masks.share(self.context.ema)
        if what_goes is None or what_goes.is_identity:
            self._masks.remove()
        else:
            self._masks.update(what_goes)
        self.plan, self._rate = plan, rate
        self._trained_masked = self._stepped = False

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._scheduled = bool(state.get("scheduled", True))
        self.load_state(state)


def _checked(scores: Tensor, group: str) -> npt.NDArray[np.float64]:
    values = scores.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        msg = (
            f"group '{group}': the importance criterion gave a score that is not finite. Look for NaNs in the weights."
        )
        raise BudgetError(msg)
    return values
