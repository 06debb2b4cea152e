"""What the keys of a section mean: the ``:param`` texts of its class and of those that it derives from."""

from __future__ import annotations

import inspect
import re

_PARAM = re.compile(r"^:param (\w+): (.*?)(?=^:|\Z)", re.DOTALL | re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


def descriptions(model: type) -> dict[str, str]:
    """Returns the text of every key that the docstrings of ``model`` and its bases describe, as plain Markdown.

    A class's own text comes before its bases'. Keys that nobody describes are left out.
    """
    found: dict[str, str] = {}
    for cls in model.__mro__:
        for name, text in _PARAM.findall(inspect.cleandoc(cls.__dict__.get("__doc__") or "")):
            plain = _ROLE.sub(r"`\1`", " ".join(text.split())).replace("``", "`")
            found.setdefault(name, plain)
    return found
