"""The keys of NNCF 2.x's sparsity entries, with the defaults of NNCF 2.19."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from nncf_compactprune.config import Nncf2Entry, Section, Spelling, Whole

Level = Annotated[float, Field(ge=0, lt=1)]


class SparsityParams(Section):
    """How the level of sparsity rises.

    :param sparsity_level_setting_mode: ``"global"``: the level is that of all weights together; ``"local"``: of each
        layer.
    :param schedule: how the level rises to the target.
    :param sparsity_target: share of zeros in the end.
    :param sparsity_target_epoch: epoch in which the target is reached, from 0.
    :param sparsity_freeze_epoch: epoch from which the masks stay as they are.
    :param multistep_steps: of ``"multistep"``: epochs in which the level changes.
    :param multistep_sparsity_levels: the levels before, between and after them.
    :param update_per_optimizer_step: of ``"polynomial"``: the level also rises within an epoch.
    :param steps_per_epoch: for that; counted in the first epoch, where None.
    :param power: of ``"polynomial"``.
    :param concave: of ``"polynomial"``: fast at first; else slow at first.
    :param patience: of ``"adaptive"``: epochs at a level before the next.
    """

    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = "polynomial"
    sparsity_target: Level = 0.5
    sparsity_target_epoch: Whole = Field(default=90, ge=0)
    sparsity_freeze_epoch: Whole = Field(default=100, ge=0)
    multistep_steps: list[Whole] = Field(default_factory=lambda: [90])
    multistep_sparsity_levels: list[Level] = Field(default_factory=lambda: [0.1, 0.5])
    update_per_optimizer_step: bool = False
    steps_per_epoch: Whole | None = Field(default=None, ge=1)
    power: float = Field(default=0.9, gt=0)
    concave: bool = True
    patience: Whole = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_level_more(self) -> SparsityParams:
        steps, levels = len(self.multistep_steps), len(self.multistep_sparsity_levels)
        if self.schedule == "multistep" and levels != steps + 1:
            msg = f"'multistep_sparsity_levels' must be one more than 'multistep_steps', got {levels} and {steps}."
            raise ValueError(msg)
        return self

    @property
    def target(self) -> float:
        """The level in the end."""
        return self.multistep_sparsity_levels[-1] if self.schedule == "multistep" else self.sparsity_target


class MagnitudeParams(SparsityParams):
    """Which weights go.

    :param weight_importance: the magnitude itself, or divided by the L2 norm of the layer's weights.
    """

    weight_importance: Literal["abs", "normed_abs"] = "normed_abs"

    @model_validator(mode="after")
    def _adapts_to_nothing(self) -> MagnitudeParams:
        if self.schedule == "adaptive":
            msg = '"adaptive" waits for learned masks, so it belongs to "rb_sparsity". Use "polynomial".'
            raise ValueError(msg)
        return self


class RBParams(SparsityParams):
    """Parameters of ``rb_sparsity``."""

    schedule: Literal["polynomial", "exponential", "adaptive", "multistep"] = "exponential"

    @model_validator(mode="after")
    def _is_global(self) -> RBParams:
        if self.sparsity_level_setting_mode == "local":
            msg = 'NNCF learns masks for a level of all layers together. Use "global", or "magnitude_sparsity".'
            raise ValueError(msg)
        return self


class SparsityEntry(Nncf2Entry):
    """What both entries with a schedule have.

    :param sparsity_init: level at the start.
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {
        "params.sparsity_steps": Spelling("params.sparsity_target_epoch"),
        "params.sparsity_training_steps": Spelling("params.sparsity_freeze_epoch"),
        "params.steps": Spelling("params.multistep_steps"),
        "params.sparsity_levels": Spelling("params.multistep_sparsity_levels"),
    }
    leftovers: ClassVar[Mapping[str, str]] = {
        "params.check_sparsity_masks": "all processes learn the same masks, as gradients are averaged",
    }

    sparsity_init: Level = 0.0
    params: SparsityParams = SparsityParams()


class MagnitudeSparsityConfig(SparsityEntry):
    """A ``magnitude_sparsity`` entry."""

    params: MagnitudeParams = MagnitudeParams()


class RBSparsityConfig(SparsityEntry):
    """An ``rb_sparsity`` entry.

    :param compression_lr_multiplier: factor of the gradients of the masks; that of the top level, where None.
    """

    params: RBParams = RBParams()
    compression_lr_multiplier: float | None = Field(default=None, ge=0)


class ConstSparsityConfig(Nncf2Entry):
    """A ``const_sparsity`` entry."""
