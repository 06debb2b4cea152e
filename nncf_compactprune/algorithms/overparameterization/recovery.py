"""``recovery``: fine-tuning after a cut, taught by the dense network, with nothing to tune.

The same machinery as ``linear_overparameterization``, with the settings that were best when training was done
(``docs/recovery.md``): similarities of the last layer of each resolution (Tung & Mori 2019). Layers are not
over-parameterised, as no form of it gained at every budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from nncf.common.logging import nncf_logger
from pydantic import Field

from nncf_compactprune.algorithms.overparameterization.algorithm import LinearOverparameterization
from nncf_compactprune.algorithms.overparameterization.config import (
    DistillationConfig,
    Form,
    OverparameterizationConfig,
    OverparameterizationParams,
)
from nncf_compactprune.algorithms.overparameterization.distillation import Precision
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

ADVICE = (
    "recovery: the dense network teaches through ctrl.loss(). Start from SGD with momentum 0.9, a learning rate of "
    "0.015 for batches of 128 (in proportion for others), a cosine to 0 by step, and 10 epochs or more. Where the loss "
    "rises in the first steps, as with depthwise layers that were re-fitted, take a quarter of that rate."
)


class RecoveryParams(OverparameterizationParams):
    """How layers are over-parameterised: not at all, by default."""

    form: Form = "none"


class RecoveryDistillation(DistillationConfig):
    """What the teacher adds to the loss. ``similarity_weight`` is that of each layer here, for batches of 128 whatever
    their size is: a larger one makes training unstable, however many layers there are."""

    similarity_weight: float = Field(default=1600.0, ge=0)
    layers: Literal["all", "stages"] = "stages"
    teacher_precision: Precision = "auto"


class RecoveryConfig(OverparameterizationConfig):
    """A ``recovery`` entry."""

    params: RecoveryParams = RecoveryParams()
    distillation: RecoveryDistillation = RecoveryDistillation()


class Recovery(LinearOverparameterization):
    """Teaches the compact network by the dense one, until the run ends."""

    name = "recovery"
    summary = "Fine-tuning after pruning, taught by the dense network, with nothing to tune"
    Config: ClassVar[type[AlgorithmConfig]] = RecoveryConfig
    similarity_per_layer = True

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        super().prepare(state)
        if state is None:
            nncf_logger.info(ADVICE)


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`Recovery`."""
    return [Recovery]
