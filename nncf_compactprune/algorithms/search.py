"""``initializer.search``: settings of a pruning entry, chosen by trial on images that the trials do not train on.

Every combination is cut at once on a copy of the network, trained for a few steps side by side with the others, and
judged. The worse half goes after each round, until one is left: successive halving (Jamieson & Talwalkar 2016, arXiv
1502.07943), with steps of training as its resource.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from pydantic import Field, field_validator
from torch import nn

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.batch_norm import first_batches
from nncf_compactprune.config import Section
from nncf_compactprune.config.registered import qualified_name
from nncf_compactprune.decide.labelled import scored
from nncf_compactprune.errors import CompactPruneError, DataError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.distributed import summed

MOST_TRIALS = 64
FEW = 2_000  # images that the trials' criteria and adaptation look at
#: of ``params``: they say when channels go, or change the task, and a trial cuts at once
FIXED = frozenset({
    "schedule", "num_init_steps", "pruning_init", "pruning_steps", "shrink_every", "group_sparsity", "classes",
})  # fmt: skip
AT_ONCE = {"schedule": "one_shot", "num_init_steps": 0, "shrink_every": None, "group_sparsity": None}


class SearchConfig(Section):
    """``initializer.search``: which settings are tried, and how they are judged.

    :param grid: values by key of ``params``; all combinations are tried. null: criteria and allocations that differ
        most.
    :param num_samples: the training loader's first images, which judge and are not trained on.
    :param steps: training steps of a round, on the images that follow; 0 judges right after the cut.
    :param learning_rate: of these steps, by SGD with momentum; it falls to 0 in every round.
    """

    grid: dict[str, list[Any]] | None = None
    num_samples: int = Field(default=1000, ge=1)
    steps: int = Field(default=50, ge=0)
    learning_rate: float = Field(default=0.01, gt=0)

    @field_validator("grid")
    @classmethod
    def _holds_values(cls, value: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
        for key, values in (value or {}).items():
            if key in FIXED:
                msg = f"'{key}' cannot be searched: every trial cuts at once. Set it in params."
                raise ValueError(msg)
            if not values:
                msg = f"'{key}' has no value to try. Give a list of values, or leave it out."
                raise ValueError(msg)
        if value is not None and not value:
            msg = 'nothing to try. Name keys of params, such as {"allocation": ["balanced", "uniform"]}.'
            raise ValueError(msg)
        return value


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of some values, the last key's changing fastest.

    :param grid: values by key.

    >>> combinations({"importance": ["l1", "l2"], "max_ratio": [0.9]})
    [{'importance': 'l1', 'max_ratio': 0.9}, {'importance': 'l2', 'max_ratio': 0.9}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclasses.dataclass
class Trial:
    """One combination.

    :param at: its place among all.
    :param settings: keys and values of ``params``.
    :param model: its network, cut.
    :param optimizer: of its network.
    :param steps: how many it was trained for.
    :param loss: mean cross-entropy on the images that judge.
    :param accuracy: on these, in [0, 1].
    """

    at: int
    settings: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int = 0
    loss: float = math.nan
    accuracy: float = math.nan

    def row(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        settings = {key: qualified_name(value) if callable(value) else value for key, value in self.settings.items()}
        return {
            "at": self.at,
            "settings": settings,
            "steps": self.steps,
            "loss": round(self.loss, 5),
            "accuracy": round(self.accuracy, 5),
        }


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found and what it cost.

    :param rows: for every combination, best first: its place ``"at"`` among all, ``"settings"``, training ``"steps"``,
        and ``"loss"`` and ``"accuracy"`` when it was judged last.
    :param images: how many judged.
    :param seconds: of it all, cuts included.
    """

    rows: list[dict[str, Any]]
    images: int
    seconds: float

    @property
    def chosen(self) -> int:
        """The place of the best combination."""
        return int(self.rows[0]["at"])

    def __str__(self) -> str:
        best = self.rows[0]
        return (
            f"{shown(best['settings'])}: the best of {len(self.rows)}, {best['accuracy']:.1%} of {self.images:,} "
            f"images after {best['steps']} steps ({self.seconds:.0f} s in all)"
        )


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in words.

    :param settings: keys and values.
    """
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def search(
    context: Context,
    config: SearchConfig,
    settings: Sequence[dict[str, Any]],
    cut: Callable[[dict[str, Any], Context], None],
) -> SearchResult:
    """Cuts a copy of the network by each of some settings, trains the copies side by side, keeps the better half.

    :param context: the dense network and its training loader; both are left alone.
    :param config: the section.
    :param settings: keys and values of ``params``, one dict a trial.
    :param cut: cuts the network of the context that it is given, by the settings that it is given.
    :raises DataError: the network is no classifier, the loader has no class labels, or nothing beyond the images that
        judge.
    :raises CompactPruneError: no trial has a finite loss.
    """
    started = time.perf_counter()
    with torch.random.fork_rng():
        batches = iter(context.labelled_batches())
        judges = first_batches(batches, config.num_samples)
        few = first_batches(batches, FEW)
        if not few:
            msg = (
                f"initializer.search: the training loader ends within the {config.num_samples:,} images that judge, "
                "and none are left to try settings with. Lower num_samples."
            )
            raise DataError(msg)
        inputs, labels = judges[0]
        with evaluating(context.model):  # what cannot be judged by is told before the cuts
            scored(context.model, inputs, labels, "initializer.search")
        trials = [_begun(at, one, context, few, config, cut) for at, one in enumerate(settings)]
        ranked = _halved(trials, judges, itertools.chain(few, batches), config)
    if math.isnan(ranked[0].loss):
        msg = (
            "initializer.search: no setting gives a finite loss. Lower learning_rate, or look for NaNs in the weights."
        )
        raise CompactPruneError(msg)
    images = sum(len(labels) for _, labels in judges)
    result = SearchResult([trial.row() for trial in ranked], images, time.perf_counter() - started)
    lines = [f"  {row['accuracy']:6.1%} after {row['steps']} steps: {shown(row['settings'])}" for row in result.rows]
    nncf_logger.info("Search: settings tried, best first, accuracy on %d images:\n%s", images, "\n".join(lines))
    return result


def _begun(
    at: int,
    settings: dict[str, Any],
    context: Context,
    few: Sequence[tuple[Any, Any]],
    config: SearchConfig,
    cut: Callable[[dict[str, Any], Context], None],
) -> Trial:
    """A copy of the network, cut. Nothing follows it, and plugins hear of no event."""
    own = dataclasses.replace(
        context, model=copy.deepcopy(context.model), train_loader=few, optimizer=None, ema=None, seconds={}, shared={},
        hold_masks=False, plugins=context.plugins.silent(),
    )  # fmt: skip
    cut(settings, own)
    trained = [parameter for parameter in own.model.parameters() if parameter.requires_grad]
    return Trial(at, settings, own.model, torch.optim.SGD(trained, config.learning_rate, 0.9))


def _halved(
    trials: list[Trial],
    judges: Sequence[tuple[Any, Any]],
    batches: Iterator[tuple[Any, Any]],
    config: SearchConfig,
) -> list[Trial]:
    """All trials, best first: those of the last round, then those of the round before, and so on."""
    alive, out = list(trials), list[Trial]()
    while True:
        steps = _train(alive, batches, config)
        for trial in alive:
            _judge(trial, judges)
        alive.sort(key=lambda trial: (math.isnan(trial.loss), trial.loss))
        if len(alive) <= 2 or steps < config.steps or not config.steps:  # a loader that ended gives no further round
            return alive + out
        half = (len(alive) + 1) // 2
        alive, out = alive[:half], alive[half:] + out


def _train(trials: Sequence[Trial], batches: Iterator[tuple[Any, Any]], config: SearchConfig) -> int:
    """Trains all on the same batches, for a round.

    :return: how many steps there were images for.
    """
    for step in range(config.steps):
        batch = next(batches, None)
        if batch is None:
            return step
        for trial in trials:
            for group in trial.optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - step / config.steps)
            trial.model.train()
            trial.optimizer.zero_grad()
            scores, wanted = scored(trial.model, *batch)
            nn.functional.cross_entropy(scores.float(), wanted).backward()  # type: ignore[no-untyped-call]
            trial.optimizer.step()
            trial.steps += 1
    return config.steps


def _judge(trial: Trial, judges: Sequence[tuple[Any, Any]]) -> None:
    """On the images of all processes."""
    loss, right, count = torch.zeros(3, dtype=torch.float64).unbind()
    for inputs, labels in judges:
        with evaluating(trial.model):
            scores, wanted = scored(trial.model, inputs, labels)
        loss += nn.functional.cross_entropy(scores.double(), wanted, reduction="sum").cpu()
        right += (scores.argmax(1) == wanted).sum().cpu()
        count += len(wanted)
    loss, right, count = summed([loss, right, count])
    trial.loss, trial.accuracy = float(loss / count), float(right / count)
