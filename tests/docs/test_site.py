"""The documentation builds as a site without a warning, stands alone, and a real browser shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import headless_browser
from support.places import ROOT

import nncf_compactprune

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytest.importorskip("material", reason="mkdocs-material is not installed")
pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed")

WIDTHS = (390, 1280)  # a telephone, a desktop
#: what a page fetches by itself; links that a reader follows are not meant
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"|<link[^>]*\srel="(?:stylesheet|icon|preload)"[^>]*\shref="([^"]+)\""""
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not quietly: warnings that are not printed are not counted, and a strict build passes.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def test_every_page_is_there(site: Path) -> None:
    written = {page.relative_to(site).with_suffix(".md").as_posix() for page in pages(site)}
    assert {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} <= written


def test_pages_ask_for_nothing_elsewhere(site: Path) -> None:
    for page in pages(site):
        fetched = [src or href for src, href in FETCHED.findall(page.read_text(encoding="utf-8"))]
        assert fetched
        assert [one for one in fetched if one.startswith(("http:", "https:", "//"))] == [], page


def test_reference_holds_everything_public(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    for name in set(nncf_compactprune.__all__) - {"hookimpl", "__version__"}:
        owner = getattr(getattr(nncf_compactprune, name), "__module__", "nncf_compactprune")
        assert anchors & {f"nncf_compactprune.{name}", f"{owner}.{name}"}, name
    words = re.sub(r"<[^>]+>", "", text)
    assert re.findall(r":(?:param|raises|class|func|meth)\b[^ ]*:", words) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a heading](index.md#nowhere)", "#nowhere"),
        ("[a script](../examples/nowhere.py)", "nowhere.py"),
    ],
)
def test_a_broken_link_ends_the_build(broken: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{broken}\n")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = text[text.index("validation:") : text.index("not_in_nav:")]
    hooks = f"hooks: [{ROOT / 'tools' / 'site_hooks.py'}]\n"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: broken\nstrict: true\n{hooks}{validation}")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert said in done.stdout + done.stderr


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless_browser() as driver:
        yield driver


@pytest.mark.parametrize("width", WIDTHS)
def test_browser_shows_every_page_within_its_width(width: int, site: Path, browser: Any) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    names = {"index", "config", "api", "architecture", "RESULTS"}  # where it is narrow, all; what fits there fits here
    shown = [page for page in pages(site) if "repository" not in page.parts or page.stem in names]
    for page in shown if width == min(WIDTHS) else [page for page in shown if page.stem in names]:
        browser.get(page.as_uri())
        found = browser.execute_script(
            "return {wide: document.documentElement.scrollWidth, title: document.querySelector('h1').innerText,"
            "size: parseFloat(getComputedStyle(document.querySelector('article')).fontSize)}"
        )
        assert found["wide"] <= width, f"{page.name} scrolls sideways"
        assert found["title"]
        assert found["size"] >= 12
