"""``catro``: Class-Aware Trace Ratio Optimization (Hu et al. 2021, arXiv 2110.10921).

The paper chooses, from a few labelled samples, the channels that jointly discriminate the classes best, as maximisation
of a submodular set function in two greedy stages: the widths of all layers, then the channels of each. It also prunes
for a subset of the classes.

Only the abstract was at hand. What is ours:

- ``"form": "plain"`` is the trace ratio of features where they enter a group's consumers (Nie et al. 2008), solved
  exactly. It is kept for reference: a dead channel scores 0 and beats a strong one whose scatter within the classes
  outweighs that between them.
- ``"form": "margin"``, the default, measures a channel's part in telling classes apart through the rest of the network:
  its effect on every sample's class margin, jointly for all channels that go, plus what these contribute to the inputs
  of the next layer. See :class:`~nncf_compactprune.algorithms.catro.class_effects.MarginEffects`. It won in
  ``examples/benchmarks/catro_forms.md``.
- Stage 1 gives every group the width at which the next channel's loss for its exact share of the missing budget is the
  same everywhere (:func:`~nncf_compactprune.decide.budgets.lazy_greedy`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from nncf.common.logging import nncf_logger
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.catro.class_effects import FeatureScatter, MarginEffects
from nncf_compactprune.algorithms.catro.subtask import ClassSubset, with_classifier_cut
from nncf_compactprune.algorithms.catro.trace_ratio import RemovalCurve, damped, joint_removal, trace_ratio_curve
from nncf_compactprune.algorithms.channel_pruning import ChannelPruning, ChannelPruningConfig, ChannelPruningParams
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.decide.budgets import AllocationProblem, lazy_greedy, uniform
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.decide.criteria.magnitude import l2
from nncf_compactprune.decide.labelled import FewPerClass, class_scores, output_classes
from nncf_compactprune.errors import CompactPruneError, DataError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.plan import PruningPlan, make_plan
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl


class CatroParams(ChannelPruningParams):
    """Parameters of ``catro``.

    :param allocation: widths by least loss per cost saved (``"greedy"``), or ``"uniform"``.
    :param form: what a channel is worth; ``"plain"`` is the trace ratio of features alone, for reference.
    :param samples_per_class: labelled samples of each class that are looked at, in each process.
    :param contribution: weight of what channels contribute to their consumers, beside their effect on the margins.
    :param damping: in [0, 1]: how far groups are brought to one scale. 0 takes losses as measured, 1 gives every
        group the same mean.
    :param feature_size: of ``"plain"``: features are averaged to this many positions a spatial dimension.
    :param classes: prune for these class indices only, at least two, and cut the classifier to them; with
        ``"schedule": "one_shot"``.
    """

    searched: ClassVar[Mapping[str, Sequence[Any]]] = {"allocation": ["greedy", "uniform"], "damping": [0.5, 1.0]}

    allocation: Literal["greedy", "uniform"] = "greedy"
    form: Literal["margin", "plain"] = "margin"
    samples_per_class: int = Field(default=50, ge=1)
    contribution: float = Field(default=3.0, ge=0)
    feature_size: int = Field(default=4, ge=1)
    damping: float = Field(default=0.5, ge=0, le=1)
    classes: list[int] | None = None

    @field_validator("classes")
    @classmethod
    def _different(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (len(set(value)) < len(value) or len(value) < 2 or min(value) < 0):
            msg = f"expected at least two different class indices from 0, got {value}."
            raise ValueError(msg)
        return value if value is None else list(output_classes(value))

    @model_validator(mode="after")
    def _classes_at_once(self) -> CatroParams:
        if self.classes is not None and self.schedule != "one_shot":
            msg = '\'classes\' cuts the classifier, and a classifier is cut at once: set "schedule": "one_shot".'
            raise ValueError(msg)
        return self


class CatroConfig(ChannelPruningConfig):
    """A ``catro`` entry."""

    params: CatroParams = CatroParams()

    @property
    def needs_labels(self) -> str:
        return "algorithm"


class Catro(ChannelPruning):
    """Keeps the channels that tell the classes apart."""

    name = "catro"
    summary = "Class-aware channel pruning from a few labelled samples, also for some of the classes (arXiv 2110.10921)"
    Config: ClassVar[type[AlgorithmConfig]] = CatroConfig
    config: CatroConfig

    def decide(self, rate: float) -> PruningPlan:
        problem = self.problem(rate)
        with self.context.timed("scores"):
            curves = self.held(self._curves)
        with self.context.timed("allocation"):
            plan = make_plan(self.graph, self._kept(problem, curves), algorithm=self.name)
        classes, context = self.config.params.classes, self.context
        if classes is None:
            return plan
        return with_classifier_cut(plan, context.model, self.graph, classes, context.example_inputs, context.plugins)

    def adaptation_context(self) -> Context:
        classes, loader = self.config.params.classes, self.context.train_loader
        if classes is None or loader is None:
            return self.context
        return dataclasses.replace(self.context, train_loader=ClassSubset(loader, classes))

    def _kept(self, problem: AllocationProblem, curves: Sequence[RemovalCurve]) -> list[npt.NDArray[np.bool_]]:
        losses = self.shrunk.curves([curve.convex for curve in curves])
        widths = (uniform if self.config.params.allocation == "uniform" else lazy_greedy)(problem, losses)
        removed = (self.present.sizes - widths).astype(int)
        # The row of all channels is missing: a branch that goes takes its last one along.
        rows = [np.append(curve.kept, np.zeros_like(curve.kept[:1]), axis=0) for curve in curves]
        return self.shrunk.in_dense([kept[gone] for kept, gone in zip(rows, removed, strict=True)])

    def _curves(self) -> list[RemovalCurve]:
        """What every group loses at every width, all on one scale."""
        if self.context.train_loader is None:
            msg = "'catro' chooses channels by labelled samples: give a train_loader of (inputs, labels)."
            raise DataError(msg)
        params = self.config.params
        classes = self._class_count()
        samples = FewPerClass(self.context.labelled_batches(), classes, params.samples_per_class, params.classes)
        groups = [index for index, free in enumerate(self.prunable) if free]
        found: dict[int, RemovalCurve] = {}
        if params.form == "plain":
            scatter = FeatureScatter(self.present, groups, classes, params.feature_size)
            scatter.collect(self.context.model, samples)
            for group in groups:
                pair = scatter.scatter(group)
                if pair is not None:
                    found[group] = trace_ratio_curve(pair[0].numpy(), pair[1].numpy())
        else:
            wanted = None if params.classes is None else torch.tensor(params.classes)
            effects = MarginEffects(self.present, groups, wanted)
            effects.collect(self.context.model, samples)
            for group in groups:
                gram = effects.gram(group, params.contribution)
                if gram is not None:
                    found[group] = joint_removal(damped(gram.numpy(), params.damping))
        return self._completed(found)

    def _completed(self, found: Mapping[int, RemovalCurve]) -> list[RemovalCurve]:
        """A curve for every group. Groups whose consumers were not seen are ranked by the squared L2 norm of their
        filters, scaled so that a channel loses as much as one of the other groups on average."""
        seen = [float(curve.loss[-1]) / len(curve.loss) for curve in found.values()]
        missing = [g for g, free in enumerate(self.prunable) if free and g not in found]
        if not seen:
            kind = type(self.context.model).__name__
            msg = (
                f"'catro' saw no convolution or matrix product consume a channel of {kind}, so it cannot score the "
                "channels. Use another algorithm."
            )
            raise CompactPruneError(msg)
        if missing:
            names = ", ".join(self.graph.groups[g].name for g in missing)
            nncf_logger.warning(
                "catro: these groups are ranked by filter norms, because no consumer was seen: %s.", names
            )
        curves = []
        for index, context in enumerate(criterion_contexts(self.context.model, self.present)):
            norms = l2(context).double().cpu().square() if index in missing else torch.zeros(context.group.size)
            scale = float(np.mean(seen)) / max(float(norms.mean()), 1e-30)
            curves.append(found[index] if index in found else joint_removal(torch.diag(norms * scale).double().numpy()))
        return curves

    def _class_count(self) -> int:
        """How many scores the model gives.

        :raises CompactPruneError: its output is no ``[n, classes]``, or it has not the classes asked for.
        """
        with evaluating(self.context.model):
            scores: Any = class_scores(call_model(self.context.model, self.context.example_inputs))
        if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 2:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            msg = f"'catro' needs a classifier: expected scores of shape [n, classes], got {got}."
            raise CompactPruneError(msg)
        count = int(scores.shape[1])
        unknown = [c for c in self.config.params.classes or () if c >= count]
        if unknown:
            msg = f"params.classes: {unknown[0]} is out of range, expected 0 to {count - 1}, the model's classes."
            raise CompactPruneError(msg)
        return count


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`Catro`."""
    return [Catro]
