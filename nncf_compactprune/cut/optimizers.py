"""What optimizers remember of parameters that are cut."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from nncf_compactprune.cut.transaction import Transaction
from nncf_compactprune.errors import shortened
from nncf_compactprune.host.optimizers import Optimizers, with_inner
from nncf_compactprune.host.tensors import select
from nncf_compactprune.plan import PruningPlan

logger = logging.getLogger("nncf")


def cut_optimizers(
    log: Transaction, parameters: Mapping[str, Tensor], plan: PruningPlan, optimizers: Optimizers
) -> None:
    """Cuts state of a parameter's shape as the parameter; other state that depends on its shape starts anew.

    :param log: notes every change.
    :param parameters: of the model, by name.
    :param plan: what stays.
    :param optimizers: one or several that hold parameters of the model.
    """
    for optimizer in with_inner(optimizers):
        anew = _cut(log, parameters, plan, optimizer)
        if anew:
            logger.warning(
                "%s: the state of %s has shapes of its own, so it starts anew.",
                type(optimizer).__name__,
                shortened(anew),
            )


def _cut(log: Transaction, parameters: Mapping[str, Tensor], plan: PruningPlan, optimizer: Optimizer) -> list[str]:
    gone = {id(parameter) for name, parameter in parameters.items() if plan.goes(name)}
    for group in optimizer.param_groups if gone else ():
        log.set_item(group, "params", [parameter for parameter in group["params"] if id(parameter) not in gone])
    if isinstance(optimizer, LBFGS):  # it keeps one history of all parameters together, with the first of them
        log.set_attribute(optimizer, "_numel_cache", None)
        log.set_attribute(optimizer, "_params", optimizer.param_groups[0]["params"])
        stepped = [parameter for parameter in optimizer.state if optimizer.state[parameter]]
        for parameter in stepped:
            log.delete_item(optimizer.state, parameter)
        return ["all parameters"] if stepped else []
    anew, other = [], _keys_of_other_shapes(optimizer)
    for name, parameter in parameters.items():
        if parameter not in optimizer.state:
            continue
        if id(parameter) in gone:
            log.delete_item(optimizer.state, parameter)
            continue
        if name not in plan.kept:
            continue
        state = optimizer.state[parameter]
        shaped = {key: value for key, value in state.items() if _depends_on_shape(value)}
        if not other & shaped.keys():
            for key, value in shaped.items():
                log.set_item(state, key, select(value, plan.selection(name)))
        else:
            anew.append(name)
            log.delete_item(optimizer.state, parameter)
    return anew


def _keys_of_other_shapes(optimizer: Optimizer) -> set[str]:
    """State that is not one value for each element. A preconditioner of a square weight has the weight's shape by
    chance, but not those of other weights."""
    return {
        key
        for parameter, state in optimizer.state.items()
        if isinstance(parameter, Tensor)
        for key, value in state.items()
        if _depends_on_shape(value) and not (isinstance(value, Tensor) and value.shape == parameter.shape)
    }


def _depends_on_shape(value: Any) -> bool:
    """Whether state holds more than single figures."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    if isinstance(value, Mapping):
        return any(map(_depends_on_shape, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_depends_on_shape, value))
