"""Reads the JSON text of a pruning plan from anywhere: nothing in it is believed, and the first fault ends it.

By hand and not by a schema library: those collect every fault, and a megabyte of faults becomes a gigabyte of them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from nncf_compactprune.errors import PlanError

PLAN_FORMAT = "nncf_compactprune.plan"
PLAN_VERSION = 1
MAX_PLAN_CHARACTERS = 2**26
MAX_COUNT = 2**62
SHOWN_CHARACTERS = 80
_FIELDS = (
    "format", "version", "algorithm", "fingerprint", "before", "after", "groups", "pinned", "approximate", "attributes",
    "kept",
)  # fmt: skip

Reader = Callable[[Any, str], Any]


def shown(text: str) -> str:
    """Text from outside, fit for a message: short, and without control characters."""
    short = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


def read_plan(text: str | bytes) -> dict[str, Any]:
    """The fields of a plan, with types, ranges and names checked; whether they fit a model is not known here.

    :return: ``before`` and ``after`` as ``{"macs", "params"}``, ``groups`` as ``{"name", "before", "after"}``,
        ``pinned`` and ``approximate`` as tuples, ``attributes`` as module to attribute to a number or a tuple of
        numbers, ``kept`` as name to dimension to positions, ``output_classes`` as a tuple, ``removed`` as
        ``{"block", "layers"}``.
    :raises PlanError: not JSON, not a plan, another version, a field of another type, a name given twice.
    """
    document = _parsed(text)
    if isinstance(document, dict):
        _same(document.get("format"), "format", PLAN_FORMAT)
        _same(document.get("version"), "version", PLAN_VERSION)
    # Only plans that cut a classifier, or a branch as a whole, have these.
    more = [name for name in ("output_classes", "removed") if isinstance(document, dict) and name in document]
    fields = _object(document, "document", (*_FIELDS, *more))
    before, after = _cost(fields["before"], "before"), _cost(fields["after"], "after")
    for what in ("macs", "params"):
        _at_most(after[what], f"after.{what}", before[what])
    return {
        "kept": {name: _dims(dims, f"kept.{shown(name)}") for name, dims in _names(fields["kept"], "kept").items()},
        "fingerprint": _fingerprint(fields["fingerprint"], "fingerprint"),
        "before": before,
        "after": after,
        "groups": _each(fields["groups"], "groups", _group),
        "pinned": _each(fields["pinned"], "pinned", _pinned),
        "algorithm": _text(fields["algorithm"], "algorithm"),
        "approximate": _each(fields["approximate"], "approximate", _approximate),
        "attributes": {
            name: {
                key: _number(value, f"attributes.{shown(name)}") for key, value in _names(values, "attributes").items()
            }
            for name, values in _names(fields["attributes"], "attributes").items()
        },
        "output_classes": _classes(fields["output_classes"]) if "output_classes" in more else (),
        "removed": _each(fields["removed"], "removed", _branch) if "removed" in more else (),
    }


def _parsed(text: str | bytes) -> Any:
    what = "document"
    if not isinstance(text, (str, bytes)):
        raise _fault(what, "JSON text", text)
    if len(text) > MAX_PLAN_CHARACTERS:
        raise _fault(what, f"at most {MAX_PLAN_CHARACTERS} characters", len(text))
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_unique, parse_float=_no_fraction, parse_constant=_no_fraction)
    except RecursionError as error:
        msg = "plan: document: nested too deeply for a plan."
        raise PlanError(msg) from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        msg = f"plan: document: not JSON: {shown(str(error))}."
        raise PlanError(msg) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ: of two entries, one reader would take the first and another the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                msg = f"plan: document: '{shown(name)}' is given twice."
                raise PlanError(msg)
            seen.add(name)
    return result


def _no_fraction(text: str) -> Any:
    msg = f"plan: document: expected whole numbers only, got {shown(text)}."
    raise PlanError(msg)


def _fault(where: str, expected: str, got: object) -> PlanError:
    # Containers are named by their type only: their repr may be as long as the document.
    value = type(got).__name__ if isinstance(got, (dict, list)) else shown(repr(got))
    return PlanError(f"plan: {where}: expected {expected}, got {value}.")


def _same(value: Any, where: str, expected: str | int) -> None:
    if type(value) is not type(expected) or value != expected:
        raise _fault(where, f"{expected!r}, as this version of nncf_compactprune writes it", value)


def _object(value: Any, where: str, names: Sequence[str]) -> dict[str, Any]:
    entry = _names(value, where)
    if entry.keys() != set(names):
        extra = next((f"an unknown '{shown(name)}'" for name in entry if name not in names), None)
        missing = next((f"no '{name}'" for name in names if name not in entry), None)
        msg = f"plan: {where}: expected {', '.join(names)}, got {extra or missing}."
        raise PlanError(msg)
    return entry


def _names(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fault(where, "an object", value)
    for name in value:
        _text(name, where)
    return value


def _array(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _fault(where, "an array", value)
    return value


def _each(value: Any, where: str, read: Reader) -> tuple[Any, ...]:
    return tuple(read(item, f"{where}.{i}") for i, item in enumerate(_array(value, where)))


def _text(value: Any, where: str) -> str:
    # Lone surrogates are valid in JSON, but no text: printing them would fail.
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise _fault(where, "text", value)
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise _fault(where, f"a whole number from 0 to {MAX_COUNT}", value)
    return value


def _number(value: Any, where: str) -> int | tuple[int, ...]:
    return _each(value, where, _count) if isinstance(value, list) else _count(value, where)


def _at_most(value: int, where: str, limit: int) -> None:
    if value > limit:
        raise _fault(where, f"at most {limit}, its value before", value)


def _fingerprint(value: Any, where: str) -> str:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise _fault(where, "64 hexadecimal digits", value)
    return value


def _cost(value: Any, where: str) -> dict[str, int]:
    return {name: _count(count, f"{where}.{name}") for name, count in _object(value, where, ("macs", "params")).items()}


def _group(value: Any, where: str) -> dict[str, Any]:
    entry = _object(value, where, ("name", "before", "after"))
    _text(entry["name"], f"{where}.name")
    _at_most(_count(entry["after"], f"{where}.after"), f"{where}.after", _count(entry["before"], f"{where}.before"))
    return entry


def _branch(value: Any, where: str) -> dict[str, Any]:
    entry = _object(value, where, ("block", "layers"))
    return {"block": _text(entry["block"], where), "layers": _each(entry["layers"], where, _text)}


def _pinned(value: Any, where: str) -> tuple[Any, ...]:
    return _row(value, where, (_text, _count, _text))


def _approximate(value: Any, where: str) -> tuple[Any, ...]:
    return _row(value, where, (_text, _text))


def _row(value: Any, where: str, readers: Sequence[Reader]) -> tuple[Any, ...]:
    if len(_array(value, where)) != len(readers):
        raise _fault(where, f"{len(readers)} values", len(value))
    return tuple(read(item, f"{where}.{i}") for i, (read, item) in enumerate(zip(readers, value, strict=True)))


def _classes(value: Any) -> tuple[int, ...]:
    where = "output_classes"
    classes: tuple[int, ...] = _each(value, where, _count)
    if not classes or any(a >= b for a, b in itertools.pairwise(classes)):
        raise _fault(where, "ascending class indices without repeats, at least one", value)
    return classes


def _dims(value: Any, where: str) -> dict[int, tuple[int, ...]]:
    kept = {}
    for dim, positions in _names(value, where).items():
        if re.fullmatch("[0-9]|1[0-6]", dim) is None:  # one spelling for each: "1" and "01" would become one entry
            raise _fault(where, "dimensions from 0 to 16", dim)
        for position in _array(positions, f"{where}.{dim}"):
            if type(position) is not int or not 0 <= position <= MAX_COUNT:
                _count(position, f"{where}.{dim}")
        kept[int(dim)] = tuple(positions)
    return kept
