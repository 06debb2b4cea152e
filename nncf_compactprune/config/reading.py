"""From configuration files to plain JSON values: comments, encodings, repeated keys, and the writing of values back."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nncf_compactprune.errors import ConfigError, Problem

#: where in a document: keys and indices
JsonPath = tuple[str | int, ...]
#: a path and what is wrong there
Finding = tuple[JsonPath, str]

_MAX_DEPTH = 50
#: keys of the top level that are of no entry
BESIDE_ENTRIES = ("input_info", "target_device", "accuracy_aware_training")


@dataclass(frozen=True)
class Document:
    """A configuration as plain data.

    :param name: what to call it in messages: the file, or a word for where it came from.
    :param data: objects, lists and scalars.
    """

    name: str
    data: dict[str, Any]


def read_document(
    source: Document | str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str = "config",
) -> Document:
    """Reads a configuration without judging what it says.

    :param source: a path, a mapping, or a document, which stays as it is.
    :param overrides: values by dotted path, such as ``{"epochs": 3, "compression.budget.macs": 0.4}``.
    :param name: what to call a mapping in messages; a file is called by its path.
    :raises ConfigError: there is no such file, it holds no JSON object, or there is no place for an override.
    """
    value: Any
    if isinstance(source, Document):
        name, value = source.name, source.data
    elif isinstance(source, Mapping):
        value = source
    else:
        name, value = read(source)
        if isinstance(value, list):  # a file may hold the entries alone
            whole = len(value) == 1 and isinstance(value[0], Mapping) and "compression" in value[0]
            value = value[0] if whole else {"compression": value}
    value = _around_an_entry(value)
    document = plain_object(name, value)
    for path, override in (overrides or {}).items():
        _override(document, path, override, name)
    return Document(name, document)


def _around_an_entry(value: Any) -> Any:
    """A configuration around one entry alone, as some files have it; what is none stays as it is."""
    if not isinstance(value, Mapping) or "compression" in value or not isinstance(value.get("algorithm"), str):
        return value
    entry = {key: one for key, one in value.items() if key not in BESIDE_ENTRIES}
    return {**{key: value[key] for key in value if key in BESIDE_ENTRIES}, "compression": entry}


def _override(data: dict[str, Any], path: str, value: Any, name: str) -> None:
    """Sets a value at a dotted path; items of lists are addressed by their index."""
    *parents, last = path.split(".")
    target: Any = data
    try:
        for step in parents:
            target = target[int(step)] if isinstance(target, list) else target.setdefault(step, {})
        target[int(last) if isinstance(target, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        message = "cannot be set: the config has no such place. Join the parts by dots, as in compression.budget.macs."
        raise ConfigError(name, [Problem(path, message)]) from error


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


_TOKEN = r'"(?:\\.|[^"\\])*"'
_COMMENT = re.compile(rf"{_TOKEN}|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_TOKEN}|[\[{{]\s*,|,(?=\s*[\]}}])", re.DOTALL)


def _without_comments(text: str) -> str:
    """Blanks comments and trailing commas, so that lines and columns stay where they were."""
    text = _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), text)
    return _TRAILING_COMMA.sub(lambda m: " " if m[0] == "," else m[0], text)


def read(source: str | os.PathLike[str]) -> tuple[str, Any]:
    """Reads a JSON file that may hold comments and trailing commas.

    :return: the name for messages, and the parsed content, not yet checked by :func:`plain_object`.
    :raises ConfigError: if there is no such file, or it holds no JSON; with line and column where they are known.
    """
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    name = "config"
    if not isinstance(path, str):
        raise _refusal(name, f"expected a path or a mapping, got {type(source).__name__}.")
    if path.lstrip().startswith("{"):
        raise _refusal(name, "expected a path or a mapping, got JSON text. Parse it with json.loads first.")
    name = printable(path)
    try:
        text = _without_comments(_decode(name, Path(path).read_bytes()))
        if not text.strip():
            raise _refusal(name, 'empty. Expected a JSON object with "compression".')
        return name, json.loads(text, object_pairs_hook=_Object, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        raise _refusal(name, f"not valid JSON at line {error.lineno}, column {error.colno}: {what}.") from None
    except RecursionError:
        raise _refusal(name, f"nested deeper than {_MAX_DEPTH} levels.") from None
    except FileNotFoundError:
        raise _refusal(name, "no such file.") from None
    except IsADirectoryError:
        raise _refusal(name, "is a directory. Expected a JSON file.") from None
    except OSError as error:
        raise _refusal(name, f"cannot be read: {error.strerror}.") from None
    except ValueError:
        # What pathlib says of a null byte or a lone surrogate; decoding errors have been dealt with above.
        raise _refusal(name, "is no valid file name.") from None


def _decode(name: str, content: bytes) -> str:
    """The text, without the byte order mark that editors on Windows put in front."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _refusal(name, f"not UTF-8 at byte {error.start}. Save the file in UTF-8.") from None


