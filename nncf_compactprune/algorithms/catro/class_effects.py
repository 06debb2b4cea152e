"""What every channel does for telling classes apart: statistics of a few labelled samples, streamed once.

Two kinds. :class:`MarginEffects` looks through the whole network: the effect of a channel on the *margin* of a sample,
that is the score of its class minus the (soft) largest other score. :class:`FeatureScatter` looks at the channel alone,
where it enters its consumers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncf_compactprune.algorithms.catro.class_statistics import ClassMoments
from nncf_compactprune.algorithms.catro.consumers import Call, ConsumerMode
from nncf_compactprune.algorithms.catro.contributions import Contributions
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.distributed import summed
from nncf_compactprune.host.nncf_progress import track

Key = tuple[int, str]
HALF_PRECISION_SCALE = 1024.0  # keeps small gradients of float16 networks from vanishing


class ClassStatistics(ABC):
    """Collects, while labelled samples run through a model.

    :param graph: the model's channels.
    :param groups: indices of the groups that are looked at.
    """

    def __init__(self, graph: ChannelGraph, groups: Collection[int]) -> None:
        self.graph = graph
        self.groups = groups
        self.labels = torch.zeros(0, dtype=torch.int64)  # of the batch that runs
        self.samples = torch.zeros((), dtype=torch.float64)

    @abstractmethod
    def see(self, call: Call) -> Tensor:
        """A consumer runs; returns the input that it goes on with."""

    @abstractmethod
    def end_batch(self, scores: Tensor, labels: Tensor) -> None:
        """The batch has run to its scores.

        :param scores: ``[n, classes]``.
        :param labels: class indices ``[n]``, where the scores are.
        """

    @abstractmethod
    def all_reduce(self) -> None:
        """Sums up over all processes."""

    def collect(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Runs the model on every batch in eval mode, and sums up over the processes.

        No gradient of a parameter is computed or touched.

        :param model: it is only run.
        :param batches: model inputs with class indices ``[n]``.
        :raises DataError: a process got no sample.
        """
        with evaluating(model):
            for inputs, labels in track(batches, "Class statistics"):
                self.labels = labels
                with torch.enable_grad():
                    with ConsumerMode(model, self.graph, self.groups, self.see):
                        scores = class_scores(call_model(model, inputs))
                    self.end_batch(scores, labels.to(scores.device))
                self.samples += len(labels)
        empty, samples = summed([(self.samples == 0).double(), self.samples])
        if int(empty):
            msg = "train_loader: at least one process got no sample. Give every process samples of its own."
            raise DataError(msg)
        self.samples = samples
        self.all_reduce()


class MarginEffects(ClassStatistics):
    """Effects of channels on class margins, and what they contribute to their consumers.

    The effect of channel k on sample i is ``t_ik = Σ x_k · ∂m_i/∂x_k`` over all positions and consumers: to first order
    what the margin ``m_i = z_y - log Σ_{c≠y} exp z_c`` loses when the channel goes. The margin, and not the
    cross-entropy: of samples that a trained network is sure of, the latter's gradient is nearly zero.

    :param classes: those whose scores count; default: all.

    After :meth:`collect`: ``effects[g, consumer] = Σ_i t_i t_iᵀ``, with the effects by way of one consumer, and
    ``contributions[g, consumer]`` what the channels contribute to it.
    """

    def __init__(self, graph: ChannelGraph, groups: Collection[int], classes: Tensor | None = None) -> None:
        super().__init__(graph, groups)
        self._classes = classes
        self._anchor = torch.zeros((), requires_grad=True)
        self._batch: dict[Key, Tensor] = {}
        self.effects: dict[Key, Tensor] = {}
        self.contributions: dict[Key, Contributions] = {}

    def see(self, call: Call) -> Tensor:
        if len(call.x) % len(self.labels):
            return call.x  # its leading dimension does not run over samples: nothing can be told of each
        for use in call.uses:
            key = (use.group, use.parameter)
            if key not in self.contributions:
                self.contributions[key] = Contributions(len(use.positions))
            self.contributions[key].update(call, use)
        anchor = self._anchor = self._anchor.to(call.x.device)
        return _Tap.apply(call.x, anchor, lambda gradient: self._note(call, gradient))  # type: ignore[no-any-return, no-untyped-call]

    def _note(self, call: Call, gradient: Tensor) -> None:
        """Adds up effects of the batch, ``[n, channels]``; a consumer may be called several times."""
        product = (_wide(call.x.detach()) * _wide(gradient)).movedim(call.axis, 1)
        by_row = product.flatten(2).sum(2) if product.dim() > 2 else product
        rows = by_row.reshape(len(self.labels), -1, by_row.shape[1]).sum(1).to("cpu", torch.float64)
        for use in call.uses:
            effect = rows[:, use.positions].sum(2)
            key = (use.group, use.parameter)
            self._batch[key] = self._batch.get(key, 0) + effect

    def end_batch(self, scores: Tensor, labels: Tensor) -> None:
        if not self.contributions:
            return  # no consumer was seen
        scale = HALF_PRECISION_SCALE if scores.dtype == torch.float16 else 1.0
        objective = margins(_wide(scores), labels, self._classes).sum() * scale
        torch.autograd.grad(objective, [self._anchor], allow_unused=True)
        for key, effect in self._batch.items():
            self.effects[key] = self.effects.get(key, 0) + (effect / scale).T @ (effect / scale)
        self._batch = {}

    def all_reduce(self) -> None:
        keys = sorted(self.effects)
        self.effects = dict(zip(keys, summed([self.effects[key] for key in keys]), strict=True))
        for key in sorted(self.contributions):
            self.contributions[key].all_reduce()

    def gram(self, group: int, contribution: float) -> Tensor | None:
        """The loss form of a group: mean squared effect of removed channels together, plus ``contribution`` times what
        they contribute to their consumers, each consumer on the scale of its own effects; ``[channels, channels]``.

        Of n consumers, n times the sum is taken, which bounds ``(Σ_c t_c)²``: in a row of residual blocks, the effects
        by way of each do not cancel as their first order may.

        :param group: its index in the graph.
        :param contribution: weight of what channels contribute, at least 0.
        :return: the form, in float64; None where no consumer of the group was seen.
        """
        consumers = [key for key in self.effects if key[0] == group]
        total = torch.zeros(self.graph.groups[group].size, self.graph.groups[group].size, dtype=torch.float64)
        for key in consumers:
            gram, effects = self.contributions[key].gram, self.effects[key]
            scale = float(effects.diagonal().sum()) / max(float(gram.diagonal().sum()), 1e-300)
            total += effects + contribution * scale * gram
        return total * len(consumers) / self.samples if consumers else None


