"""The keys of a ``filter_pruning`` entry, with the defaults of NNCF 2.19."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nncf_compactprune.algorithms.data_free.refit import RefitConfig, refits_at_once
from nncf_compactprune.algorithms.filter_pruning.schedules import ScheduleName, bias_is_possible
from nncf_compactprune.config import Budget, Initializer, Nncf2Entry, Section, Spelling, Whole

Importance = Literal["L2", "L1", "geometric_median"]
_DEFAULT_TARGET = 0.5


class LegrParams(Section):
    """How the ranking across layers is learned.

    :param generations: rankings that are tried.
    :param train_steps: training steps before a ranking is judged.
    :param max_pruning: level at which rankings are judged; the target, where None.
    :param random_seed: of the search.
    :param population_size: rankings that the search remembers, the oldest goes first.
    :param num_samples: of these are drawn, and the best of them is changed.
    :param mutate_percent: share of the layers whose map is changed, in (0, 1].
    :param scale_sigma: spread of the logarithm of a scale.
    """

    generations: Whole = Field(default=400, ge=1)
    train_steps: Whole = Field(default=200, ge=0)
    max_pruning: float | None = Field(default=None, gt=0, lt=1)
    random_seed: Whole = Field(default=42, ge=0)
    population_size: Whole = Field(default=64, ge=1)
    num_samples: Whole = Field(default=16, ge=1)
    mutate_percent: float = Field(default=0.1, gt=0, le=1)
    scale_sigma: float = Field(default=1.0, ge=0)


class FilterPruningParams(Section):
    """What goes, and when.

    :param pruning_target: share of the filters removed in the end; 0.5 where no target is given.
    :param pruning_flops_target: share of the multiply-accumulates removed in the end, instead.
    :param schedule: ``"baseline"`` prunes after ``num_init_steps``, the others more in each epoch.
    :param num_init_steps: epochs before pruning starts.
    :param pruning_steps: epochs in which the level rises to the target.
    :param filter_importance: the filters of the smallest norm go, or those nearest to the geometric median.
    :param all_weights: one ranking for all layers; else each loses the same share.
    :param interlayer_ranking_type: ``"learned_ranking"`` learns how layers compare (LeGR) before pruning starts.
    :param legr_params: how it is learned.
    :param save_ranking_coeffs_path: where the learned ranking is written.
    :param load_ranking_coeffs_path: a ranking that was learned before.
    :param prune_first_conv: also layers with no other layer before them.
    :param prune_last_conv: NNCF 1.x's: false keeps convolutions with no other convolution behind them.
    :param prune_downsample_convs: also convolutions with a stride.
    :param prune_batch_norms: a removed channel takes its BatchNorm along, whatever this says.
    """

    pruning_target: float | None = Field(default=None, ge=0, lt=1)
    pruning_flops_target: float | None = Field(default=None, ge=0, lt=1)
    schedule: ScheduleName = "exponential"
    num_init_steps: Whole = Field(default=0, ge=0)
    pruning_steps: Whole = Field(default=100, ge=0)
    filter_importance: Importance = "L2"
    all_weights: bool | None = None
    interlayer_ranking_type: Literal["unweighted_ranking", "learned_ranking"] = "unweighted_ranking"
    legr_params: LegrParams = LegrParams()
    save_ranking_coeffs_path: str | None = Field(default=None, min_length=1)
    load_ranking_coeffs_path: str | None = Field(default=None, min_length=1)
    prune_first_conv: bool | None = None
    prune_last_conv: bool | None = None
    prune_downsample_convs: bool | None = None
    prune_batch_norms: bool = True

    @model_validator(mode="after")
    def _agrees(self) -> FilterPruningParams:
        if self.pruning_target is not None and self.pruning_flops_target is not None:
            msg = "'pruning_target' counts filters and 'pruning_flops_target' counts FLOPs: expected one of them."
            raise ValueError(msg)
        if self.learned and self.all_weights is False:
            msg = "\"learned_ranking\" ranks all layers together: leave 'all_weights' out, or set it to true."
            raise ValueError(msg)
        return self

    @property
    def learned(self) -> bool:
        """The ranking across layers is learned."""
        return self.interlayer_ranking_type == "learned_ranking"

    @property
    def target(self) -> float:
        """The level in the end, of filters or of MACs."""
        if self.pruning_flops_target is not None:
            return self.pruning_flops_target
        return _DEFAULT_TARGET if self.pruning_target is None else self.pruning_target

    @property
    def ranks_all(self) -> bool:
        """One ranking for all layers."""
        return self.learned if self.all_weights is None else self.all_weights

    @property
    def prunes_first(self) -> bool:
        """Layers with no other layer before them may lose filters."""
        return self.learned if self.prune_first_conv is None else self.prune_first_conv

    @property
    def prunes_downsampling(self) -> bool:
        """Convolutions with a stride may lose filters."""
        return self.learned if self.prune_downsample_convs is None else self.prune_downsample_convs

    @property
    def prunes_before_training(self) -> bool:
        """The cut happens at once: ``"baseline"`` with nothing to wait for."""
        return self.schedule == "baseline" and self.num_init_steps == 0

    @property
    def allow_approximate(self) -> bool:
        """NNCF's grammar has no key for it."""
        return False


class FilterPruningInitializer(Initializer):
    """What happens before training.

    :param refit: ``{}`` re-fits every layer around the cut to what the dense layer gave; null: no re-fit. NNCF 2.x has
        no such key.
    """

    refit: RefitConfig | None = None


class FilterPruningConfig(Nncf2Entry):
    """A ``filter_pruning`` entry.

    :param pruning_init: level at the start of the schedule, in [0, 1).
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {"params.weight_importance": Spelling("params.filter_importance")}
    leftovers: ClassVar[Mapping[str, str]] = {
        "params.zero_grad": "gradients of masked filters are zero by themselves",
        "params.write_filter_pruning_mask": "the plan beside the saved weights says which filters went",
        "write_filter_pruning_mask": "the plan beside the saved weights says which filters went",
    }

    pruning_init: float = Field(default=0.0, ge=0, lt=1)
    initializer: FilterPruningInitializer = FilterPruningInitializer()
    params: FilterPruningParams = FilterPruningParams()

    @property
    def needs_labels(self) -> str:
        return "params.interlayer_ranking_type" if self.params.learned else ""

    @property
    def budget(self) -> Budget:
        """What ``pruning_flops_target`` leaves."""
        return Budget(macs=1 - (self.params.pruning_flops_target or 0.0))

    @model_validator(mode="after")
    def _refits_at_once(self) -> FilterPruningConfig:
        return refits_at_once(self, '"schedule": "baseline" and "num_init_steps": 0')

    @model_validator(mode="after")
    def _has_a_curve(self) -> FilterPruningConfig:
        params = self.params
        if params.schedule == "exponential_with_bias" and not bias_is_possible(self.pruning_init, params.target):
            msg = (
                f"'pruning_init' {self.pruning_init} leaves \"exponential_with_bias\" no curve to {params.target}: "
                'expected less than three quarters of the target. Use "exponential".'
            )
            raise ValueError(msg)
        return self
