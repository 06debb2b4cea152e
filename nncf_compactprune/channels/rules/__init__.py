"""What each ATen operation does with channel labels: one rule an operation.

A rule receives the tracer, the operation, its arguments and its result. It passes labels on (``tracer.set``), declares
labels equal (``tracer.unify``), pins them with a reason (``tracer.pin``) and adds the operation's cost
(``tracer.count_macs``). Rules decide nothing about pruning.
"""

from __future__ import annotations

from collections.abc import Mapping

from nncf_compactprune.channels.rules import (
    elementwise,
    normalisation,
    products,
    recurrent,
    reductions,
    resampling,
    shape,
)
from nncf_compactprune.channels.rules.base import RULES, Rule, argument, dims_of, name_of, named, rule
from nncf_compactprune.channels.rules.reductions import BY_CONSENT
from nncf_compactprune.plugins.hookspecs import hookimpl

FAMILIES = (
    elementwise,
    products,
    recurrent,
    normalisation,
    resampling,
    shape,
    reductions,
)  # importing a family registers its rules

__all__ = [
    "BY_CONSENT",
    "FAMILIES",
    "RULES",
    "Rule",
    "argument",
    "compactprune_op_rules",
    "dims_of",
    "name_of",
    "named",
    "rule",
]


@hookimpl
def compactprune_op_rules() -> Mapping[str, Rule]:
    """The built-in rules."""
    return RULES
