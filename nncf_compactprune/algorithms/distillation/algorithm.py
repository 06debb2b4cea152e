"""``knowledge_distillation`` (NNCF 2.x): the distance to the dense network's outputs is added to the loss, from the
first epoch on, beside any other algorithm of the list.

Deviation: the teacher is in eval mode. NNCF 2.x left it in train mode, so its BatchNorm saw each batch by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import nncf
from nncf.common.logging import nncf_logger
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune.algorithms.base import Begins, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.overparameterization.distillation import Distillation, digest
from nncf_compactprune.config import AlgorithmConfig, Nncf2Entry, Spelling
from nncf_compactprune.errors import DistillationError
from nncf_compactprune.host.torch_internals import results_of
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

_WHOLE = "it compares the outputs of the whole network."


def _kind(is_softmax: Any) -> Any:
    return {True: "softmax", False: "mse"}.get(is_softmax, is_softmax) if isinstance(is_softmax, bool) else is_softmax


class KnowledgeDistillationConfig(Nncf2Entry):
    """A ``knowledge_distillation`` entry.

    :param type: ``"softmax"`` compares class scores ``[batch, classes]``, ``"mse"`` any output.
    :param scale: factor of the loss.
    :param temperature: of ``"softmax"``: scores are divided by it.
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {"is_softmax": Spelling("type", _kind)}
    unread: ClassVar[Mapping[str, str]] = {
        "ignored_scopes": _WHOLE,
        "target_scopes": _WHOLE,
        "validate_scopes": _WHOLE,
        "initializer": "it changes no weight.",
    }

    type: Literal["softmax", "mse"]
    scale: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _temperature_is_of_softmax(self) -> KnowledgeDistillationConfig:
        if self.type == "mse" and "temperature" in self.model_fields_set:
            msg = "'temperature' belongs to \"softmax\". Leave it out."
            raise ValueError(msg)
        return self


class OutputPairs(Distillation):
    """Teacher and student side by side, whose outputs are kept.

    :param student: gets module hooks.
    :param teacher: is put into eval mode; runs without gradients.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._outputs: dict[str, Any] = {}
        super().__init__(student, teacher, [], logits=True)

    def _keep_scores(self, who: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._recording:
                self._outputs[who] = output

        return keep

    def _forget(self) -> None:
        super()._forget()
        self._outputs = {}

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Outputs of student and teacher in the last forward, those that training moves; none before the first."""
        if len(self._outputs) < 2:
            return []
        student, teacher = (results_of(self._outputs[who]) for who in ("student", "teacher"))
        if len(student) != len(teacher):
            msg = (
                f"teacher: it returns {len(teacher)} tensors, the network {len(student)}. Give a teacher that returns "
                "what the network does."
            )
            raise DistillationError(msg)
        return [(s, t) for s, t in zip(student, teacher, strict=True) if s.requires_grad]


class KnowledgeDistillation(CompressionAlgorithm):
    """Adds the distance to the dense network's outputs to the loss.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    name = "knowledge_distillation"
    summary = "The dense network teaches by its outputs, with NNCF 2.x's keys"
    Config: ClassVar[type[AlgorithmConfig]] = KnowledgeDistillationConfig
    begins: ClassVar[Begins] = Begins.AT_ONCE
    config: KnowledgeDistillationConfig

    def __init__(self, config: KnowledgeDistillationConfig, context: Context) -> None:
        super().__init__(config, context)
        self._teacher: nn.Module | None = None
        self._teacher_digest: str | None = None
        self._outputs: OutputPairs | None = None
        self._last: Tensor | None = None
        self._warned = False

    def capture(self) -> None:
        if self.context.teacher is None:
            self._teacher = copy.deepcopy(self.context.model)
            self._teacher.requires_grad_(False)
        else:
            self._teacher = self.context.teacher

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if self._teacher is None:
            msg = "call capture() first"
            raise nncf.InternalError(msg)
        self._teacher_digest = digest(self._teacher)
        if state is not None and state["teacher"] != self._teacher_digest:
            msg = (
                "compression_state: the teacher differs from the one in that run. Load the dense model's trained "
                "weights before create_compressed_model, or give that run's teacher."
            )
            raise DistillationError(msg)
        self._outputs = OutputPairs(self.context.model, self._teacher)

    def loss(self) -> Tensor | float:
        """The distance of the last forward in training mode."""
        pairs = self._outputs.pairs() if self._outputs is not None else []
        config = self.config
        usable = [(s, t) for s, t in pairs if (s.dim() == 2 if config.type == "softmax" else s.dim() > 1)]
        if not usable:
            self._warn(pairs)
            return 0.0
        one = self._cross_entropy if config.type == "softmax" else functional.mse_loss
        total = sum((one(s, t) for s, t in usable), usable[0][0].new_zeros(()))
        self._last = total.detach()
        return total * config.scale

    def _cross_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T² times the cross-entropy of the softened scores, mean over the batch (Hinton et al. 2015)."""
        temperature = self.config.temperature
        wanted = functional.softmax(teacher / temperature, dim=1)
        return functional.cross_entropy(student / temperature, wanted) * temperature**2

    def _warn(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if pairs and not self._warned:
            self._warned = True
            shapes = ", ".join(str(list(student.shape)) for student, _ in pairs[:3])
            hint = ' "mse" compares any output.' if self.config.type == "softmax" else ""
            nncf_logger.warning(
                f'knowledge_distillation: no output has the shape that "{self.config.type}" compares, got {shapes}. '
                f"The loss is 0.{hint}"
            )

    def strip(self) -> None:
        if self._outputs is not None:
            self._outputs.remove()
        self._outputs = self._teacher = None

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self) -> Mapping[str, Any]:
        shown = {} if self._last is None else {"loss": f"{float(self._last):.3e}"}
        return {"type": self.config.type, "scale": self.config.scale, **shown}

    def get_state(self) -> dict[str, Any]:
        return {"teacher": self._teacher_digest}


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`KnowledgeDistillation`."""
    return [KnowledgeDistillation]
