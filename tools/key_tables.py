"""Writes the tables of keys in ``docs/`` from the classes that read the keys: ``python tools/key_tables.py``.

A table stands between ``<!-- keys: NAME -->`` and ``<!-- end of keys -->``. NAME is an algorithm or one of ``PARTS``;
``NAME without OTHER`` leaves out what is the same in OTHER. ``tests/docs/test_key_tables.py`` holds the
documents to what this writes.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from nncf_compactprune.config import AccuracyAwareParams, Budget, CompressionConfig
from nncf_compactprune.config.descriptions import descriptions
from nncf_compactprune.config.sections import NotYet
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.run.families.settings import FamilyConfig
from nncf_compactprune.run.settings import RunConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- keys: (.+?) -->\n).*?(<!-- end of keys -->)", re.DOTALL)
Row = tuple[str, str, str]
PARTS: dict[str, type[BaseModel]] = {
    "top level": CompressionConfig,
    "budget": Budget,
    "accuracy-aware training": AccuracyAwareParams,
    "run": RunConfig,
    "family": FamilyConfig,
}


def model_of(name: str) -> type[BaseModel]:
    """The class that reads the keys of an algorithm, or of a part of a config."""
    return PARTS[name] if name in PARTS else default_plugins().algorithms[name].Config


def rows(model: type[BaseModel], prefix: str = "", standing: BaseModel | None = None) -> Iterator[Row]:
    """Key, default as JSON and meaning of everything that a section reads, nested keys by dotted path.

    :param model: the section's class.
    :param prefix: the path so far.
    :param standing: the section that stands where a config names none; its values are the defaults.
    """
    texts = descriptions(model)
    for name, field in model.model_fields.items():
        if name in getattr(model, "unread", {}) or any(isinstance(mark, NotYet) for mark in field.metadata):
            continue
        value = getattr(standing, name) if standing is not None else field.get_default(call_default_factory=True)
        inner = _section(field.annotation)
        if inner is None or (field.annotation is not inner and not isinstance(value, BaseModel)):
            yield prefix + name, "" if field.is_required() else json.dumps(value), texts.get(name, "")
        if inner is not None:
            several = "[]" if typing.get_origin(field.annotation) in (list, tuple) and name != "input_info" else ""
            several = ".SCOPE" if typing.get_origin(field.annotation) is dict else several
            yield from rows(inner, f"{prefix}{name}{several}.", value if isinstance(value, BaseModel) else None)


def _section(annotation: object) -> type[BaseModel] | None:
    kinds = [one for one in (annotation, *typing.get_args(annotation)) if isinstance(one, type)]
    return next((one for one in kinds if issubclass(one, BaseModel)), None)


def table(name: str) -> str:
    """The table that NAME of a marker asks for, as Markdown."""
    name, _, other = name.partition(" without ")
    same = set(rows(model_of(other))) if other else set()
    lines = ["| Key | Default | Meaning |", "| --- | --- | --- |"]
    for key, default, text in rows(model_of(name)):
        if (key, default, text) not in same:
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{key}` | {shown} | {text.rstrip('.').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """A document with its tables as they should be."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", text)


def main() -> None:
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(DOCS.parent)}: written anew")


if __name__ == "__main__":
    main()
