"""Factors in an optimizer: they take the place of the weight that they stand for, and give it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nncf_compactprune.errors import CompactPruneError

Pairs = Iterable[tuple[nn.Parameter, nn.Parameter]]


class FactorGroups:
    """The factors of one run in one optimizer.

    Factors that the optimizer does not hold yet join the group of their weight: learning rate, decay and schedule go on
    as for the weight. (A group of their own would not do: torch's schedulers refuse an optimizer that has gained one.)

    :param optimizer: holds the weights, or the factors, or both.
    :param pairs: each weight with each of its factors.
    :param own_decay: the factors must not decay, as the merged weight does: where their group decays, they go into one
        of their own. This must happen before a learning-rate scheduler is built.
    :raises CompactPruneError: too late for a group of their own; nothing is changed.
    """

    def __init__(self, optimizer: Optimizer, pairs: Pairs, *, own_decay: bool) -> None:
        self.optimizer = optimizer
        self._pairs = list(pairs)
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        first = optimizer.param_groups[0]
        #: where the weight goes in the end
        self._home: dict[int, dict[str, Any]] = {
            id(factor): held.get(id(factor)) or held.get(id(weight)) or first for weight, factor in self._pairs
        }
        decaying = [factor for _, factor in self._pairs if own_decay and self._home[id(factor)].get("weight_decay")]
        if decaying and getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            msg = (
                "params.weight_decay: the factors need a group without decay, but the optimizer already has a learning-"
                "rate scheduler, which allows no new group. Call attach(optimizer=...) before you build the scheduler, "
                "or set the decay of the factors' group to 0 yourself."
            )
            raise CompactPruneError(msg)
        for factor in decaying:
            self._move(factor, self._without_decay(self._home[id(factor)]))
        moved = {id(factor) for factor in decaying}
        for _, factor in self._pairs:
            if id(factor) not in held and id(factor) not in moved:
                self._home[id(factor)]["params"].append(factor)

    def release(self, *, anew: bool = True) -> None:
        """Takes the factors and their state out; a weight that is in no group joins its factors' former group.

        :param anew: forget the weights' own state too, as it is from before the factors trained.
        """
        for weight, factor in self._pairs:
            self._take_out(factor)
            self.optimizer.state.pop(factor, None)
            if anew:
                self.optimizer.state.pop(weight, None)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for weight, factor in self._pairs:
            if id(weight) not in held:
                held.add(id(weight))
                self._home[id(factor)]["params"].append(weight)

    def _without_decay(self, home: dict[str, Any]) -> dict[str, Any]:
        """The group with all of ``home``'s options but its decay, made where it does not exist."""
        for group in self.optimizer.param_groups:
            if group.get("without_decay_of") == id(home):
                return group
        options = {key: value for key, value in home.items() if key != "params"}
        group = {**options, "params": [], "weight_decay": 0.0, "without_decay_of": id(home)}
        self.optimizer.param_groups.append(group)
        return group

    def _move(self, factor: nn.Parameter, group: dict[str, Any]) -> None:
        self._take_out(factor)
        group["params"].append(factor)

    def _take_out(self, factor: nn.Parameter) -> None:
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p is not factor]
