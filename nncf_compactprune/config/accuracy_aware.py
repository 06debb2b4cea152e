"""``"accuracy_aware_training"``: how much accuracy may be lost, and how the smallest network that holds it is found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nncf_compactprune.config.sections import Section, Whole

Mode = Literal["early_exit", "adaptive_compression_level"]
_OF_THE_SEARCH = (
    "initial_training_phase_epochs",
    "patience_epochs",
    "initial_compression_rate_step",
    "compression_rate_step_reduction_factor",
    "lr_reduction_factor",
    "minimal_compression_rate_step",
)
_NEEDED = {
    "early_exit": ("maximal_total_epochs",),
    "adaptive_compression_level": ("initial_training_phase_epochs", "patience_epochs"),
}


class AccuracyAwareParams(Section):
    """Parameters of both modes, with NNCF 2.x's names, defaults and meaning.

    :param maximal_relative_accuracy_degradation: allowed drop in percent of the uncompressed accuracy.
    :param maximal_absolute_accuracy_degradation: allowed drop in units of the accuracy.
    :param maximal_total_epochs: most epochs in all.
    :param initial_training_phase_epochs: most epochs before the search, at the rate that the algorithm's schedule has.
    :param patience_epochs: epochs at one rate before it counts as failed.
    :param initial_compression_rate_step: by how much the rate is raised or lowered at first.
    :param compression_rate_step_reduction_factor: what the step is multiplied by when the search turns around.
    :param lr_reduction_factor: what the learning rate is multiplied by then.
    :param minimal_compression_rate_step: a smaller step ends the search.
    """

    maximal_relative_accuracy_degradation: float | None = Field(default=None, ge=0)
    maximal_absolute_accuracy_degradation: float | None = Field(default=None, ge=0)
    maximal_total_epochs: Whole = Field(default=10000, ge=1)
    initial_training_phase_epochs: Whole = Field(default=5, ge=0)
    patience_epochs: Whole = Field(default=3, ge=1)
    initial_compression_rate_step: float = Field(default=0.1, gt=0, lt=1)
    compression_rate_step_reduction_factor: float = Field(default=0.5, gt=0, lt=1)
    lr_reduction_factor: float = Field(default=0.5, gt=0, le=1)
    minimal_compression_rate_step: float = Field(default=0.025, gt=0, lt=1)

    def tolerable(self, uncompressed: float) -> float:
        """The lowest accuracy that is allowed.

        :param uncompressed: accuracy of the uncompressed model, in any unit; larger is better.
        """
        if self.maximal_absolute_accuracy_degradation is not None:
            return uncompressed - self.maximal_absolute_accuracy_degradation
        return uncompressed - abs(uncompressed) * 0.01 * (self.maximal_relative_accuracy_degradation or 0.0)


class AccuracyAwareTraining(Section):
    """The section at the top level of a configuration.

    :param mode: ``"early_exit"`` trains until the fully compressed model is good enough,
        ``"adaptive_compression_level"`` searches for the largest compression rate that is.
    """

    mode: Mode
    params: AccuracyAwareParams

    @property
    def searches(self) -> bool:
        """Whether the compression rate is searched for."""
        return self.mode == "adaptive_compression_level"

    @model_validator(mode="after")
    def _params_of_the_mode(self) -> AccuracyAwareTraining:
        given = self.params.model_fields_set
        drops = sorted(key for key in given if key.endswith("_accuracy_degradation"))
        if len(drops) != 1:
            msg = (
                '"params" must say by how much the accuracy may fall: give "maximal_relative_accuracy_degradation" (in '
                f'percent) or "maximal_absolute_accuracy_degradation", got {" and ".join(drops) or "neither"}.'
            )
            raise ValueError(msg)
        problems = [f'"params" must give "{key}".' for key in _NEEDED[self.mode] if key not in given]
        if not self.searches:
            foreign = [key for key in _OF_THE_SEARCH if key in given]
            problems += [f'"{key}" belongs to mode "adaptive_compression_level".' for key in foreign]
        if problems:
            raise ValueError(" ".join(problems))
        return self
