"""Reports show the right numbers and are written whole."""

from __future__ import annotations

import builtins
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nncf_compactprune.errors import CompactPruneError, StorageError
from nncf_compactprune.report import (
    Comparison,
    NetworkFigures,
    plot_widths,
    rich_table,
    to_json,
    to_markdown,
    write_comparison,
)


@dataclass(frozen=True)
class Group:
    name: str
    before: int
    after: int


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        NetworkFigures(4_000_000_000, 999_999, 0.76, {"ONNX FP32": 2**21, "old": 1}, {"OpenVINO FP32": 40.0}),
        NetworkFigures(1_000_000_000, 500_000, 0.755, {"ONNX FP32": 2**20, "a|b": 1023}, {"OpenVINO FP32": 12.5}),
    )


EXPECTED = {
    "Accuracy": ("76.00 %", "75.50 %", "-0.50 points"),
    "MACs": ("4.00 G", "1.00 G", "25.0 %"),
    "Parameters": ("1.00 M", "500.00 K", "50.0 %"),
    "File, ONNX FP32": ("2.00 MiB", "1.00 MiB", "50.0 %"),
    "File, old": ("1 B", "-", "-"),
    "File, a|b": ("-", "1023 B", "-"),
    "Latency, OpenVINO FP32": ("40 ms", "12.5 ms", "31.2 %"),
}


def test_table_shows_every_figure(comparison: Comparison) -> None:
    console = Console(width=120, record=True, force_terminal=False)
    console.print(rich_table(comparison, title="ResNet-50"))
    text = console.export_text()
    assert "ResNet-50" in text
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    assert {row[0]: tuple(row[1:]) for row in rows} == EXPECTED


def test_markdown_is_a_table_with_escaped_bars(comparison: Comparison) -> None:
    lines = to_markdown(comparison).splitlines()
    assert lines[:2] == ["|  | Dense | Pruned | Pruned / dense |", "| --- | ---: | ---: | ---: |"]
    assert lines[2:] == [f"| {name.replace('|', chr(92) + '|')} | {' | '.join(c)} |" for name, c in EXPECTED.items()]


def test_json_holds_raw_numbers_and_ratios(comparison: Comparison) -> None:
    document = json.loads(to_json(comparison))
    assert document["dense"]["params"] == 999_999
    assert document["pruned"]["accuracy"] == 0.755
    assert document["ratio"]["macs"] == 0.25
    assert document["ratio"]["file_bytes"] == {"ONNX FP32": 0.5, "old": None, "a|b": None}
    assert document["ratio"]["latency_ms"] == {"OpenVINO FP32": 0.3125}


def test_what_was_not_measured_has_no_row_and_zero_has_no_ratio() -> None:
    text = to_markdown(Comparison(NetworkFigures(0, 10), NetworkFigures(0, 5)))
    assert "Accuracy" not in text
    assert "| MACs | 0 | 0 | - |" in text
    assert "| Accuracy | - | 50.00 % | - |" in to_markdown(Comparison(NetworkFigures(1, 1), NetworkFigures(1, 1, 0.5)))


def test_int8_files_are_set_beside_the_dense_float_file_of_their_format() -> None:
    dense = NetworkFigures(4, 4, None, {"ONNX FP32": 1000, "ONNX FP16": 500, "OpenVINO FP16": 400}, {"ONNX FP32": 10.0})
    quantized = NetworkFigures(2, 2, None, {"ONNX INT8": 250, "OpenVINO INT8": 100, "GGML INT8": 1}, {"ONNX INT8": 2.5})
    comparison = Comparison(dense, quantized)
    ratio = json.loads(to_json(comparison))["ratio"]
    assert ratio["file_bytes"]["ONNX INT8"] == ratio["latency_ms"]["ONNX INT8"] == 0.25
    assert (ratio["file_bytes"]["OpenVINO INT8"], ratio["file_bytes"]["GGML INT8"]) == (0.25, None)
    lines = to_markdown(comparison).splitlines()
    assert "| File, ONNX INT8 | 1000 B (FP32) | 250 B | 25.0 % |" in lines
    assert "| Latency, ONNX INT8 | 10 ms (FP32) | 2.5 ms | 25.0 % |" in lines
    both = Comparison(NetworkFigures(1, 1, None, {"ONNX FP32": 8, "ONNX INT8": 2}), quantized)
    assert json.loads(to_json(both))["ratio"]["file_bytes"]["ONNX INT8"] == 125


def test_comparison_is_written_by_ending(comparison: Comparison, tmp_path: Path) -> None:
    path = write_comparison(comparison, tmp_path / "new" / "report.json")
    assert path.read_text(encoding="utf-8") == to_json(comparison)
    assert write_comparison(comparison, str(tmp_path / "report.md")).read_text(encoding="utf-8") == to_markdown(
        comparison
    )
    with pytest.raises(CompactPruneError, match=r"ends in \.md or \.json, got 'report\.html'"):
        write_comparison(comparison, tmp_path / "report.html")
    with pytest.raises(StorageError, match=r"x\.md: cannot be written .*Choose a directory"):
        write_comparison(comparison, tmp_path / "report.md" / "x.md")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new", "report.md"]


@pytest.mark.parametrize(("ending", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_widths_are_drawn(tmp_path: Path, ending: str, magic: bytes) -> None:
    groups = [Group("conv1", 64, 40), Group("a" * 90 + ".expand", 128, 128)]
    path = plot_widths(groups, tmp_path / f"widths{ending}", title="Net")
    assert path.read_bytes().startswith(magic)


def test_bars_are_as_long_as_the_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    plot_widths([Group("first", 64, 40), Group("a" * 90 + ".last", 128, 128)], tmp_path / "w.png", title="Net")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [64, 128, 40, 128]
    assert [text.get_text() for text in axes.texts] == ["40 of 64", "128"]
    assert axes.get_title(loc="left") == "Net: 168 of 192 channels kept"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "first"
    assert labels[1].startswith("…")
    assert labels[1].endswith(".last")
    # The first group is at the top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_drawing_mistakes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompactPruneError, match=r"ends in \.png, \.svg, \.pdf, got 'w\.jpg'"):
        plot_widths([Group("a", 2, 1)], tmp_path / "w.jpg")
    with pytest.raises(CompactPruneError, match="no channel group to draw"):
        plot_widths([], tmp_path / "w.png")
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(CompactPruneError, match=r"needs matplotlib.*nncf-compactprune\[report\]"):
        plot_widths([Group("a", 2, 1)], tmp_path / "w.png")
