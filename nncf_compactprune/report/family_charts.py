"""The front of a family, drawn: accuracy against what the networks cost."""

from __future__ import annotations

from typing import Any

from nncf_compactprune.report.charts import DENSE, OTHER, PRUNED, TEXT, drawn, new_figure, plain_axes
from nncf_compactprune.report.families import Cost, Point, Results

_PANEL = (3.6, 3.2)  # inches


def fronts(results: Results, kind: str) -> bytes:
    """Accuracy against MACs, parameters and latency, where these were measured; siblings on the same axes.

    :param results: what was measured.
    :param kind: ``svg`` or ``png``.
    """
    panels: list[tuple[Cost, str, float]] = [("macs", "million MACs", 1e6), ("params", "million parameters", 1e6)]
    if results.runtime is not None:
        panels.append(("latency_ms", f"milliseconds, {results.runtime}", 1.0))
    figure = new_figure((_PANEL[0] * len(panels), _PANEL[1]))
    for axes, (cost, label, unit) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        _panel(axes, results, cost, unit)
        axes.set_xlabel(label, fontsize=9, color=TEXT)
        plain_axes(axes)
    figure.axes[0].set_ylabel("test accuracy, %", fontsize=9, color=TEXT)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, labelcolor=TEXT, loc="outside upper right", ncols=3)
    return drawn(figure, kind)


def _panel(axes: Any, results: Results, cost: Cost, unit: float) -> None:
    def place(point: Point) -> tuple[float, float]:
        return getattr(point, cost) / unit, 100 * point.accuracy

    line = sorted(place(point) for point in results.front)
    axes.plot(*zip(*line, strict=True), "-", color=PRUNED, lw=1)
    dense, *members = results.front
    axes.plot(*place(dense), "s", color=DENSE, ms=7, label="dense")
    axes.plot(*zip(*map(place, members), strict=True), "o", color=PRUNED, ms=6, label="pruned from it")
    if results.siblings:
        axes.plot(*zip(*map(place, results.siblings), strict=True), "D", color=OTHER, ms=6, label="unpruned siblings")
    for at, point in enumerate(sorted(results.points, key=place)):  # neighbours: one name above, one below
        axes.annotate(
            point.name.removeprefix("macs_"),
            place(point),
            fontsize=7.5,
            color=TEXT,
            xytext=(0, 7 if at % 2 else -13),
            textcoords="offset points",
            ha="center",
        )
    least, most = (limit(place(point)[0] for point in results.points) for limit in (min, max))
    axes.set_xlim(0 if least < most / 2 else least - 0.2 * (most - least) - 0.02 * most, most + 0.15 * (most - least))
    axes.margins(y=0.2)
    axes.locator_params(axis="x", nbins=5)
