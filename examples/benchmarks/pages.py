"""Pages that benchmarks write for readers."""

from __future__ import annotations

from pathlib import Path

from nncf_compactprune.run.environment import environment


def write_page(page: Path, text: str) -> None:
    """Writes and prints what a benchmark found.

    :param page: a Markdown file.
    :param text: for readers, with what it was measured on, see :func:`measured_on`.
    """
    page.write_text(text, encoding="utf-8")
    print(text)


def measured_on() -> str:
    """The processor and the versions of packages, as a Markdown list."""
    return "\n".join(f"- {name}: {said}" for name, said in environment().items())