def _refusal(name: str, message: str) -> ConfigError:
    return ConfigError(name, [Problem("", message)])


def _parse_int(digits: str) -> int | float:
    # Python refuses to parse more than 4300 digits; what is far too large is reported later, with its path.
    return int(digits) if len(digits) < 100 else math.inf


def plain_object(name: str, value: Any, callables_under: str = "compression") -> dict[str, Any]:
    """Copies a document into plain dictionaries, lists and scalars.

    :param name: of the document, for messages.
    :param value: what :func:`read` returned, or a mapping from Python, in which tuples stand for lists.
    :param callables_under: the top-level key below which a Python function may stand for a name; everywhere if empty.
    :raises ConfigError: on repeated keys, numbers out of range, invalid Unicode, other types, or deep nesting.
    """
    findings: list[Finding] = []
    try:
        plain = _plain(value, (), findings, callables_under)
    except RecursionError:
        raise _refusal(name, f"nested deeper than {_MAX_DEPTH} levels.") from None
    if not isinstance(plain, dict):
        findings.append(((), f'expected an object with "compression", got {show(plain)}.'))
    if findings:
        raise ConfigError(name, [Problem(render(path), message) for path, message in findings])
    result: dict[str, Any] = plain
    return result


def _plain(value: Any, path: JsonPath, findings: list[Finding], callables_under: str) -> Any:
    if len(path) > _MAX_DEPTH:
        # As Python itself says of a mapping that holds itself, which is what may come here from code.
        raise RecursionError
    if isinstance(value, Mapping):
        findings.extend(((*path, key), "given twice. Keep one.") for key in getattr(value, "repeated", ()))
        keys = [key for key in value if isinstance(key, str) and printable(key) == key]
        if len(keys) < len(value):
            findings.append((path, "expected keys that are valid text."))
        return {key: _plain(value[key], (*path, key), findings, callables_under) for key in keys}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, index), findings, callables_under) for index, item in enumerate(value)]
    if isinstance(value, (int, float)):
        if not -(2**63) <= value < 2**63:
            findings.append((path, "expected a finite number of ordinary size."))
            return 0
    elif isinstance(value, str):
        if printable(value) != value:
            findings.append((path, f"expected valid Unicode text, got {show(value)}."))
    elif value is not None and not (callable(value) and path and callables_under in ("", path[0])):
        findings.append((path, f"expected a JSON value, got {printable(type(value).__name__)}."))
    return value


def has(value: Any, step: Any) -> bool:
    """Tells whether a value has this key or index.

    :param value: a parsed JSON value.
    :param step: a key or an index.
    """
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)


def show(value: Any) -> str:
    """Writes a value as JSON, cut to a length that a message bears."""
    text = printable(json.dumps(value, ensure_ascii=False, default=repr))
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """Escapes what UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def render(path: JsonPath) -> str:
    """Writes a path as ``compression[0].params.round_to``."""
    steps = [
        f"[{step}]" if isinstance(step, int) else f".{step}" if step.isidentifier() else f"[{show(step)}]"
        for step in path
    ]
    return "".join(steps).removeprefix(".")


def config_error(name: str, findings: Iterable[Finding], document: dict[str, Any]) -> ConfigError:
    """Makes one error of all findings, in the order of the document.

    :param name: of the document, for messages.
    :param findings: pairs of JSON path and message.
    :param document: the parsed document, for the order.
    """

    def position(finding: Finding) -> list[int]:
        key: list[int] = []
        value: Any = document
        for step in finding[0]:
            present = has(value, step)
            order = list(value) if isinstance(value, dict) else []
            key.append(order.index(step) if step in order else step if isinstance(step, int) else len(order))
            value = value[step] if present else None
        return key

    return ConfigError(name, [Problem(render(path), message) for path, message in sorted(findings, key=position)])


def one_of(values: Sequence[Any]) -> str:
    """Writes a choice: ``one of "a", "b"``."""
    shown = ", ".join(dict.fromkeys(show(value) for value in values))
    return f"one of {shown}" if len(values) > 1 else shown or "a known name"
