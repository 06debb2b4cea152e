"""``"budget"``: what a compressed model may cost."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from nncf_compactprune.config.reading import show
from nncf_compactprune.config.sections import NotYet, Section

_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_COST_PATTERN = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMG])")
_NO_LATENCY = "a budget of latency is not supported yet. Give macs or params instead."


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _check_cost(value: Any) -> Any:
    if value is None or _is_fraction(value) or (isinstance(value, int) and value > 1):
        return value
    if isinstance(value, str) and _absolute_cost(value) > 0:
        return value
    msg = f'expected a fraction kept in (0, 1], a whole number, or a string such as "300M", got {show(value)}.'
    raise ValueError(msg)


def _absolute_cost(text: str) -> int:
    match = _COST_PATTERN.fullmatch(text)
    return int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0


Cost = Annotated[
    int | float | str | None,
    PlainValidator(_check_cost),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "fraction kept"},
                {"type": "integer", "minimum": 2},
                {"type": "string", "pattern": f"^{_COST_PATTERN.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]


class Budget(Section):
    """What the compressed model may cost. Every limit given must hold.

    :param macs: multiply-accumulates: the fraction kept in (0, 1], or an absolute number (``300000000``, ``"300M"``).
    :param params: parameters, in the same way.
    """

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in ("macs", "params")]})

    macs: Cost = None
    params: Cost = None
    latency: Annotated[None, NotYet(_NO_LATENCY)] = Field(default=None, exclude=True)
    device: Annotated[None, NotYet(_NO_LATENCY)] = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.macs is None and self.params is None:
            msg = 'expected at least one of "macs", "params", such as {"macs": 0.5}.'
            raise ValueError(msg)
        return self

    def resolve(self, kind: Literal["macs", "params"], dense: int) -> int:
        """
        :param kind: which limit.
        :param dense: the cost of the dense model.
        :return: the largest cost allowed; ``dense`` where this budget says nothing about it.
        """
        value = self.macs if kind == "macs" else self.params
        if value is None:
            return dense
        if isinstance(value, str):
            return _absolute_cost(value)
        # Decimal, since 0.29 * 100 is 28.999999999999996 in floats.
        return int(Decimal(str(value)) * dense) if value <= 1 else int(value)
