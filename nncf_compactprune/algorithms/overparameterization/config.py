"""The configuration entry of ``linear_overparameterization``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from nncf_compactprune.algorithms.overparameterization.distillation import Precision
from nncf_compactprune.algorithms.overparameterization.factor_hooks import Mode
from nncf_compactprune.config import AlgorithmConfig, Section

Form = Literal["orthogonal", "branches", "factors", "none"]
#: keys that only some forms read, and which
FORMS_OF: dict[str, tuple[Form, ...]] = {
    "step_size": ("orthogonal",),
    "expansion": ("factors",),
    "mode": ("factors",),
    "core_scale": ("factors",),
    "weight_decay": ("factors", "branches"),
}


class OverparameterizationParams(Section):
    """How layers are over-parameterised while they train.

    :param form: ``"orthogonal"``: the outer factors that give all directions of a step the same size, anew at every
        step (:mod:`.orthogonal`), in the SGD that ``ctrl.attach(optimizer=...)`` names; ``"branches"``: a sum of the
        kernel, a 1×1 convolution and the identity, each with learned channel scales (:mod:`.branches`);
        ``"factors"``: a product of three. Both are merged at the end. ``"none"``: layers stay as they are, for
        distillation alone. The keys below belong to some of the forms.
    :param step_size: of ``"orthogonal"``: without momentum, a step moves a weight by the learning rate times this share
        of its norm.
    :param expansion: of ``"factors"``: the inner layers are r times wider.
    :param mode: of ``"factors"``: ``"merged"`` multiplies them and runs one layer; ``"chain"`` runs three, many
        times slower.
    :param skip_first: leave the network's first layer as it is.
    :param skip_last: leave its last layer (the classifier) as it is; neither is it distilled.
    :param core_scale: of ``"factors"``: random part of the core, relative to the weight; 0: none, and then r has no
        effect under SGD.
    :param weight_decay: of the merged weights of ``"factors"`` and ``"branches"``, through ``ctrl.loss()``; null leaves
        decay to the optimizer, on what trains.
    """

    form: Form = "orthogonal"
    step_size: float = Field(default=0.08, gt=0)
    expansion: int = Field(default=4, ge=1)
    mode: Mode = "merged"
    skip_first: bool = False
    skip_last: bool = True
    core_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _keys_of_the_form(self) -> OverparameterizationParams:
        for key, forms in FORMS_OF.items():
            if key in self.model_fields_set and self.form not in forms:
                belongs = " or ".join(f'"{form}"' for form in forms)
                msg = (
                    f'params.{key} belongs to "form": {belongs}, but the form is "{self.form}". Remove the key, or '
                    "set that form."
                )
                raise ValueError(msg)
        return self


class DistillationConfig(Section):
    """What the teacher adds to the loss.

    :param similarity_weight: of the similarity-preserving loss (mean over layers); 0 is off. The default is for batches
        of about 128 images; the loss falls with the batch size as 1 / b.
    :param layers: whose outputs are compared: ``"all"`` expandable layers, or the last one of each resolution
        (``"stages"``), which costs a fraction.
    :param feature_size: feature maps are averaged down to this many positions a side first; null: none are, as in the
        original, which costs about as much again as training itself.
    :param logits_weight: of the logits' divergence; 0 is off.
    :param temperature: T of the logits' divergence.
    :param schedule: both weights stay, or fall to 0 in ``schedule_epochs`` epochs.
    :param schedule_epochs: for ``"linear"`` and ``"cosine"``; the teacher does not run any more after.
    :param teacher_precision: ``"same"`` as the student; ``"auto"``, too, but bfloat16 where training is in float32 and
        the device has instructions for it; or autocast to half precision.
    """

    similarity_weight: float = Field(default=30000.0, ge=0)
    layers: Literal["all", "stages"] = "all"
    feature_size: int | None = Field(default=8, ge=1)
    logits_weight: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_epochs: int = Field(default=10, ge=1)
    teacher_precision: Precision = "same"

    @property
    def active(self) -> bool:
        """Whether there is a teacher at all."""
        return self.similarity_weight > 0 or self.logits_weight > 0

    def factor(self, epochs: int) -> float:
        """What is left of the weights after so many epochs, in [0, 1]."""
        if self.schedule == "constant":
            return 1.0
        done = min(epochs / self.schedule_epochs, 1.0)
        return 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


class OverparameterizationConfig(AlgorithmConfig):
    """A ``linear_overparameterization`` entry."""

    unread: ClassVar[Mapping[str, str]] = {
        "initializer": "there is nothing to initialize here. Give BatchNorm adaptation to the pruning entry."
    }
    params: OverparameterizationParams = OverparameterizationParams()
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _does_something(self) -> OverparameterizationConfig:
        if self.params.form == "none" and not self.distillation.active:
            msg = 'nothing to do: expected a "form" other than "none", or a weight of the distillation above 0.'
            raise ValueError(msg)
        return self
