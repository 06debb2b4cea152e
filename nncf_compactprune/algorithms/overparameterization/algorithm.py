"""``linear_overparameterization``: Boosting Pruned Networks with Linear Over-parameterization (Qian et al. 2022, arXiv
2204.11444).

The paper expands each compact layer of a pruned network into consecutive linear layers without changing its output,
fine-tunes with similarity-preserving distillation from the dense network's layers, and merges the layers back.

Deviations, as only the paper's abstract was at hand: by default the outer factors are those that give all directions of
a step the same size, and none is stored (:mod:`.orthogonal`), as trained factors stay behind plain training; a sum of
parallel branches is a second form (:mod:`.branches`); factors and branches are merged into one weight at every step
instead of run (same function, same gradients; ``"mode": "chain"`` runs factors one after another); a random part of
the core that the merge cancels (``core_scale``, see :func:`.factors.factorise`); decay of the merged weight;
distillation also from logits, and by itself; similarities of averaged-down features, and their mean
instead of their sum over layers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.optim import Optimizer

from nncf_compactprune.algorithms.base import Begins, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.overparameterization.branches import BranchedWeight
from nncf_compactprune.algorithms.overparameterization.config import OverparameterizationConfig
from nncf_compactprune.algorithms.overparameterization.distillation import Distillation, digest
from nncf_compactprune.algorithms.overparameterization.expandable import (
    compare,
    last_of_each_resolution,
    select_layers,
    written_over,
)
from nncf_compactprune.algorithms.overparameterization.factor_groups import FactorGroups
from nncf_compactprune.algorithms.overparameterization.factor_hooks import FactorizedWeight
from nncf_compactprune.algorithms.overparameterization.factors import Geometry
from nncf_compactprune.algorithms.overparameterization.orthogonal import OrthogonalSteps
from nncf_compactprune.algorithms.overparameterization.reparameterization import Reparameterization, fold
from nncf_compactprune.algorithms.overparameterization.weight_hooks import ReplacedWeight
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.decide.scopes import operations_by_parameter
from nncf_compactprune.errors import CompactPruneError, DistillationError
from nncf_compactprune.host.calls import outputs
from nncf_compactprune.host.optimizers import as_sequence, held, holder
from nncf_compactprune.host.tensors import copy_in
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

WITH_FACTORS = ("factors", "branches")  # forms with several parameters for a weight


class LinearOverparameterization(CompressionAlgorithm):
    """Expands layers while they are fine-tuned, distils from the dense network, merges in the end."""

    name = "linear_overparameterization"
    summary = "Fine-tuning with linearly expanded layers and similarity-preserving distillation (arXiv 2204.11444)"
    Config: ClassVar[type[AlgorithmConfig]] = OverparameterizationConfig
    config: OverparameterizationConfig
    #: ``similarity_weight`` is that of one layer and of batches of 128; otherwise it is that of the loss as it is
    similarity_per_layer: ClassVar[bool] = False

    def __init__(self, config: OverparameterizationConfig, context: Context) -> None:
        super().__init__(config, context)
        self._teacher: nn.Module | None = None
        self._teacher_digest: str | None = None
        self._layers: dict[str, str] = {}
        self._candidates = 0
        self._weights: Reparameterization | None = None
        self._distillation: Distillation | None = None
        self._groups: list[FactorGroups] = []
        self._orthogonal: list[OrthogonalSteps] = []
        self._advised = False
        self._first_epoch: int | None = None
        self._factor = 1.0
        self._active = False
        self._stripped = False
        self._stepped = False
        self._last: dict[str, Tensor] = {}

    # -- life ----------------------------------------------------------------------------------------------------

    def capture(self) -> None:
        if self.config.distillation.active and self.context.teacher is None:
            self._teacher = copy.deepcopy(self.context.model)
            self._teacher.requires_grad_(False)

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        if state is not None and state["stripped"]:
            self._stripped = True
            return
        params, scopes = self.config.params, (self.config.ignored_scopes, self.config.target_scopes)
        self._layers, self._candidates = select_layers(
            self.context.model, self.context.example_inputs, *scopes, params.skip_first, params.skip_last
        )
        teacher = self.context.teacher if self.context.teacher is not None else self._teacher
        if self.config.distillation.active and teacher is not None:
            self._teacher_digest = digest(teacher)
        if state is not None:
            self._resume(state)
        try:
            if params.form in WITH_FACTORS:
                self._expand()
            if self.config.distillation.active and teacher is not None:
                distillation, compared = self.config.distillation, self._compared_layers()
                self._distillation = Distillation(
                    self.context.model,
                    teacher,
                    compared,
                    written_over=written_over(self.context.model, self.context.example_inputs, compared),
                    logits=distillation.logits_weight > 0,
                    classes=self._classes(),
                    precision=distillation.teacher_precision,
                    feature_size=distillation.feature_size,
                )
        except BaseException:
            self._end(keep_training=False)
            raise
        self._active = True
        self._adopt_optimizer()

    @property
    def settled(self) -> bool:
        return self._stripped

    def lets_begin(self, other: Begins) -> bool:
        """Where weights stay one parameter each, what acts on the weights of the final shapes joins the training."""
        one_weight = self.config.params.form not in WITH_FACTORS
        return self.settled or (one_weight and other >= Begins.AFTER_CUTS)

    def attached(self) -> None:
        self._adopt_optimizer()

    def epoch_step(self, epoch: int) -> None:
        self._tell_of_idle_teacher()
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._factor = self.config.distillation.factor(epoch - self._first_epoch)
        if self._distillation is not None and self._factor == 0:
            self._distillation.remove()
            self._distillation = None

    def loss(self) -> Tensor | float:
        self._advise_on_optimizer()
        total: Tensor | float = 0.0
        decay = self.config.params.weight_decay
        if decay and self._weights is not None:
            total = total + sum(weight.square().sum() for weight in self._weights.merged.values()) * (decay / 2)
        if self._distillation is not None:
            distillation = self.config.distillation
            weights = {"similarity": distillation.similarity_weight, "logits": distillation.logits_weight}
            if self.similarity_per_layer:  # the loss is a mean over layers, and falls with the batch size as 1 / b
                weights["similarity"] *= self._distillation.compared * self._distillation.batch / 128
            for kind, loss in self._distillation.losses(distillation.temperature).items():
                total = total + self._factor * weights[kind] * loss
                self._last[kind] = loss.detach()  # a float only when asked for: that would wait for the device
        return total

    def step(self, step: int) -> None:
        self._stepped = True

    def strip(self) -> None:
        self._tell_of_idle_teacher()
        if self._active:
            self._end(keep_training=True)
        self._active, self._stripped = False, True

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED  # nothing is left to compress; this is recovery

    def statistics(self) -> Mapping[str, Any]:
        figures: dict[str, Any] = {}
        if self._weights is not None:
            figures["layers expanded"] = f"{len(self._layers)} of {self._candidates}"
        if self._orthogonal:
            turned = sum(steps.layers for steps in self._orthogonal)
            figures["orthogonal steps"] = f"{turned} of {self._candidates} layers"
        if self._weights is not None:
            figures[self.config.params.form] = (
                f"{sum(factor.numel() for _, factor in self._weights.factors):,} parameters"
            )
        if self._distillation is not None:
            figures["distillation"] = f"{self._factor:.0%} of its weight"
        figures.update({f"{kind} loss": f"{float(value):.3e}" for kind, value in self._last.items()})
        return figures

    def get_state(self) -> dict[str, Any]:
        return {
            "layers": list(self._layers),
            "form": self._form,
            "first_epoch": self._first_epoch,
            "teacher": self._teacher_digest,
            "stripped": self._stripped,
        }

    # -- how -----------------------------------------------------------------------------------------------------

    def _compared_layers(self) -> list[str]:
        names, distillation = list(self._layers.values()), self.config.distillation
        if not distillation.similarity_weight:
            return []
        if distillation.layers == "all":
            return names
        return last_of_each_resolution(self.context.model, self.context.example_inputs, names)

    def _classes(self) -> Sequence[int]:
        """The dense network's classes that the model still has; empty where it has all."""
        plan = plan_of(self.context.model)
        return () if plan is None else plan.output_classes

    def _expand(self) -> None:
        """Installs factors or branches, and checks that the network computes what it computed."""
        model, params, example = self.context.model, self.config.params, self.context.example_inputs
        modules = {weight: model.get_submodule(name) for weight, name in self._layers.items()}
        operations = operations_by_parameter(model, example) if params.mode == "chain" else None
        before = outputs(model, example)

        def hook(geometry: Geometry) -> ReplacedWeight:
            if params.form == "branches":
                return BranchedWeight(geometry)
            return FactorizedWeight(geometry, params.expansion, params.mode, params.core_scale)

        keep_merged = bool(params.weight_decay)
        self._weights = Reparameterization(model, modules, hook, operations=operations, keep_merged=keep_merged)
        compare(before, outputs(model, example))
        idle = [name for name, hook in self._weights.hooks.items() if not hook.used]
        if idle:
            msg = (
                f"'{idle[0]}': NNCF's hooks see no operation that uses this parameter. Add its layer to ignored_scopes."
            )
            raise CompactPruneError(msg)
        shadow = self._shadow
        if shadow is not None:
            copies = {weight: shadow.get_submodule(name) for weight, name in self._layers.items()}
            Reparameterization(shadow, copies, hook, operations=operations)
        self._adopt_optimizer()

    @property
    def _shadow(self) -> nn.Module | None:
        """The EMA copy itself, out of its holder."""
        ema = self.context.ema
        return None if ema is None else copy_in(ema, self.context.model)

    @property
    def _form(self) -> str:
        """With what resumed runs must have in common."""
        params = self.config.params
        return f'"factors" with expansion {params.expansion}' if params.form == "factors" else f'"{params.form}"'

    def _tell_of_idle_teacher(self) -> None:
        if self._stepped and self._distillation is not None and not self._distillation.heard:
            self._stepped = False  # once an epoch
            nncf_logger.warning(
                f"{self.name}: the teacher taught nothing, as nothing called the model in training: it listens to "
                "calls of the model that create_compressed_model returned, not to calls of its parts. Call it itself, "
                "or put what you call into its forward."
            )

    def _advise_on_optimizer(self) -> None:
        """Once, when training goes on without the steps that were asked for."""
        if not self._active or self._advised or self.config.params.form != "orthogonal" or self._orthogonal:
            return
        self._advised = True
        attached = as_sequence(self.context.optimizer)
        kinds = " and ".join(type(optimizer).__name__ for optimizer in attached)
        cause = f"{kinds} {'is' if len(attached) == 1 else 'are'} no SGD" if attached else "no optimizer was attached"
        nncf_logger.warning(
            f"{self.name}: weights train by the optimizer's own steps, as {cause}. For orthogonal steps call "
            'ctrl.attach(optimizer=...) with a torch.optim.SGD; with another optimizer set params.form to "none".'
        )

    def _adopt_optimizer(self) -> None:
        attached = as_sequence(self.context.optimizer)
        if not attached:
            return
        if self.config.params.form == "orthogonal" and self._active:
            self._step_orthogonally(attached)
        if self._weights is None or any(groups.optimizer in attached for groups in self._groups):
            return
        parameters = dict(self.context.model.named_parameters())
        pairs: dict[Optimizer, list[tuple[nn.Parameter, nn.Parameter]]] = defaultdict(list)
        for name, factor in self._weights.factors:
            weight = parameters[name]
            pairs[holder(attached, factor) or holder(attached, weight) or attached[0]].append((weight, factor))
        own_decay = self.config.params.weight_decay is not None
        self._groups = [FactorGroups(optimizer, part, own_decay=own_decay) for optimizer, part in pairs.items()]

    def _step_orthogonally(self, attached: Sequence[Optimizer]) -> None:
        if any(steps.optimizer in attached for steps in self._orthogonal):
            return
        for steps in self._orthogonal:
            steps.remove()
        parameters = dict(self.context.model.named_parameters())
        geometries = {parameters[w]: Geometry.of(self.context.model.get_submodule(n)) for w, n in self._layers.items()}
        self._orthogonal = []
        for optimizer in filter(OrthogonalSteps.fit, attached):
            weights = {weight: geometry for weight, geometry in geometries.items() if id(weight) in held(optimizer)}
            self._orthogonal.append(OrthogonalSteps(optimizer, weights, self.config.params.step_size))

    def _end(self, *, keep_training: bool) -> None:
        """Takes everything off, at the end or after a failed start."""
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None
        for groups in self._groups:
            groups.release(anew=keep_training)
        for steps in self._orthogonal:
            steps.remove()
        self._groups, self._orthogonal = [], []
        if self._weights is not None:
            self._weights.remove(keep_training=keep_training)
            self._weights = None
            if self._shadow is not None:
                fold(self._shadow, write=keep_training)
        self._teacher = None

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._first_epoch = state["first_epoch"]
        expected = (state["layers"], state["form"])
        got = (list(self._layers), self._form)
        if expected != got:
            msg = (
                f"compression_state: {self.name} had {len(expected[0])} layers of form {expected[1]}, but the "
                f"configuration gives {len(got[0])} of form {got[1]}. Use the configuration of that run."
            )
            raise CompactPruneError(msg)
        if state["teacher"] is not None and state["teacher"] != self._teacher_digest:
            msg = (
                "compression_state: the teacher differs from the one in that run. Load the dense model's trained "
                "weights before create_compressed_model, or give that run's teacher."
            )
            raise DistillationError(msg)


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`LinearOverparameterization`."""
    return [LinearOverparameterization]
