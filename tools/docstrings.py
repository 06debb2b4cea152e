"""Brings docstrings, which are reStructuredText, into the Markdown of the site's reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|ref):`([^`]+)`")
DOCTEST = re.compile(r"(?:^[ ]*(?:>>>|\.\.\.).*\n?(?:^[ ]*(?!>>>|:)\S.*\n?)*)+", re.MULTILINE)
CODE_BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n\n((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)

#: the ends of the names of pydantic's classes
SECTIONS = ("BaseModel", "Section", "Config", "Params", "Initializer")


def markdown(text: str) -> str:
    """The same text with roles as code, and examples as blocks."""
    text = ROLE.sub(_name, text)
    text = CODE_BLOCK.sub(lambda m: f"```{m[1]}\n{_dedented(m[2])}\n```\n", text)
    return DOCTEST.sub(lambda m: f"```pycon\n{_dedented(m[0])}\n```\n", text)


def _name(match: re.Match[str]) -> str:
    name = match[1]
    return f"`{name[1:].rpartition('.')[2] if name.startswith('~') else name}`"


def _dedented(text: str) -> str:
    lines = text.rstrip().splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:] for line in lines)


class Markdown(griffe.Extension):
    """Rewrites every docstring as it is read. What pydantic's classes call parameters are attributes to a reader."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        obj.docstring.value = markdown(obj.docstring.value)
        if obj.is_class and any(str(base).endswith(SECTIONS) for base in obj.bases):
            obj.docstring.value = obj.docstring.value.replace(":param ", ":ivar ")
