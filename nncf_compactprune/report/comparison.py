"""The dense and the pruned network side by side, for the terminal, for a page, and for a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from rich.table import Table

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.storage.writing import write_whole


@dataclass(frozen=True)
class NetworkFigures:
    """What one network costs and how good it is.

    :param macs: multiply-accumulates of one sample.
    :param params: number of parameters.
    :param accuracy: in [0, 1]; ``None`` when it was not measured.
    :param file_bytes: bytes on disk by format, such as ``{"OpenVINO FP16": 2_400_000}``.
    :param latency_ms: time of one request by file, such as ``{"OpenVINO FP32": 4.5}``, and by settings of a budget.
    """

    macs: int
    params: int
    accuracy: float | None = None
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The network before and after.

    :param dense: before the pruning.
    :param pruned: after pruning and fine-tuning.
    """

    dense: NetworkFigures
    pruned: NetworkFigures


@dataclass(frozen=True)
class _Row:
    name: str
    dense: float | None
    pruned: float | None
    show: Callable[[float], str]
    dense_is: str = ""

    @property
    def ratio(self) -> float | None:
        """Pruned over dense; ``None`` when one is missing or dense is zero."""
        return None if self.dense is None or self.pruned is None or not self.dense else self.pruned / self.dense

    @property
    def cells(self) -> tuple[str, str, str, str]:
        dense, pruned = ("-" if value is None else self.show(value) for value in (self.dense, self.pruned))
        dense += f" ({self.dense_is})" if self.dense_is else ""
        if self.name == "Accuracy" and self.dense is not None and self.pruned is not None:
            # A ratio of accuracies means nothing to anybody; points do.
            last = f"{100 * (self.pruned - self.dense):+.2f} points"
        else:
            last = "-" if self.ratio is None else f"{100 * self.ratio:.1f} %"
        return self.name, dense, pruned, last


_HEADINGS = ("", "Dense", "Pruned", "Pruned / dense")


def rich_table(comparison: Comparison, title: str | None = None) -> Table:
    """The comparison as a table for the terminal; a figure that neither network has gets no row.

    :param comparison: what to show.
    :param title: above the table; default: none.
    """
    table = Table(title=title)
    for position, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if position else "left", no_wrap=position > 0)
    previous = ""
    for row in _rows(comparison):
        kind = row.name.partition(",")[0]
        if previous and kind != previous and "," in row.name:
            table.add_section()
        previous = kind
        table.add_row(*row.cells)
    return table


def to_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table, ending in a newline."""
    lines = [_HEADINGS, ("---", "---:", "---:", "---:"), *(row.cells for row in _rows(comparison))]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def comparison_cells(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """The comparison in words: name, dense, pruned, pruned over dense, a row each."""
    return [row.cells for row in _rows(comparison)]


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON: ``dense`` and ``pruned`` in raw numbers, ``ratio`` (pruned over dense) of the costs."""
    dense, pruned = comparison.dense, comparison.pruned
    document = {
        "dense": _plain(dense),
        "pruned": _plain(pruned),
        "ratio": {
            "macs": _Row("", dense.macs, pruned.macs, str).ratio,
            "params": _Row("", dense.params, pruned.params, str).ratio,
            "file_bytes": {row.name: row.ratio for row in _pairs("", dense.file_bytes, pruned.file_bytes, str)},
            "latency_ms": {row.name: row.ratio for row in _pairs("", dense.latency_ms, pruned.latency_ms, str)},
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write_comparison(comparison: Comparison, path: str | PathLike[str]) -> Path:
    """Writes Markdown or JSON, by the file name's ending.

    :param comparison: what to write.
    :param path: a ``.md`` or ``.json`` file; replaced whole.
    :return: the path written.
    :raises CompactPruneError: for another ending.
    :raises StorageError: when the file cannot be written.
    """
    file = Path(path)
    writers = {".md": to_markdown, ".json": to_json}
    if file.suffix not in writers:
        msg = f"{file}: expected a file name that ends in .md or .json, got '{file.name}'."
        raise CompactPruneError(msg)
    return write_whole(file, writers[file.suffix](comparison).encode())


def _rows(comparison: Comparison) -> Iterator[_Row]:
    dense, pruned = comparison.dense, comparison.pruned
    if dense.accuracy is not None or pruned.accuracy is not None:
        yield _Row("Accuracy", dense.accuracy, pruned.accuracy, lambda value: f"{100 * value:.2f} %")
    yield _Row("MACs", dense.macs, pruned.macs, in_words)
    yield _Row("Parameters", dense.params, pruned.params, in_words)
    yield from _pairs("File, ", dense.file_bytes, pruned.file_bytes, _bytes)
    yield from _pairs("Latency, ", dense.latency_ms, pruned.latency_ms, lambda value: f"{value:.3g} ms")


def _pairs(
    prefix: str, dense: Mapping[str, float], pruned: Mapping[str, float], show: Callable[[float], str]
) -> Iterator[_Row]:
    for key in [*dense, *(key for key in pruned if key not in dense)]:
        beside = dense_label(key, dense)
        precision = beside.rpartition(" ")[2] if beside != key else ""
        yield _Row(f"{prefix}{key}", dense.get(beside), pruned.get(key), show, precision)


def dense_label(label: str, dense: Iterable[str]) -> str:
    """The dense network's file that one of the pruned network is set beside: of the same format and precision; for an
    INT8 file the float file of its format, the first where there are several.

    :param label: of the pruned network's file, such as ``ONNX INT8``.
    :param dense: labels of the dense network's files.
    """
    format_, _, precision = label.rpartition(" ")
    of_its_format = [one for one in dense if one.rpartition(" ")[0] == format_]
    return of_its_format[0] if precision == "INT8" and label not in of_its_format and of_its_format else label


def in_words(value: float) -> str:
    """A count with a unit: ``4.00 G``."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " K")):
        # 999_999 rounds to 1.00 M, not to 1000.00 K.
        if value >= size * 0.999995:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _plain(figures: NetworkFigures) -> dict[str, object]:
    return {
        "accuracy": figures.accuracy,
        "macs": figures.macs,
        "params": figures.params,
        "file_bytes": dict(figures.file_bytes),
        "latency_ms": dict(figures.latency_ms),
    }
