"""``"budget"``: what a compressed model may cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from nncf_compactprune.config.reading import show
from nncf_compactprune.config.registered import Registered
from nncf_compactprune.config.sections import Section

Kind = Literal["macs", "params", "latency"]
KINDS: tuple[Kind, ...] = ("macs", "params", "latency")
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_COST_PATTERN = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMG])")
_NANOSECONDS = {"us": 10**3, "ms": 10**6, "s": 10**9}
_TIME_PATTERN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(us|ms|s)")


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _check_cost(value: Any) -> Any:
    if value is None or _is_fraction(value) or (isinstance(value, int) and value > 1):
        return value
    if isinstance(value, str) and _absolute(value) > 0 and _COST_PATTERN.fullmatch(value):
        return value
    msg = f'expected a fraction kept in (0, 1], a whole number, or a string such as "300M", got {show(value)}.'
    raise ValueError(msg)


def _check_time(value: Any) -> Any:
    if value is None or _is_fraction(value):
        return value
    if isinstance(value, str) and _absolute(value) > 0 and _TIME_PATTERN.fullmatch(value):
        return value
    msg = f'expected a fraction of the dense model\'s time in (0, 1], or a time such as "4.5ms", got {show(value)}.'
    raise ValueError(msg)


def _absolute(text: str) -> int:
    """``"300M"`` as a count, ``"4.5ms"`` in nanoseconds; 0 where it is neither."""
    for pattern, units in ((_COST_PATTERN, _UNITS), (_TIME_PATTERN, _NANOSECONDS)):
        if match := pattern.fullmatch(text):
            return int(Decimal(match[1]) * units[match[2]])
    return 0


_FRACTION = {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "fraction kept"}
Cost = Annotated[
    int | float | str | None,
    PlainValidator(_check_cost),
    WithJsonSchema(
        {
            "anyOf": [
                _FRACTION,
                {"type": "integer", "minimum": 2},
                {"type": "string", "pattern": f"^{_COST_PATTERN.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]
Time = Annotated[
    float | str | None,
    PlainValidator(_check_time),
    WithJsonSchema(
        {"anyOf": [_FRACTION, {"type": "string", "pattern": f"^{_TIME_PATTERN.pattern}$"}, {"type": "null"}]}
    ),
]


class Budget(Section):
    """What the compressed model may cost. Every limit given must hold.

    :param macs: multiply-accumulates left: a fraction in (0, 1], a whole number, or text such as ``"300M"``.
    :param params: parameters left, in the same forms.
    :param latency: measured time of one request: a fraction of the dense model's, or a time such as ``"4.5ms"``.
    :param runtime: what measures latency: ``"openvino"``, ``"onnxruntime"`` or a plugin's. In Python it may be a meter.
    :param device: of this runtime.
    :param precision: of the exported network that is measured: ``"fp32"``, ``"fp16"``, ``"int8"``.
    :param hint: what the runtime tunes for: ``"latency"``, or ``"throughput"``, the time per request at full load.
    :param batch: samples of a request.
    :param threads: CPU threads; null leaves them to the runtime.
    """

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [name]} for name in KINDS]})

    macs: Cost = None
    params: Cost = None
    latency: Time = None
    runtime: Annotated[str | Callable[..., Any], Registered("latency_meters")] = "openvino"
    device: str = "CPU"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    hint: Literal["latency", "throughput"] = "latency"
    batch: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.macs is None and self.params is None and self.latency is None:
            msg = 'expected at least one of "macs", "params", "latency", such as {"macs": 0.5}.'
            raise ValueError(msg)
        idle = [key for key in type(self).model_fields if key in self.model_fields_set and key not in KINDS]
        if self.latency is None and idle:
            msg = f'"{idle[0]}" says how latency is measured, and there is no "latency". Add it, or leave this out.'
            raise ValueError(msg)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return written if self.latency is not None else {key: written[key] for key in KINDS if key in written}

    def resolve(self, kind: Kind, dense: int) -> int:
        """
        :param kind: which limit.
        :param dense: the cost of the dense model; of latency in nanoseconds.
        :return: the largest cost allowed; ``dense`` where this budget says nothing about it.
        """
        value = {"macs": self.macs, "params": self.params, "latency": self.latency}[kind]
        if value is None:
            return dense
        if isinstance(value, str):
            return _absolute(value)
        # Decimal, since 0.29 * 100 is 28.999999999999996 in floats.
        return int(Decimal(str(value)) * dense) if value <= 1 else int(value)
