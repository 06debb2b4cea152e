"""``linear_overparameterization``: Boosting Pruned Networks with Linear Over-parameterization (Qu et al. 2022, arXiv
2204.11444).

The paper expands each compact layer of a pruned network into consecutive linear layers without changing its output,
fine-tunes with similarity-preserving distillation from the dense network's layers, and merges the layers back.

Deviations, as only the paper's abstract was at hand: the factors are merged into one weight at every step instead of
run one after another (same function, same gradients; ``"mode": "chain"`` runs them); a random part of the core that
the merge cancels (``core_scale``, see :func:`nncf_compactprune.factors.factorise`); decay of the merged weight;
distillation also from logits, and without expansion; the mean instead of the sum over layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nncf_compactprune.algorithms.base import CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.factor_groups import FactorGroups
from nncf_compactprune.channels.tensors import named_modules
from nncf_compactprune.channels.trace import call_model, evaluating
from nncf_compactprune.config import AlgorithmConfig, Section
from nncf_compactprune.distillation import Distillation, Precision, digest
from nncf_compactprune.errors import CompactPruneError, DistillationError, ScopeError, SelfCheckError
from nncf_compactprune.factors import LAYERS
from nncf_compactprune.hookspecs import Algorithm, hookimpl
from nncf_compactprune.reparameterization import Mode, Reparameterization, fold
from nncf_compactprune.scopes import operations_by_parameter, parameters_in_scope

START_TOLERANCE = 1e-4  # of whole networks; one layer keeps 1e-6


class OverparameterizationParams(Section):
    """How layers are expanded.

    :param expansion: r: the inner layers are that many times wider; null expands nothing (distillation alone).
    :param mode: ``"merged"`` multiplies the factors and runs one layer; ``"chain"`` runs three, many times slower.
    :param skip_first: leave the network's first layer as it is.
    :param skip_last: leave its last layer (the classifier) as it is; neither is it distilled.
    :param core_scale: random part of the core, relative to the weight; 0: none, and then r has no effect under SGD.
    :param weight_decay: of the merged weights, through ``ctrl.loss()``; null leaves decay to the optimizer, on factors.
    """

    expansion: int | None = Field(default=4, ge=1)
    mode: Mode = "merged"
    skip_first: bool = False
    skip_last: bool = True
    core_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class DistillationConfig(Section):
    """What the teacher adds to the loss.

    :param similarity_weight: of the similarity-preserving loss (mean over layers); 0 is off.
    :param logits_weight: of the logits' divergence; 0 is off.
    :param temperature: T of the logits' divergence.
    :param schedule: both weights stay, or fall to 0 in ``schedule_epochs`` epochs.
    :param schedule_epochs: for ``"linear"`` and ``"cosine"``; the teacher does not run any more after.
    :param teacher_precision: ``"same"`` as the student, or autocast to half precision.
    """

    similarity_weight: float = Field(default=0.0, ge=0)
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

    params: OverparameterizationParams = OverparameterizationParams()
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _does_something(self) -> OverparameterizationConfig:
        if self.params.expansion is None and not self.distillation.active:
            msg = 'nothing to do: expected an "expansion", or a "similarity_weight" or "logits_weight" above 0.'
            raise ValueError(msg)
        if self.params.expansion is None and self.params.weight_decay is not None:
            msg = 'params.weight_decay is that of merged weights: expected an "expansion" too.'
            raise ValueError(msg)
        return self


class LinearOverparameterization(CompressionAlgorithm):
    """Expands layers while they are fine-tuned, distils from the dense network, merges in the end."""

    name = "linear_overparameterization"
    summary = "Fine-tuning with linearly expanded layers and similarity-preserving distillation (arXiv 2204.11444)"
    Config: ClassVar[type[AlgorithmConfig]] = OverparameterizationConfig
    config: OverparameterizationConfig

    def __init__(self, config: OverparameterizationConfig, context: Context) -> None:
        super().__init__(config, context)
        self._teacher: nn.Module | None = None
        self._teacher_digest: str | None = None
        self._layers: dict[str, str] = {}
        self._candidates = 0
        self._weights: Reparameterization | None = None
        self._distillation: Distillation | None = None
        self._groups: FactorGroups | None = None
        self._first_epoch: int | None = None
        self._factor = 1.0
        self._active = False
        self._stripped = False
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
        self._layers = self._select()
        teacher = self.context.teacher if self.context.teacher is not None else self._teacher
        if self.config.distillation.active and teacher is not None:
            self._teacher_digest = digest(teacher)
        if state is not None:
            self._resume(state)
        try:
            if self.config.params.expansion is not None:
                self._expand(self.config.params.expansion)
            if self.config.distillation.active and teacher is not None:
                distillation = self.config.distillation
                self._distillation = Distillation(
                    self.context.model,
                    teacher,
                    list(self._layers.values()) if distillation.similarity_weight else [],
                    logits=distillation.logits_weight > 0,
                    precision=distillation.teacher_precision,
                )
        except BaseException:
            self._end(keep_training=False)
            raise
        self._active = True

    @property
    def settled(self) -> bool:
        return self._stripped

    def epoch_step(self, epoch: int) -> None:
        self._adopt_optimizer()
        if self._first_epoch is None:
            self._first_epoch = epoch
        self._factor = self.config.distillation.factor(epoch - self._first_epoch)
        if self._distillation is not None and self._factor == 0:
            self._distillation.remove()
            self._distillation = None

    def step(self, step: int) -> None:
        self._adopt_optimizer()

    def loss(self) -> Tensor | float:
        total: Tensor | float = 0.0
        decay = self.config.params.weight_decay
        if decay and self._weights is not None:
            total = total + sum(weight.square().sum() for weight in self._weights.merged.values()) * (decay / 2)
        if self._distillation is not None:
            distillation = self.config.distillation
            weights = {"similarity": distillation.similarity_weight, "logits": distillation.logits_weight}
            for kind, loss in self._distillation.losses(distillation.temperature).items():
                total = total + self._factor * weights[kind] * loss
                self._last[kind] = loss.detach()  # a float only when asked for: that would wait for the device
        return total

    def strip(self) -> None:
        if self._active:
            self._end(keep_training=True)
        self._active, self._stripped = False, True

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED  # nothing is left to compress; this is recovery

    def statistics(self) -> Mapping[str, Any]:
        expanded = len(self._layers) if self.config.params.expansion is not None else 0
        figures: dict[str, Any] = {"layers expanded": f"{expanded} of {self._candidates}"}
        if self._weights is not None:
            figures["factors"] = f"{sum(factor.numel() for _, factor in self._weights.factors):,} parameters"
        if self._distillation is not None:
            figures["distillation"] = f"{self._factor:.0%} of its weight"
        figures.update({f"{kind} loss": f"{float(value):.3e}" for kind, value in self._last.items()})
        return figures

    def get_state(self) -> dict[str, Any]:
        return {
            "layers": list(self._layers),
            "expansion": self.config.params.expansion,
            "first_epoch": self._first_epoch,
            "teacher": self._teacher_digest,
            "stripped": self._stripped,
        }

    # -- how -----------------------------------------------------------------------------------------------------

    def _select(self) -> dict[str, str]:
        """The layers to expand and to distil, in the order of execution: weight name to module name."""
        model, params = self.context.model, self.config.params
        candidates = self._expandable()
        self._candidates = len(candidates)
        chosen = list(candidates)
        chosen = chosen[1 if params.skip_first else 0 : len(chosen) - 1 if params.skip_last else len(chosen)]
        scopes = self.config.ignored_scopes, self.config.target_scopes
        allowed = parameters_in_scope(model, self.context.example_inputs, chosen, *scopes)
        layers = {weight: candidates[weight] for weight in chosen if weight in allowed}
        if not layers:
            msg = (
                f"no layer to expand in {type(model).__name__}: {len(candidates)} trainable convolution and linear "
                f"layers run, {len(chosen)} without the first and last (skip_first={params.skip_first}, skip_last="
                f"{params.skip_last}), 0 in scope. Widen target_scopes or ignored_scopes."
            )
            raise ScopeError(msg)
        return layers

    def _expandable(self) -> dict[str, str]:
        """Every layer that runs and whose weight is a trainable parameter of its own, in the order of execution."""
        model = self.context.model
        names = {id(module): name for name, module in named_modules(model)}
        first_name = {id(parameter): name for name, parameter in model.named_parameters()}
        order: dict[str, str] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            weight = module._parameters.get("weight")
            if weight is not None and weight.requires_grad and weight.is_floating_point():
                order.setdefault(first_name[id(weight)], names[id(module)])

        handles = [m.register_forward_hook(note) for _, m in named_modules(model) if isinstance(m, LAYERS)]
        try:
            with evaluating(model):
                call_model(model, self.context.example_inputs)
        finally:
            for handle in handles:
                handle.remove()
        return order

    def _expand(self, expansion: int) -> None:
        """Installs the factors, and checks that the network computes what it computed."""
        model, params, example = self.context.model, self.config.params, self.context.example_inputs
        modules = {weight: model.get_submodule(name) for weight, name in self._layers.items()}
        operations = operations_by_parameter(model, example) if params.mode == "chain" else None
        before = _outputs(model, example)

        def expanded(root: nn.Module, layers: Mapping[str, nn.Module], *, keep_merged: bool) -> Reparameterization:
            return Reparameterization(
                root,
                layers,
                expansion,
                mode=params.mode,
                core_scale=params.core_scale,
                operations=operations,
                keep_merged=keep_merged,
            )

        self._weights = expanded(model, modules, keep_merged=bool(params.weight_decay))
        _compare(before, _outputs(model, example))
        idle = [name for name, hook in self._weights.hooks.items() if not hook.calls]
        if idle:
            msg = (
                f"'{idle[0]}' is not used as a parameter of an operation that NNCF's hooks see. Leave its layer out by "
                "ignored_scopes."
            )
            raise CompactPruneError(msg)
        shadow = self._shadow
        if shadow is not None:
            expanded(shadow, {w: shadow.get_submodule(n) for w, n in self._layers.items()}, keep_merged=False)
        self._adopt_optimizer()

    @property
    def _shadow(self) -> nn.Module | None:
        """The EMA copy itself, out of its holder."""
        ema = self.context.ema
        return None if ema is None else getattr(ema, "module", ema)

    def _adopt_optimizer(self) -> None:
        optimizer = self.context.optimizer
        if self._weights is None or optimizer is None:
            return
        if self._groups is not None and self._groups.optimizer is optimizer:
            return
        parameters = dict(self.context.model.named_parameters())
        pairs = [(parameters[name], factor) for name, factor in self._weights.factors]
        self._groups = FactorGroups(optimizer, pairs, own_decay=self.config.params.weight_decay is not None)

    def _end(self, *, keep_training: bool) -> None:
        """Takes everything off, at the end or after a failed start."""
        if self._distillation is not None:
            self._distillation.remove()
            self._distillation = None
        if self._groups is not None:
            self._groups.release()
            self._groups = None
        if self._weights is not None:
            self._weights.remove(keep_training=keep_training)
            self._weights = None
            if self._shadow is not None:
                fold(self._shadow, write=keep_training)
        self._teacher = None

    def _resume(self, state: Mapping[str, Any]) -> None:
        self._first_epoch = state["first_epoch"]
        expected = (state["layers"], state["expansion"])
        got = (list(self._layers), self.config.params.expansion)
        if expected != got:
            msg = (
                f"compression_state: {self.name} had {len(expected[0])} layers with expansion {expected[1]}, but the "
                f"configuration gives {len(got[0])} with {got[1]}. Use the configuration of that run."
            )
            raise CompactPruneError(msg)
        if state["teacher"] is not None and state["teacher"] != self._teacher_digest:
            msg = (
                "compression_state: the teacher is another one than in that run. Load the dense model's trained "
                "weights before create_compressed_model, or give that run's teacher."
            )
            raise DistillationError(msg)


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with evaluating(model):
        return [leaf for leaf in tree_leaves(call_model(model, example_inputs)) if isinstance(leaf, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    """:raises SelfCheckError: an output changed."""
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point():
            continue
        tolerance = START_TOLERANCE if torch.finfo(old.dtype).eps < 1e-6 else math.sqrt(torch.finfo(old.dtype).eps)
        error = float((new - old).abs().max() / old.abs().max().clamp_min(torch.finfo(old.dtype).tiny))
        if not error <= tolerance:
            msg = (
                f"self-check: expanding the layers changed the output by {error:.1e} of its largest value, expected at "
                f"most {tolerance:.0e}. The model was restored. Please report the architecture."
            )
            raise SelfCheckError(msg)


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`LinearOverparameterization`."""
    return [LinearOverparameterization]
