"""A picture of the widths before and after."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.storage.writing import write_whole

_FORMATS = (".png", ".svg", ".pdf")
_KEPT, _REMOVED, _TEXT = "#1f6fb4", "#d9e2ec", "#33475b"
_LONGEST_NAME = 44


class GroupWidth(Protocol):
    """A channel group and its width in channels; the groups of a pruning plan are such."""

    @property
    def name(self) -> str:
        """The group's name."""

    @property
    def before(self) -> int:
        """Its channels before pruning."""

    @property
    def after(self) -> int:
        """Its channels after pruning."""


def plot_widths(groups: Sequence[GroupWidth], path: str | PathLike[str], *, title: str = "Channel widths") -> Path:
    """Draws one horizontal bar per channel group, its kept part filled, from the network's start at the top to its end.

    :param groups: the groups in network order.
    :param path: a ``.png``, ``.svg`` or ``.pdf`` file.
    :param title: begins the line above the picture.
    :return: the path written.
    :raises CompactPruneError: for another ending, without matplotlib, or when there is no group.
    :raises StorageError: when the file cannot be written.
    """
    file = Path(path)
    if file.suffix not in _FORMATS:
        msg = f"{file}: expected a file name that ends in {', '.join(_FORMATS)}, got '{file.name}'."
        raise CompactPruneError(msg)
    if not groups:
        msg = f"{file}: there is no channel group to draw."
        raise CompactPruneError(msg)
    try:
        # Without pyplot: no window system, no global state.
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        msg = "Drawing the widths needs matplotlib. Install it with: pip install 'nncf-compactprune[report]'"
        raise CompactPruneError(msg) from error

    # Inches: a bar's pitch, and room for title and axis.
    figure = Figure(figsize=(9.0, 1.5 + 0.24 * len(groups)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(groups))
    before, after = [group.before for group in groups], [group.after for group in groups]
    axes.barh(rows, before, height=0.72, color=_REMOVED)
    axes.barh(rows, after, height=0.72, color=_KEPT)
    widest = max(before)
    for row, (dense, kept) in enumerate(zip(before, after, strict=True)):
        text = f"{dense}" if kept == dense else f"{kept} of {dense}" if kept else f"{dense}, removed with their branch"
        axes.text(dense + widest * 0.01, row, text, va="center", fontsize=8, color=_TEXT)
    axes.set_yticks(rows, [_shortened(group.name) for group in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.13)
    axes.set_xlabel("channels", fontsize=9, color=_TEXT)
    axes.set_title(f"{title}: {sum(after)} of {sum(before)} channels kept", loc="left", fontsize=11, color=_TEXT)
    axes.tick_params(length=0, colors=_TEXT, labelsize=8)
    axes.set_axisbelow(True)
    axes.xaxis.grid(True, color="#e6eaee", linewidth=0.8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(
        handles=[Patch(color=_KEPT, label="kept"), Patch(color=_REMOVED, label="removed")],
        loc="outside lower right",
        ncols=2,
        fontsize=8,
        frameon=False,
        labelcolor=_TEXT,
    )
    image = io.BytesIO()
    figure.savefig(image, format=file.suffix[1:], dpi=150)
    return write_whole(file, image.getvalue())


def _shortened(name: str) -> str:
    """The end of a long name: it is the end that tells layers apart."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
