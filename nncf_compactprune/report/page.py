"""One page of a run, or of several side by side: HTML that holds its pictures and styles and asks for nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.report.charts import curves, front, inline, layer_times
from nncf_compactprune.report.comparison import Comparison, NetworkFigures, comparison_cells, dense_label, in_words
from nncf_compactprune.report.summary import Summary

PAGE_FILE = "report.html"


def run_page(summary: Summary) -> str:
    """A run as a page.

    :param summary: of the run.
    :return: HTML.
    :raises CompactPruneError: without Jinja2 or matplotlib.
    """
    pictures = {"curves": curves(summary, "svg"), "layers": layer_times(summary.layers, "svg")}
    reasons: dict[str, list[str]] = {}
    for one in summary.pinned:
        reasons.setdefault(one.reason, []).append(f"{one.name} ({one.channels})")
    return _rendered(
        "run.html",
        summary=summary,
        cards=_cards(summary),
        rows=comparison_cells(comparison_of(summary)),
        reasons=reasons,
        widest=max((one.before for one in summary.widths), default=1),
        pictures={name: inline(one, "svg") for name, one in pictures.items() if one is not None},
        config=json.dumps(summary.config, indent=2, ensure_ascii=False),
    )


def compare_page(summaries: Mapping[str, Summary]) -> str:
    """Runs side by side as a page.

    :param summaries: by the names of the runs.
    :return: HTML.
    :raises CompactPruneError: without Jinja2 or matplotlib.
    """
    measured = {name: one for name, one in summaries.items() if one.pruned.accuracy is not None}
    picture = inline(front(measured, "svg"), "svg") if measured else None
    return _rendered("compare.html", summaries=summaries, picture=picture)


def comparison_of(summary: Summary) -> Comparison:
    """Dense and pruned figures of a summary."""
    return Comparison(
        *(
            NetworkFigures(one.macs, one.params, one.accuracy, one.file_bytes, one.latency_ms)
            for one in (summary.dense, summary.pruned)
        )
    )


def _cards(summary: Summary) -> list[tuple[str, str, str]]:
    """Title, the figure, and what it is relative to."""
    dense, pruned = summary.dense, summary.pruned
    cards = []
    if dense.accuracy is not None and pruned.accuracy is not None:
        points = 100 * (pruned.accuracy - dense.accuracy)
        cards.append(("Test accuracy", f"{100 * pruned.accuracy:.2f} %", f"{points:+.2f} points"))
    cards.append(("MACs", f"{_share(pruned.macs, dense.macs)} %", f"of {in_words(dense.macs)}"))
    cards.append(("Parameters", f"{_share(pruned.params, dense.params)} %", f"of {in_words(dense.params)}"))
    for label, after in list(pruned.latency_ms.items())[:1]:
        before = dense.latency_ms.get(dense_label(label, dense.latency_ms))
        if before and after:
            cards.append((f"Speed, {label}", f"{before / after:.2f} times", f"{before:.3g} → {after:.3g} ms"))
    good = sum(not one.problems for one in summary.served)
    if summary.served:
        cards.append(("Files verified as served", f"{good} of {len(summary.served)}", "outputs and decisions"))
    return cards


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def _rendered(template: str, **values: Any) -> str:
    try:
        import jinja2
    except ImportError as error:
        msg = "The HTML report needs Jinja2. Install it with: pip install 'nncf-compactprune[report]'"
        raise CompactPruneError(msg) from error
    folder = resources.files("nncf_compactprune.report") / "templates"
    sources = {one.name: one.read_text(encoding="utf-8") for one in folder.iterdir() if one.name.endswith(".html")}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda value: "-" if value is None else f"{100 * value:.2f} %"
    return str(environment.get_template(template).render(**values))
