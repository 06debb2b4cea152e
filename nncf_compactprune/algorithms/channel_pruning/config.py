"""What an entry of a pruning algorithm says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from nncf_compactprune.algorithms.data_free.refit import RefitConfig, refits_at_once
from nncf_compactprune.algorithms.search import MOST_TRIALS, SearchConfig, combinations, shown
from nncf_compactprune.config import AlgorithmConfig, Budget, Initializer, Registered, Section


class ChannelPruningParams(Section):
    """How channels are removed.

    :param schedule: ``"exponential"``, ``"exponential_with_bias"``, ``"polynomial"`` and ``"multistep"`` mask more as
        epochs pass, then cut; ``"one_shot"`` cuts before training; or a plugin's. In Python it may be a callable, as
        may ``allocation``.
    :param num_init_steps: epochs before pruning starts.
    :param pruning_init: share of the cost removed when it starts, in [0, 1).
    :param pruning_steps: epochs from there to the full budget.
    :param shrink_every: cut what is masked every so many epochs of the schedule, for good, optimizer state and EMA copy
        along with it; null: at its end.
    :param allocation: widths: ``"balanced"`` (the product of what the layers keep is largest), ``"uniform"`` (the same
        share of every group), ``"global"`` (one threshold for all channels), ``"greedy"`` (least score lost per cost
        saved), ``"least_loss"`` (the same, scores taken as losses in one unit), or a plugin's.
    :param round_to: widths are multiples of this; a group may also stay whole. ``"auto"``: of 4 from 32 channels
        on, 8 from 64, 16 from 128 and 32 from 256, as runtimes like them; with a budget of latency, of what the device
        was measured to like.
    :param min_channels: least channels kept in any group. 0: a residual branch may go as a whole, its block becomes
        its shortcut, and the other groups keep 1 at least.
    :param max_ratio: largest share removed from any group that keeps a channel, in [0, 1].
    :param allow_approximate: also cut channels that a LayerNorm normalises over, which is not exact.
    :param group_sparsity: weight of a regularisation in ``ctrl.loss()`` that shrinks the least channels of coupled
        layers before they are cut (DepGraph's); null: none. It needs a schedule, or epochs before pruning starts.
    """

    #: what ``initializer.search`` tries where it names nothing
    searched: ClassVar[Mapping[str, Sequence[Any]]] = {"allocation": ["balanced", "uniform", "global"]}

    schedule: Annotated[str | Callable[..., float], Registered("schedules")] = "exponential"
    num_init_steps: int = Field(default=0, ge=0)
    pruning_init: float = Field(default=0.0, ge=0, lt=1)
    pruning_steps: int = Field(default=10, ge=1)
    shrink_every: int | None = Field(default=None, ge=1)
    allocation: Annotated[str | Callable[..., Any], Registered("allocations")] = "balanced"
    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    min_channels: int = Field(default=1, ge=0)
    max_ratio: float = Field(default=0.9, ge=0, le=1)
    allow_approximate: bool = False
    group_sparsity: Annotated[float, Field(gt=0)] | None = None

    @property
    def prunes_before_training(self) -> bool:
        """The cut happens at once, not in an epoch."""
        return self.schedule == "one_shot" and self.num_init_steps == 0

    @model_validator(mode="after")
    def _shrinks_step_by_step(self) -> ChannelPruningParams:
        if self.shrink_every is not None and self.schedule == "one_shot":
            msg = (
                'shrink_every: cuts on the way of a schedule, and "one_shot" cuts everything at once. Leave it out, or '
                'set "schedule": "exponential".'
            )
            raise ValueError(msg)
        if self.group_sparsity is not None and self.prunes_before_training:
            msg = (
                "group_sparsity: acts while the network trains with its channels, and this entry cuts them before. "
                'Leave it out, set "schedule": "exponential", or "num_init_steps" to the epochs that it may act for.'
            )
            raise ValueError(msg)
        return self


class PruningInitializer(Initializer):
    """What happens before training: the choice of settings, and what makes up for the cut.

    :param refit: ``{}`` re-fits every layer around the cut to what the dense layer gave; null: no re-fit. BatchNorm
        statistics follow it, so ``batchnorm_adaptation`` then acts only where it is written down.
    :param search: ``{}`` tries settings of ``params`` on copies of the network, and takes the best; null: ``params`` as
        they are.
    """

    refit: RefitConfig | None = None
    search: SearchConfig | None = None


class ChannelPruningConfig(AlgorithmConfig):
    """An entry of a pruning algorithm.

    :param budget: what may be left.
    """

    budget: Budget
    initializer: PruningInitializer = PruningInitializer()
    params: ChannelPruningParams = ChannelPruningParams()

    @model_validator(mode="after")
    def _refits_at_once(self) -> ChannelPruningConfig:
        return refits_at_once(self, '"schedule": "one_shot" and "num_init_steps": 0')

    @model_validator(mode="after")
    def _tries_what_there_is(self, info: ValidationInfo) -> ChannelPruningConfig:
        settings = self.settings
        if len(settings) > MOST_TRIALS:
            msg = f"initializer.search.grid: {len(settings)} combinations, expected at most {MOST_TRIALS}."
            raise ValueError(msg)
        for one in settings:
            try:
                self.with_settings(one, context=info.context)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"]) or "all together"
                msg = f"initializer.search.grid: {shown(one)}: {where}: {first['msg']}"
                raise ValueError(msg) from error
        return self

    @property
    def needs_labels(self) -> str:
        return "initializer.search" if self.initializer.search is not None else ""

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What a search tries, in order; empty where there is none."""
        search = self.initializer.search
        return [] if search is None else combinations(search.grid or type(self.params).searched)

    def with_settings(self, settings: Mapping[str, Any], *, context: Any = None) -> ChannelPruningConfig:
        """The entry without a search, and with other settings.

        :param settings: keys and values of ``params``.
        :param context: of the validation.
        """
        given = {name: getattr(self.params, name) for name in self.params.model_fields_set}
        params = type(self.params).model_validate({**given, **settings}, context=context)
        return self.model_copy(
            update={"params": params, "initializer": self.initializer.model_copy(update={"search": None})}
        )
