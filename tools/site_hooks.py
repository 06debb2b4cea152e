"""Hooks of the documentation's site: what pages link to outside ``docs/`` becomes a part of the site.

Pages link to examples, configs and benchmark tables as they lie in the repository, so that the links work wherever the
files are read. The site has no repository beside it: each such file becomes a page under ``repository/``, and the
links are turned to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", "": "text", ".csv": "text", ".jsonl": "text"}
PICTURES = {".png", ".svg"}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def origin(uri: str) -> Path:
    """The file in the repository that a page of the site was made from."""
    if not uri.startswith(f"{FOLDER}/"):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix(f"{FOLDER}/")
    return path if path.exists() else path.with_suffix("")


def place(path: Path) -> str:
    """Where a file or folder of the repository is in the site, relative to its root."""
    inside = path.relative_to(ROOT).as_posix()
    if inside.startswith("docs/"):
        return inside.removeprefix("docs/")
    return f"{FOLDER}/{inside}" if path.suffix in {".md", *PICTURES} else f"{FOLDER}/{inside}.md"


def linked(text: str, folder: Path) -> Iterator[Path]:
    """Every file of the repository that a text links to.

    :param text: Markdown.
    :param folder: what its links start from.
    """
    for match in LINK.finditer(FENCE.sub("", text)):
        path = Path(os.path.normpath(folder / match[2]))
        if path.exists() and path.is_relative_to(ROOT):
            yield path


def page_text(path: Path) -> str:
    """A file as Markdown: Markdown as it is, code as a block, a folder as all of its files."""
    if path.is_dir():
        inner = [one for one in sorted(path.rglob("*")) if one.is_file() and one.suffix in LANGUAGES]
        blocks = [f"## {one.relative_to(path)}\n\n{_block(one)}" for one in inner if "egg-info" not in str(one)]
        return f"# {path.relative_to(ROOT)}\n\n" + "\n\n".join(blocks)
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        return text if text.startswith("# ") else f"# {path.name}\n\n{text}"
    return f"# {path.relative_to(ROOT)}\n\n{_block(path)}"


def _block(path: Path) -> str:
    text = path.read_text(encoding="utf-8").rstrip("\n")
    return f"````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each linked file, and for what those link to in turn."""
    waiting = [
        path
        for file in files.documentation_pages()
        for path in linked(file.content_string, origin(file.src_uri).parent)
    ]
    waiting += [ROOT / uri.removeprefix(f"{FOLDER}/") for uri in _in_nav(config["nav"]) if uri.startswith(FOLDER)]
    while waiting:
        path = waiting.pop()
        uri = place(path)
        if files.get_file_from_path(uri) is not None or not path.exists():
            continue
        if path.suffix in PICTURES:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
            continue
        text = page_text(path)
        files.append(File.generated(config, uri, content=text))
        if path.suffix == ".md":
            waiting += linked(text, path.parent)
    return files


def _in_nav(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _in_nav(inner)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links that leave ``docs/`` to the pages made above."""
    here, folder = page.file.src_uri, origin(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match[2]))
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        return match[1] + os.path.relpath(place(path), os.path.dirname(here) or ".") + match[3]

    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(turned, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(turned, markdown[at:])])
