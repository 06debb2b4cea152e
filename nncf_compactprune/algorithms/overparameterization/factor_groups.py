"""Factors in an optimizer: they take the place of the weight that they stand for, and give it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

Pairs = Iterable[tuple[nn.Parameter, nn.Parameter]]


class FactorGroups:
    """The factors of one run in one optimizer.

    Factors that the optimizer does not hold yet join the group of their weight: learning rate, decay and schedule go on
    as for the weight. (A group of their own would not do: torch's schedulers refuse an optimizer that has gained one.)

    :param optimizer: holds the weights, or the factors, or both.
    :param pairs: each weight with each of its factors.
    :param own_decay: the factors must not decay, as the merged weight does: while the optimizer steps, and only then,
        they are in a group without decay.
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
        for _, factor in self._pairs:
            if id(factor) not in held:
                self._home[id(factor)]["params"].append(factor)
        self._apart: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # groups, and all that is in them at rest
        self._handles = (
            [optimizer.register_step_pre_hook(self._part), optimizer.register_step_post_hook(self._join)]
            if own_decay
            else []
        )

    def release(self, *, anew: bool = True) -> None:
        """Takes the factors and their state out; a weight that is in no group joins its factors' former group.

        :param anew: forget the weights' own state too, as it is from before the factors trained.
        """
        self._join()
        for handle in self._handles:
            handle.remove()
        for weight, factor in self._pairs:
            for group in self.optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if p is not factor]
            self.optimizer.state.pop(factor, None)
            if anew:
                self.optimizer.state.pop(weight, None)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for weight, factor in self._pairs:
            if id(weight) not in held:
                held.add(id(weight))
                self._home[id(factor)]["params"].append(weight)

    def _part(self, *_: Any) -> None:
        self._join()  # a step that failed left them apart
        factors = {id(factor) for _, factor in self._pairs}
        for group in list(self.optimizer.param_groups):
            decaying = [p for p in group["params"] if id(p) in factors] if group.get("weight_decay") else []
            if decaying:
                self._apart.append((group, list(group["params"])))
                group["params"][:] = [p for p in group["params"] if id(p) not in factors]
                self.optimizer.param_groups.append({**group, "params": decaying, "weight_decay": 0.0})

    def _join(self, *_: Any) -> None:
        if self._apart:
            del self.optimizer.param_groups[-len(self._apart) :]
        for group, everything in self._apart:
            group["params"][:] = everything
        self._apart = []
