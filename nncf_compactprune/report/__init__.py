"""Numbers and pictures of what pruning changed."""

from __future__ import annotations

from nncf_compactprune.report.comparison import (
    Comparison,
    NetworkFigures,
    rich_table,
    to_json,
    to_markdown,
    write_comparison,
)
from nncf_compactprune.report.plots import GroupWidth, plot_widths

__all__ = [
    "Comparison",
    "GroupWidth",
    "NetworkFigures",
    "plot_widths",
    "rich_table",
    "to_json",
    "to_markdown",
    "write_comparison",
]
