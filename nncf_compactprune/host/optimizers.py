"""Optimizers as users have them: one, several side by side, and some that step another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

#: one, or several that share the parameters out among them, such as Muon for matrices beside AdamW for the rest
Optimizers = Optimizer | Sequence[Optimizer]


def as_sequence(optimizers: Optimizers | None) -> tuple[Optimizer, ...]:
    """Those that are stepped, in order.

    :param optimizers: one, several, or None.
    """
    if optimizers is None:
        return ()
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def with_inner(optimizers: Optimizers | None) -> Iterator[Optimizer]:
    """Those that are stepped, and behind each the ones that it steps itself (timm's Lookahead, Accelerate's wrapper).

    :param optimizers: one, several, or None.
    """
    waiting, seen = list(as_sequence(optimizers)), set[int]()
    while waiting:
        optimizer = waiting.pop(0)
        if id(optimizer) in seen:
            continue
        seen.add(id(optimizer))
        yield optimizer
        waiting += [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]


def holder(optimizers: Optimizers, parameter: nn.Parameter) -> Optimizer | None:
    """Which of several steps a parameter; None where none does.

    :param optimizers: one or several.
    :param parameter: of the model.
    """
    return next((one for one in as_sequence(optimizers) if id(parameter) in held(one)), None)


def held(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters that an optimizer steps."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def join_first(optimizers: Optimizers, parameters: Sequence[nn.Parameter]) -> None:
    """Lets parameters that no optimizer knows train in the first group of the first one. (A group of their own would be
    one that torch's learning-rate schedulers do not know.)

    :param optimizers: one or several.
    :param parameters: new ones, and ones that are held already.
    """
    every = as_sequence(optimizers)
    known = set().union(*(held(one) for one in every))
    new = dict.fromkeys(parameter for parameter in parameters if id(parameter) not in known)
    every[0].param_groups[0]["params"] += list(new)
