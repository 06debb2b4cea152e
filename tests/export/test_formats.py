"""A third party's format goes the way of the built-in ones."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import ROOT

from nncf_compactprune import ExportError, PluginError, Plugins, export_model, hookimpl
from nncf_compactprune.export import ExportFormat, measure_latency, verify_export


@pytest.fixture(name="example")
def _example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(ROOT / "examples" / "export_format.py"))


def test_a_third_partys_format_is_written_verified_and_timed(example: dict[str, Any], tmp_path: Path) -> None:
    plugins, net, images, file = (example[name] for name in ("plugins", "net", "images", "file"))
    assert (file.format, file.precision, file.label) == ("ort", "fp32", "ORT FP32")
    assert file.verification.batch_sizes == (2, 1)
    assert verify_export(net, file.path, images[:1], plugins=plugins).max_rel_error < 1e-5
    assert measure_latency({"a": file.path}, images, runs=2, plugins=plugins)["a"].runs == 2
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(ExportError, match=r"net\.ort: ONNX Runtime differs from torch"):
        verify_export(net, file.path, images, plugins=plugins)
    with pytest.raises(ExportError, match=r"\.xml or \.ort or .*, got 'net\.orts'.* Did you mean '\.ort'"):
        export_model(net, images, tmp_path / "net.orts", plugins=plugins)
    with pytest.raises(ExportError, match="ORT has fp32, got 'fp16'"):
        export_model(net, images, tmp_path, ["onnx", "ort"], ["fp16"], plugins=plugins)
    written = export_model(net, images, tmp_path, ["onnx", "ort"], ["fp32", "fp16"], plugins=plugins)
    assert [one.path.name for one in written] == ["model.onnx", "model_fp16.onnx", "model.ort"]
    assert not {".pt2", ".pte"} & {
        one.path.suffix for one in export_model(net, images, tmp_path / "all", plugins=plugins)
    }


def test_a_format_without_a_file_ending_is_refused() -> None:
    class Nameless(ExportFormat):
        name, title, runtime, suffix = "x", "X", "X", "x"

    class Offer:
        @hookimpl
        def compactprune_export_formats(self) -> list[type[ExportFormat]]:
            return [Nameless]

    with pytest.raises(PluginError, match=r"suffix \('\.ending'\)"):
        Plugins().register(Offer(), "offer")
