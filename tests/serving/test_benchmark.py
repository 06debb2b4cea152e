"""Measurements are complete and say what they are worth. No test asserts on time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.networks import images, model32

from nncf_compactprune.commands.benchmark import as_document, timings_table
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import export_model
from nncf_compactprune.serving import Serving
from nncf_compactprune.serving.benchmark import Benchmark, benchmark


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    example = images()[:1].float()
    return [one.path for one in export_model(model32("residual"), example, folder, precisions=["fp32"])]


@pytest.fixture(scope="module")
def measured(files: list[Path]) -> Benchmark:
    return benchmark(files, batch=2, seconds=0.2, serving=Serving(threads=1, streams=1))


def test_both_runtimes_are_measured_with_their_spread(measured: Benchmark, files: list[Path]) -> None:
    assert [one.path for one in measured.timings] == files
    assert {one.runtime.split()[0] for one in measured.timings} == {"ONNX", "OpenVINO"}
    for one in measured.timings:
        assert 0 < one.p10_ms <= one.median_ms <= one.p90_ms <= one.p99_ms
        assert one.throughput_spread[0] <= one.samples_per_second <= one.throughput_spread[1]
        assert one.memory_bytes is not None
        assert one.memory_bytes > 0
        assert one.requests >= 5
    assert measured.timings[0].ratio == 1
    beside = files[1].with_suffix(".bin").stat().st_size
    assert measured.timings[1].bytes == files[1].stat().st_size + beside


def test_machine_that_is_not_steady_is_told(measured: Benchmark) -> None:
    assert "too noisy" in replace(measured, steadiness=0.8).verdict()
    assert "steady" in replace(measured, steadiness=0.01).verdict()
    first, second = measured.timings
    close = replace(second, ratio=1.01, ratio_spread=(0.9, 1.2))
    assert "cannot be told apart: 1.01" in replace(measured, timings=(first, close)).verdict()
    apart = replace(second, ratio=0.5, ratio_spread=(0.4, 0.6))
    assert "told apart" not in replace(measured, timings=(first, apart)).verdict()


def test_measurement_is_a_table_and_json(measured: Benchmark) -> None:
    assert timings_table(measured).row_count == 2
    document = json.loads(json.dumps(as_document(measured)))
    assert [one["batch"] for one in document["files"]] == [2, 2]
    assert document["serving"]["threads"] == 1


def test_wrong_measurements_are_refused(files: list[Path]) -> None:
    with pytest.raises(ExportError, match="a batch of at least 1, got 2 files, seconds=1 and batch=0"):
        benchmark(files, batch=0, seconds=1)
    with pytest.raises(ExportError, match="--sample-size is 5,8,8, expected 3,12,12, as in the file"):
        benchmark(files, sample_size=(5, 8, 8), seconds=0.1, memory=False)
