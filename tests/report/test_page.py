"""The page of a run stands alone, and a real browser shows it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import headless_browser
from support.summaries import summary_document

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.report.page import compare_page, run_page
from nncf_compactprune.report.summary import Summary, read_summary, summary_schema, summary_text

WIDTHS = (390, 1280)  # a telephone, a desktop


@pytest.fixture(scope="module")
def summary() -> Summary:
    return Summary.model_validate(summary_document())


@pytest.fixture(scope="module")
def pages(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    texts = {"run": run_page(summary), "compare": compare_page({"half <b>": summary, "third": summary})}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def test_page_asks_for_nothing_else(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text)
        assert addresses
        assert all(address.startswith("data:") for address in addresses)
        assert "<script" not in text


def test_page_says_all_that_the_summary_holds(summary: Summary, pages: dict[str, Path]) -> None:
    text = pages["run"].read_text(encoding="utf-8")
    for one in summary.widths:
        assert f"<code>{one.name}</code>" in text
    for pinned in summary.pinned:
        assert pinned.reason in text
    for said in ("63 of 64", "-0.50 points", "25.0 %", "int8 + f32", "memory-bound", "differs from torch by"):
        assert said in text, said
    assert "run config.json --set epochs=3" in text
    assert "Dataset imagefolder:pictures, without labels ·" in text  # the summary names no class


def test_names_are_text_and_never_markup(pages: dict[str, Path]) -> None:
    assert "half <b>" not in pages["compare"].read_text(encoding="utf-8")


def test_summary_follows_its_schema(summary: Summary, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(summary_text(summary_document()))
    assert read_summary(tmp_path) == summary
    schema = summary_schema()
    assert schema["additionalProperties"] is False
    optional = {"summary_version", "files", "labels", "pixels", "accuracy_aware_training", "latency_budget"}
    assert set(summary_document()) | optional == set(schema["properties"])
    (tmp_path / "summary.json").write_text(json.dumps({**summary_document(), "modell": 1}))
    with pytest.raises(CompactPruneError, match="is no summary of a run"):
        read_summary(tmp_path)
    with pytest.raises(CompactPruneError, match="no directory of a finished run"):
        read_summary(tmp_path / "none")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless_browser() as driver:
        yield driver


@pytest.mark.parametrize("name", ["run", "compare"])
def test_browser_shows_the_page(name: str, pages: dict[str, Path], browser: Any) -> None:
    for width in WIDTHS:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        browser.get(pages[name].as_uri())
        assert browser.get_log("browser") == []
        page = browser.execute_script(
            "return {wide: document.documentElement.scrollWidth, pictures: [...document.images].map("
            "i => [i.naturalWidth, i.getBoundingClientRect().width, i.getBoundingClientRect().height, i.alt]),"
            "smallest: Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText).map("
            "e => parseFloat(getComputedStyle(e).fontSize)))}"
        )
        assert page["wide"] <= width, "the page itself scrolls sideways"
        assert page["smallest"] >= 12
        assert page["pictures"]
        for natural, shown, height, words in page["pictures"]:
            assert natural > 0
            assert height > 50
            assert words
            # Letters in the pictures are 8 points, 10.7 pixels, when they are shown at their own size.
            assert shown >= 0.7 * natural
    asked = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    addresses = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert addresses
    assert all(address.startswith(("file:", "data:")) for address in addresses)


def test_page_prints(pages: dict[str, Path], browser: Any) -> None:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(pages["run"].as_uri())
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert len(printed) > 10_000
    pages_printed = len(re.findall(rb"/Type\s*/Page[^s]", printed))
    assert 1 < pages_printed < 12
