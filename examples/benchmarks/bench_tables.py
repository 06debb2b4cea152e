"""Rows of the benchmarks' files in one form: a dict by column, with the heading that the table stands under."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path


def tables_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every table of a Markdown text: the heading above it, empty for the first one, and its lines.

    :param text: Markdown.
    """
    heading, table = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if len(table) > 2:
            yield heading, table
        table = []
        if found := re.match(r"##+ (.*)", line):
            heading = found[1]


def cells(line: str) -> list[str]:
    """The cells of one line of a table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(path: Path) -> Iterator[dict[str, object]]:
    """Every row of a results file.

    :param path: ``.md``, ``.csv`` or ``.jsonl``; other files (pictures) have none.
    """
    text = path.read_text(encoding="utf-8") if path.suffix in {".md", ".csv", ".jsonl"} else ""
    if path.suffix == ".md":
        for heading, table in tables_of(text):
            columns = cells(table[0])
            for line in table[2:]:
                yield {"table": heading, "row": dict(zip(columns, cells(line), strict=False))}
    elif path.suffix == ".csv":
        yield from ({"table": path.name, "row": dict(row)} for row in csv.DictReader(text.splitlines()))
    elif path.suffix == ".jsonl":
        yield from ({"table": path.name, "row": json.loads(line)} for line in text.splitlines())
