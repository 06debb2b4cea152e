"""Parts of a network whose quantizers differ: ``scope_overrides``, and scopes of weights or activations alone.

``nncf.quantize`` has one setting for all. So a copy is quantized with each other setting, and its quantizers take the
places of those that the part's operations meet. What stays in float loses its quantizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nncf_compactprune.algorithms.quantization.config import QuantizationConfig
from nncf_compactprune.decide.scopes import ScopeRules, operations_by_scope, operations_out_of_scope
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import hooks, remove_hooks
from nncf_compactprune.host.nncf_quantization import quantizers_by_operation, replace_hooks

Quantize = Callable[[nn.Module, QuantizationConfig], None]


@dataclass(frozen=True)
class Part:
    """Quantizers of one kind, of some operations.

    :param key: who names it, for messages.
    :param kind: ``"weights"`` or ``"activations"``.
    :param operations: NNCF's names of the operations that have the weights, or read the activations.
    :param config: how they are quantized; None: they stay in float.
    """

    key: str
    kind: str
    operations: frozenset[str]
    config: QuantizationConfig | None


def parts_of(config: QuantizationConfig, model: nn.Module, example_inputs: Any) -> list[Part]:
    """The parts that an entry names, in the order in which they take effect.

    :param config: the entry.
    :param model: without hooks.
    :param example_inputs: what NNCF's graph is built with.
    :raises ScopeError: a scope is no valid pattern, or one of ``ignored_scopes`` or ``target_scopes`` matches nothing.
    """
    parts = []
    for kind in ("weights", "activations"):
        of_all, overrides, key = getattr(config, kind), getattr(config.scope_overrides, kind), f"scope_overrides.{kind}"
        found = operations_by_scope(model, example_inputs, overrides, key, ScopeRules(validate=False))
        for scope, operations in found.items():
            own = {name: getattr(overrides[scope], name) for name in overrides[scope].model_fields_set}
            changed = config.model_copy(update={kind: of_all.model_copy(update=own)})
            parts.append(Part(f"{key}: '{scope}'", kind, frozenset(operations), changed))
        scopes = of_all.ignored_scopes, of_all.target_scopes
        rules = ScopeRules(validate=config.validate_scopes, within=f"{kind}.")
        left = operations_out_of_scope(model, example_inputs, *scopes, rules)
        if left:
            parts.append(Part(kind, kind, frozenset(left), None))
    return parts


def quantize_parts(
    model: nn.Module, config: QuantizationConfig, example_inputs: Any, parts: Sequence[Part], quantize: Quantize
) -> None:
    """Quantizes a model, each part in its own way.

    :param model: changed in place.
    :param config: of what belongs to no part.
    :param example_inputs: what NNCF's graph is built with.
    :param parts: of the model.
    :param quantize: quantizes a model in place in one way.
    """
    parts = [part for part in parts if part.operations]
    others = [None if part.config is None else copy.deepcopy(model) for part in parts]
    quantize(model, config)
    if not parts:
        return
    with evaluating(model):
        met = quantizers_by_operation(model, example_inputs)
    for part, other in zip(parts, others, strict=True):
        inside, outside = (
            {key for name, one in met.items() if (name in part.operations) == wanted for key in getattr(one, part.kind)}
            for wanted in (True, False)
        )
        if part.config is not None and other is not None:
            quantize(other, part.config)
            replace_hooks(model, inside, other)
        else:
            modules = {hook.key: hook.module for hook in hooks(model, shared=True)}
            left = {modules[key] for key in inside} - {modules[key] for key in outside}
            remove_hooks(model, left.__contains__)
