"""Pydantic's errors in plain words: the JSON path, what was expected, what came, and the nearest valid name.

What was expected is read from the model's JSON schema at that path, which knows both ends of a range and every branch
of a union, where an error knows only the one check that failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nncf_compactprune.config.reading import Finding, JsonPath, has, one_of, show
from nncf_compactprune.errors import nearest

ModelT = TypeVar("ModelT", bound=BaseModel)
#: the unions passed on the way to an error, as (path, pydantic's name of the branch)
_Branches = tuple[tuple[JsonPath, Any], ...]
_Located = tuple[JsonPath, _Branches, ErrorDetails]


def validated(
    model: type[ModelT],
    data: dict[str, Any],
    path: JsonPath,
    findings: list[Finding],
    context: Any = None,
) -> ModelT | None:
    """Validates plain data; where that fails, adds to the findings and returns None.

    :param model: says what is valid.
    :param data: plain objects, lists and scalars.
    :param path: where the data sits in the whole document.
    :param findings: is added to.
    :param context: what validators of the model look things up in.
    """
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        translator = _Translator(data, model.model_json_schema())
        findings.extend(((*path, *at), message) for at, message in translator(error.errors(include_url=False)))
        return None


_DESCRIBED = re.compile(
    r".*_(type|parsing)|int_from_float|int_parsing_size|finite_number|(greater|less)_than(_equal)?|literal_error|enum"
    r"|none_required|union_tag_(invalid|not_found)"
)
_TYPE_WORDS = {"boolean": "true or false", "null": "null", "object": "an object", "string": "a string"}
_PLURALS = {"boolean": "booleans", "object": "objects", "string": "strings", "integer": "whole numbers"}
_PLURALS |= {"number": "numbers", "array": "lists"}


class _Translator:
    """Translates the errors of one validation, looking things up in the data and in the model's JSON schema."""

    def __init__(self, data: Any, schema: dict[str, Any]) -> None:
        self.data = data
        self.schema = schema

    def __call__(self, errors: Iterable[ErrorDetails]) -> list[Finding]:
        located = [(*self._locate(error), error) for error in errors]
        messages = [(path, self._message(path, error)) for path, _, error in _best_branches(located)]
        return list(dict.fromkeys(messages))

    def _locate(self, error: ErrorDetails) -> tuple[JsonPath, _Branches]:
        """Splits pydantic's location into the path in the data, and the branches of unions taken on the way."""
        path: list[str | int] = []
        branches: list[tuple[JsonPath, Any]] = []
        value = self.data
        for index, step in enumerate(error["loc"]):
            if has(value, step):
                path.append(step)
                value = value[step]
            elif error["type"] == "missing" and index == len(error["loc"]) - 1:
                path.append(step)
            else:
                branches.append((tuple(path), step))
        if error["type"].startswith("union_tag_") and isinstance(value, dict):
            name = str(error["ctx"]["discriminator"]).strip("'")
            path += [name] if name.isidentifier() else []
        return tuple(path), tuple(branches)

    def _message(self, path: JsonPath, error: ErrorDetails) -> str:
        kind = error["type"]
        schemas, value = self._at(path)
        expected = self._describe(schemas)
        given = not path or has(self._at(path[:-1])[1], path[-1])
        if not given:
            return f"missing. Expected {expected}." if expected else "missing."
        if kind == "extra_forbidden":
            return self._unknown_key(path)
        if kind in ("value_error", "assertion_error") and str(error["ctx"]["error"]):
            return str(error["ctx"]["error"])
        if expected and _DESCRIBED.fullmatch(kind):
            choices = [choice for schema in schemas for choice in _choices(schema) if isinstance(choice, str)]
            hint = nearest(value, choices) if isinstance(value, str) else ""
            return f"expected {expected}, got {show(value)}.{hint}"
        should = re.fullmatch(r"\w+ should (?:be )?(.*)", error["msg"].replace(" after validation", ""), re.DOTALL)
        if should is None:
            return error["msg"]
        verb = "" if " should be " in error["msg"] else "it to "
        return f"expected {verb}{should[1]}, got {show(value)}."

    def _unknown_key(self, path: JsonPath) -> str:
        key = str(path[-1])
        schemas, _ = self._at(path[:-1])
        properties = {
            name: schema
            for level in schemas
            for name, schema in level.get("properties", {}).items()
            if schema.get("type") != "null"  # a key that is refused itself
        }
        for name, schema in properties.items():
            if any(key in inner.get("properties", {}) for inner in self._expand(schema, None)):
                return f"unknown key here. It belongs into {show(name)}."
        if len(path) > 1 and any(key in level.get("properties", {}) for level in self._at(path[:-2])[0]):
            return "unknown key here. It belongs one level up."
        return f"unknown key.{nearest(key, properties) or f' Expected {one_of(sorted(properties))}.'}"

    def _describe(self, schemas: Sequence[dict[str, Any]]) -> str:
        """Says in words what the schemas accept, or nothing where they cannot say."""
        choices = [choice for schema in schemas for choice in _choices(schema)]
        words = [one_of(choices)] if choices else []
        for schema in schemas:
            kind = schema.get("type")
            if _choices(schema):
                continue
            if kind in ("integer", "number"):
                words.append(("a whole number" if kind == "integer" else "a number") + _range(schema))
            elif kind == "array":
                items = self._expand(_child({"items": schema.get("items")}, 0) or {}, None)
                plural = _PLURALS.get(items[0].get("type", ""), "") if len(items) == 1 else ""
                empty = "a non-empty list" if schema.get("minItems") == 1 else "a list"
                words.append(f"{empty} of {plural}" if plural else empty)
            elif kind == "string" and schema.get("minLength") == 1:
                words.append("a non-empty string")
            elif kind in _TYPE_WORDS:
                words.append(_TYPE_WORDS[kind])
            else:
                return ""
        return " or ".join(dict.fromkeys(words))

    def _at(self, path: Sequence[str | int]) -> tuple[list[dict[str, Any]], Any]:
        """Returns the schemas that hold at a path, references and unions resolved, and the value there."""
        schemas, value = self._expand(self.schema, self.data), self.data
        for step in path:
            value = value[step] if has(value, step) else None
            children = [_child(schema, step) for schema in schemas]
            schemas = [schema for child in children if child is not None for schema in self._expand(child, value)]
        return schemas, value

    def _expand(self, schema: dict[str, Any], value: Any) -> list[dict[str, Any]]:
        if "$ref" in schema:
            return self._expand(self.schema["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
        parts = schema.get("allOf") or schema.get("anyOf") or schema.get("oneOf")
        if not parts or "properties" in schema:
            return [schema]
        expanded = [inner for part in parts for inner in self._expand(part, value)]
        fitting = [inner for inner in expanded if not _contradicts(inner, value)]
        return fitting if any("properties" in inner for inner in fitting) else expanded


def _best_branches(located: list[_Located]) -> list[_Located]:
    """Of each union's branches, keeps the errors of the one that the input came closest to."""
    for point in sorted({at for _, branches, _ in located for at, _ in branches}, key=len):
        by_branch: dict[tuple[Any, ...], list[Any]] = {}
        for item in located:
            by_branch.setdefault(tuple(tag for at, tag in item[1] if at == point), []).append(item)
        outside = by_branch.pop((), [])

        def distance(items: list[Any], point: JsonPath = point) -> tuple[bool, int]:
            return any(path == point and _DESCRIBED.fullmatch(e["type"]) for path, _, e in items), len(items)

        located = outside + min(by_branch.values(), key=distance, default=[])
    return located


def _child(schema: dict[str, Any], step: str | int) -> dict[str, Any] | None:
    if isinstance(step, int):
        prefix = schema.get("prefixItems", [])
        child = prefix[step] if step < len(prefix) else schema.get("items")
    else:
        child = schema.get("properties", {}).get(step, schema.get("additionalProperties"))
    return child if isinstance(child, dict) else None


def _contradicts(schema: dict[str, Any], value: Any) -> bool:
    """Tells whether a constant in an object's schema says that the value means another branch."""
    fixed = {key: inner["const"] for key, inner in schema.get("properties", {}).items() if "const" in inner}
    return isinstance(value, dict) and any(key in value and value[key] != const for key, const in fixed.items())


def _choices(schema: dict[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def _range(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    left = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else ""
    right = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else ""
    if left and right:
        return f" in {left}, {right}"
    if left:
        return f" of at least {low:g}" if low is not None else f" above {above:g}"
    if right:
        return f" of at most {high:g}" if high is not None else f" below {below:g}"
    return ""
