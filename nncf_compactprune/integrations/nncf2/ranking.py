"""The functions that ``register_default_init_args`` was given for a learned ranking, as the algorithm takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nncf_compactprune.algorithms.filter_pruning.learned_ranking import RankingTraining
from nncf_compactprune.integrations.nncf2.config import NNCFConfig
from nncf_compactprune.integrations.nncf2.init_args import LeGRInitArgs


class _Idle:
    """Stands for a controller while a candidate is trained: its masks stay, and it adds nothing to the loss."""

    def __init__(self) -> None:
        self.scheduler = self

    def epoch_step(self, next_epoch: int | None = None) -> None:
        """Nothing is scheduled."""

    def step(self, next_step: int | None = None) -> None:
        """Nothing is scheduled."""

    def loss(self) -> float:
        """Nothing is added."""
        return 0.0


def ranking_training(config: Mapping[str, Any]) -> dict[Any, Any]:
    """What the script registered to train and judge the candidates of a learned ranking; empty without it.

    :param config: the configuration.
    """
    if not isinstance(config, NNCFConfig) or not config.has_extra_struct(LeGRInitArgs):
        return {}
    args = config.get_extra_struct(LeGRInitArgs)

    def train(model: nn.Module, steps: int) -> None:
        if args.train_optimizer is not None:
            optimizer = args.train_optimizer(model.parameters())
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4, nesterov=True)
        args.train_steps_fn(args.train_loader, model, optimizer, _Idle(), steps)

    def loss(model: nn.Module) -> float:
        return float(args.val_fn(model, args.val_loader)[1])

    return {RankingTraining: RankingTraining(train, loss)}
