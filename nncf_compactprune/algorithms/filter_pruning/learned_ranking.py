"""A learned ranking of filters across layers: LeGR (Chin et al. 2020, "Towards Efficient Model Compression via Learned
Global Ranking").

Norms of different layers do not compare. LeGR learns an affine map of the norms of each layer, by regularised evolution
(Real et al. 2019): a map is judged by the loss of the network that it prunes, after a few training steps. The best maps
among a random few of the population are changed a little, and the oldest of the population dies.

As in NNCF 2.x, the first rankings are random: a layer's factor is the exponential of a normal number, its summand is
normal with the spread of the layer's norms. Deviations: each ranking is drawn anew from one seeded generator (NNCF 2.x
seeds it anew for every ranking, so that its random rankings are all the same); the first one is the identity, so that
the result is never worse than no ranking; all are judged after the same training batches.

All of this happens on a copy of the network. With several processes each trains its own copy on its own batches, and
the losses are averaged, so all come to the same ranking.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.filter_pruning.config import LegrParams
from nncf_compactprune.algorithms.filter_pruning.importance import Norms, Ranking, importances
from nncf_compactprune.cut.masks import Masks
from nncf_compactprune.decide.budgets import choose
from nncf_compactprune.decide.labelled import scored
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.distributed import averaged
from nncf_compactprune.host.nncf_progress import track
from nncf_compactprune.plan import make_plan

if TYPE_CHECKING:
    from nncf_compactprune.algorithms.filter_pruning.algorithm import FilterPruning

#: examples that rankings are judged on, where the training loader is all there is
_JUDGED_ON = 512


@dataclass(frozen=True)
class RankingTraining:
    """How the pruned copy is trained and judged. ``context.shared[RankingTraining]`` replaces the built-in way, which
    needs a classifier and a training loader with labels.

    :param train: trains a model for a number of steps.
    :param loss: the loss of a model on data of its own.
    """

    train: Callable[[nn.Module, int], None]
    loss: Callable[[nn.Module], float]


def learn(algorithm: FilterPruning) -> Ranking:
    """Finds the maps of the layers' norms with which the pruned network is best.

    :param algorithm: decides how wide layers stay under a ranking.
    :raises DataError: there are no labelled batches to train and judge with.
    """
    params = algorithm.config.params.legr_params
    context = algorithm.context
    training: RankingTraining = context.shared.get(RankingTraining) or _built_in(context)
    level = algorithm.target_rate if params.max_pruning is None else params.max_pruning
    norms = algorithm.norms(algorithm.graph)
    with evaluating(context.model, changes=True), _Trial(algorithm, norms, level, training) as trial:
        search = Evolution(norms, params)
        for generation in track(range(params.generations), "Learning the ranking of layers"):
            ranking = search.propose(generation)
            torch.manual_seed(params.random_seed)  # the same batches for all, where the loader shuffles
            search.judge(ranking, trial(ranking, params.train_steps))
    nncf_logger.info(f"Ranking learned: loss {search.best_loss:.4f}, without {search.losses[0]:.4f}.")
    return search.best


class Evolution:
    """Regularised evolution of rankings.

    :param norms: of all filters; they say which layers there are, and how far the norms of each spread.
    :param params: the keys of ``legr_params``.
    """

    def __init__(self, norms: Norms, params: LegrParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.random_seed)
        together: dict[str, list[Tensor]] = {}
        for group in norms:
            for name, norm in group.items():
                together.setdefault(name, []).append(norm.flatten())
        self._spreads = {name: float(torch.cat(parts).std(correction=0)) for name, parts in together.items()}
        self._population: deque[tuple[Ranking, float]] = deque(maxlen=params.population_size)
        self.best: Ranking = {}
        self.best_loss = float("inf")
        self.losses: list[float] = []

    def propose(self, generation: int) -> Ranking:
        """The next ranking to try.

        :param generation: counted from 0; later changes are smaller.
        """
        params = self._params
        if generation == 0:
            return dict.fromkeys(self._spreads, (1.0, 0.0))
        if generation < params.population_size:
            return {name: self._map(name, params.scale_sigma) for name in self._spreads}
        drawn = self._random.choice(len(self._population), min(params.num_samples, len(self._population)))
        parent, _ = min((self._population[at] for at in drawn), key=lambda member: member[1])
        step = params.scale_sigma * (1 - generation / (params.generations * 1.25))
        count = max(int(params.mutate_percent * len(self._spreads)), 1)
        changed = set(self._random.choice(list(self._spreads), count))
        child = dict(parent)
        for name in self._spreads:
            if name in changed:
                factor, summand = self._map(name, step)
                child[name] = (factor * parent[name][0], summand + parent[name][1])
        return child

    def judge(self, ranking: Ranking, loss: float) -> None:
        """Remembers what a ranking led to; the oldest one is forgotten.

        :param ranking: that was tried.
        :param loss: of the network that it pruned; not finite counts as the worst.
        """
        loss = loss if np.isfinite(loss) else float("inf")
        self.losses.append(loss)
        self._population.append((ranking, loss))
        if not self.best or loss < self.best_loss:
            self.best, self.best_loss = ranking, loss

    def _map(self, name: str, sigma: float) -> tuple[float, float]:
        factor = float(np.exp(self._random.normal(0.0, sigma)))
        return factor, float(self._random.normal(0.0, self._spreads[name]))


class _Trial:
    """Prunes a copy of the network by a ranking, trains it, and says its loss."""

    def __init__(self, algorithm: FilterPruning, norms: Norms, level: float, training: RankingTraining) -> None:
        self._algorithm = algorithm
        self._norms = norms
        self._level = level
        self._training = training
        self._model = copy.deepcopy(algorithm.context.model)
        self._state = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._masks = Masks(self._model, algorithm.graph)

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._masks.remove()

    def __call__(self, ranking: Ranking, steps: int) -> float:
        algorithm, model = self._algorithm, self._model
        scores = [s.detach().double().cpu().numpy() for s in importances(self._norms, ranking)]
        keep = choose(algorithm.widths(self._level, scores), scores)
        self._masks.remove()
        model.load_state_dict(self._state)
        self._masks.update(make_plan(algorithm.graph, keep, algorithm=algorithm.name))
        model.train()
        with torch.enable_grad():
            self._training.train(model, steps)
        model.eval()
        with torch.no_grad():
            loss = float(self._training.loss(model))
        return float(averaged([torch.tensor(loss, dtype=torch.float64)])[0])


def _built_in(context: Context) -> RankingTraining:
    """Stochastic gradient descent on the cross-entropy of the training loader's batches, as NNCF 2.x's default."""
    if context.train_loader is None:
        msg = (
            '"learned_ranking" trains and judges a copy of the network, but there is no train_loader. Give one with '
            "(inputs, labels), or a file in load_ranking_coeffs_path."
        )
        raise DataError(msg)
    judged = list(_first(context))

    def train(model: nn.Module, steps: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4, nesterov=True)
        for inputs, labels in itertools.islice(_endless(context), steps):
            optimizer.zero_grad()
            _cross_entropy(model, inputs, labels, "mean").backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def loss(model: nn.Module) -> float:
        samples = sum(len(labels) for _, labels in judged)
        return sum(float(_cross_entropy(model, inputs, labels, "sum")) for inputs, labels in judged) / max(samples, 1)

    return RankingTraining(train, loss)


def _endless(context: Context) -> Iterator[tuple[Any, Any]]:
    while True:
        yield from context.labelled_batches()


def _first(context: Context) -> Iterator[tuple[Any, Any]]:
    """The first batches, with enough examples to judge by."""
    seen = 0
    for inputs, labels in context.labelled_batches():
        yield inputs, labels
        seen += len(labels) if labels is not None else 0
        if seen >= _JUDGED_ON:
            return
    if seen == 0:
        msg = '"learned_ranking" needs labelled batches, but the train_loader gives none.'
        raise DataError(msg)


def _cross_entropy(model: nn.Module, inputs: Any, labels: Any, reduction: str) -> Tensor:
    scores, wanted = scored(model, inputs, labels)
    return functional.cross_entropy(scores.float(), wanted, reduction=reduction)