def margins(scores: Tensor, labels: Tensor, classes: Tensor | None = None) -> Tensor:
    """``z_y - log Σ_{c≠y} exp z_c``, ``[n]``.

    :param scores: ``[n, classes]``.
    :param labels: class indices ``[n]``.
    :param classes: those that count, default: all.
    """
    if classes is not None:
        others = torch.full_like(scores, -torch.inf)
        others[:, classes.to(scores.device)] = scores[:, classes.to(scores.device)]
    else:
        others = scores
    own = F.one_hot(labels, scores.shape[1]).bool()
    return scores[own] - others.masked_fill(own, -torch.inf).logsumexp(1)


class _Tap(torch.autograd.Function):
    """Passes a tensor on and tells the gradient that arrives at it.

    The anchor makes the result need a gradient even where no parameter does; the backward pass is asked for the anchor
    alone, so weights' gradients are never computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, tell: Any) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        ctx.tell(gradient)
        return gradient if ctx.needs_input_grad[0] else None, gradient.new_zeros(()), None


class FeatureScatter(ClassStatistics):
    """Scatter between and within classes of features at the consumers' inputs, pooled to ``size`` positions a spatial
    dimension.

    :param classes: the model's number of classes.
    """

    def __init__(self, graph: ChannelGraph, groups: Collection[int], classes: int, size: int) -> None:
        super().__init__(graph, groups)
        self._classes = classes
        self._size = size
        self.moments: dict[Key, ClassMoments] = {}

    def see(self, call: Call) -> Tensor:
        if len(call.x) != len(self.labels):
            return call.x
        pooled = _pooled(_wide(call.x.detach()).movedim(call.axis, 1), self._size)
        for use in call.uses:
            features = pooled[:, use.positions.to(pooled.device)].flatten(2)  # [n, channels, features]
            key = (use.group, use.parameter)
            if key not in self.moments:
                self.moments[key] = ClassMoments(self._classes, features[0].numel())
            self.moments[key].update(features.flatten(1), self.labels)
        return call.x

    def end_batch(self, scores: Tensor, labels: Tensor) -> None:
        pass

    def all_reduce(self) -> None:
        for key in sorted(self.moments):
            self.moments[key].all_reduce()

    def scatter(self, group: int) -> tuple[Tensor, Tensor] | None:
        """Scatter between and within classes, each ``[channels]``, summed over the group's consumers with the mean
        scatter of each scaled to 1; None where no consumer was seen."""
        size = self.graph.groups[group].size
        found = [moments for (g, _), moments in self.moments.items() if g == group]
        between, within = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for moments in found:
            b, w = (scatter.reshape(size, -1).sum(1) for scatter in (moments.between, moments.within))
            scale = float((b + w).mean())
            if scale > 0:
                between, within = between + b / scale, within + w / scale
        return (between, within) if found else None


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pooled(x: Tensor, size: int) -> Tensor:
    """``[n, channels, features]``, spatial dimensions averaged to at most ``size`` each."""
    if x.dim() == 2:
        return x[:, :, None]
    if x.dim() == 3:
        return F.adaptive_avg_pool1d(x, min(size, x.shape[2]))
    pool = F.adaptive_avg_pool2d if x.dim() == 4 else F.adaptive_avg_pool3d
    return pool(x, min(size, *x.shape[2:])).flatten(2)
