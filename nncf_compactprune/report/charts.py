"""Charts of a run, drawn without a window system, as files or inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.report.summary import Layer, Summary

DENSE, PRUNED, OTHER, TEXT, _GRID = "#8899aa", "#1f6fb4", "#c8553d", "#33475b", "#e6eaee"
_SIZE = (4.8, 2.9)  # inches; narrow, so that its words can be read on a telephone
_SHOWN_LAYERS = 18


def curves(summary: Summary, kind: str) -> bytes | None:
    """Loss and accuracy by epoch: training's as lines, the test's as points, never joined.

    :param summary: of the run.
    :param kind: ``svg`` or ``png``.
    :return: the picture; None where nothing was trained.
    """
    epochs = summary.epochs
    if not epochs:
        return None
    figure = new_figure((_SIZE[0], 4.6))
    above, below = figure.subplots(2, 1, sharex=True)
    at = list(range(1, len(epochs) + 1))
    for phase, colour, word in (("dense", DENSE, "dense"), ("pruned", PRUNED, "pruning")):
        chosen = [(n, one) for n, one in zip(at, epochs, strict=True) if one.get("phase") == phase]
        if chosen:
            places = [n for n, _ in chosen]
            above.plot(places, [one["loss"] for _, one in chosen], "o-", ms=3, lw=1.2, color=colour, label=f"{word}")
            shares = [100 * one["accuracy"] for _, one in chosen]
            below.plot(places, shares, "o-", ms=3, lw=1.2, color=colour, label=f"training, {word}")
            test = (summary.dense if phase == "dense" else summary.pruned).accuracy
            if test is not None:
                label = "test" if phase == "pruned" else None
                below.plot([places[-1]], [100 * test], "D", ms=6, color=OTHER, label=label, zorder=3)
    removed = [
        (n, 100 * one["compression_rate"]) for n, one in zip(at, epochs, strict=True) if "compression_rate" in one
    ]
    above.set_ylabel("training loss", fontsize=9, color=TEXT)
    below.set_ylabel("accuracy, %", fontsize=9, color=TEXT)
    below.set_xlabel("epoch", fontsize=9, color=TEXT)
    if removed:
        right = above.twinx()
        right.step(*zip(*removed, strict=True), where="post", color=OTHER, lw=1, ls="--")
        right.set_ylim(0, 100)
        right.set_ylabel("MACs removed, % (dashed)", fontsize=8, color=OTHER)
        plain_axes(right)
    for axes in (above, below):
        plain_axes(axes)
    below.legend(fontsize=7.5, frameon=False, labelcolor=TEXT)
    return drawn(figure, kind)


def layer_times(layers: Sequence[Layer], kind: str) -> bytes | None:
    """Time of the layers that take longest, before and after.

    :param layers: of the files.
    :param kind: ``svg`` or ``png``.
    :return: the picture; None without layers.
    """
    longest = sorted(layers, key=lambda one: -max(one.us_dense, one.us_pruned))[:_SHOWN_LAYERS]
    if not longest:
        return None
    chosen = [one for one in layers if one in longest]
    figure = new_figure((_SIZE[0], 0.9 + 0.26 * len(chosen)))
    axes = figure.subplots()
    rows = range(len(chosen))
    axes.barh([row - 0.2 for row in rows], [one.us_dense for one in chosen], height=0.36, color=DENSE, label="dense")
    axes.barh([row + 0.2 for row in rows], [one.us_pruned for one in chosen], height=0.36, color=PRUNED, label="pruned")
    axes.set_yticks(list(rows), [one.name[-26:] for one in chosen], fontsize=8)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_xlabel("microseconds of one request", fontsize=9, color=TEXT)
    plain_axes(axes)
    figure.legend(fontsize=8, frameon=False, labelcolor=TEXT, loc="outside upper right", ncols=2)
    return drawn(figure, kind)


def front(points: Mapping[str, Summary], kind: str) -> bytes:
    """Accuracy against MACs: every pruned network, and the dense ones that they came from.

    :param points: summaries by the names of the runs.
    :param kind: ``svg`` or ``png``.
    """
    figure = new_figure((_SIZE[0], 3.4))
    axes = figure.subplots()
    dense = {(one.model, one.dense.macs, one.dense.accuracy) for one in points.values()}
    for model, macs, accuracy in sorted(dense, key=str):
        axes.plot([macs / 1e6], [100 * (accuracy or 0)], "s", color=DENSE, ms=7)
        axes.annotate(
            f"{model[-24:]}, dense",
            (macs / 1e6, 100 * (accuracy or 0)),
            fontsize=7,
            color=TEXT,
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
        )
    line = sorted((one.pruned.macs / 1e6, 100 * (one.pruned.accuracy or 0), name) for name, one in points.items())
    axes.plot([x for x, _, _ in line], [y for _, y, _ in line], "o-", color=PRUNED, ms=6, lw=1)
    for x, y, name in line:
        axes.annotate(name, (x, y), fontsize=7, color=TEXT, xytext=(4, -9), textcoords="offset points")
    axes.set_xlabel("million MACs", fontsize=9, color=TEXT)
    axes.set_ylabel("test accuracy, %", fontsize=9, color=TEXT)
    axes.set_xlim(left=0)
    axes.margins(y=0.2)
    plain_axes(axes)
    return drawn(figure, kind)


def inline(picture: bytes, kind: str) -> str:
    """A picture as the address of an ``img`` in a page that needs no other file.

    :param picture: its bytes.
    :param kind: ``svg`` or ``png``.
    """
    mime = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    return f"data:{mime};base64,{base64.b64encode(picture).decode()}"


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure.

    :param size: in inches.
    :raises CompactPruneError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "Charts need matplotlib. Install it with: pip install 'nncf-compactprune[report]'"
        raise CompactPruneError(msg) from error
    return Figure(figsize=size, layout="constrained")


def plain_axes(axes: Any) -> None:
    """A light grid and no frame."""
    axes.tick_params(length=0, colors=TEXT, labelsize=8)
    axes.set_axisbelow(True)
    axes.grid(True, color=_GRID, linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)


def drawn(figure: Any, kind: str) -> bytes:
    """The picture.

    :param figure: from :func:`new_figure`.
    :param kind: ``svg`` or ``png``.
    """
    image = io.BytesIO()
    # Without a date the same run draws the same bytes.
    figure.savefig(image, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()
