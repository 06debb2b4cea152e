"""What files are asked for beyond formats: each option seen by the program that reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from support.networks import Classifier, conv_bn
from torch import Tensor, nn

from nncf_compactprune import export_model, prune
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportOptions, Pixels, measure_latency
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.storage.plan_file import plan_digest

X = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PIXELS = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def network() -> nn.Module:
    return Classifier(nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 16)), 16).eval()


@pytest.fixture
def net() -> nn.Module:
    return network()


def test_every_onnx_file_is_valid_and_says_what_it_is(net: nn.Module, tmp_path: Path) -> None:
    plan: PruningPlan = prune(net, X, budget={"macs": 0.5}, round_to=1).plan
    options = ExportOptions(labels=["a", "b"], pixels=PIXELS, opset=20, external_data=True)
    stale = tmp_path / "model_fp16.onnx.data"
    stale.write_text("of an earlier export")
    files = export_model(net, X, tmp_path, options=options)
    assert not stale.exists() or b"earlier" not in stale.read_bytes()
    assert files[0].bytes == sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert {file.label for file in files} == {"ONNX FP32", "ONNX FP16", "OpenVINO FP32", "OpenVINO FP16"}
    digest = plan_digest(plan.to_json().encode())
    for path in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        said = {one.key: one.value for one in model.metadata_props}
        assert (said["plan_sha256"], said["labels"], said["mean"]) == (digest, "a\nb", "0.4 0.5 0.6")
        assert [one.version for one in model.opset_import if not one.domain] == [20]
        assert path.name != "model.onnx" or (tmp_path / "model.onnx.data").is_file()
        session = onnxruntime.InferenceSession(path)
        assert session.get_modelmeta().custom_metadata_map["plan_sha256"] == digest
    for path in tmp_path.glob("*.xml"):
        said = openvino.Core().read_model(path).get_rt_info("compactprune").value
        assert (said["plan_sha256"], said["std"]) == (digest, "0.2 0.25 0.3")


def test_height_and_width_stay_open(net: nn.Module, tmp_path: Path) -> None:
    export_model(net, X, tmp_path, precisions=["fp32"], options=ExportOptions(dynamic_size=True))
    other = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        expected = net(other).numpy()
    (got,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": other.numpy()})
    np.testing.assert_allclose(got, expected, atol=1e-5)
    compiled = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(other.numpy())[0], expected, atol=1e-5)


def test_a_size_that_got_stuck_is_found(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 32 * 32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(1))

    with pytest.raises(ExportError, match=r"could not be run on x \[.*64, 64\]"):
        export_model(Fixed(), X, tmp_path, options=ExportOptions(dynamic_size=True))


def test_a_fixed_batch_runs_in_benchmark_app(net: nn.Module, tmp_path: Path) -> None:
    (file,) = export_model(net, X, tmp_path / "model.xml", options=ExportOptions(batch=2))
    assert list(openvino.Core().read_model(file.path).inputs[0].shape) == [2, 3, 32, 32]
    tool = Path(sys.executable).with_name("benchmark_app")
    ran = subprocess.run(
        [tool, "-m", file.path, "-niter", "2", "-hint", "none", "-nstreams", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "Throughput" in ran.stdout


def test_pixels_as_they_come_go_into_a_file_with_its_preprocessing(net: nn.Module, tmp_path: Path) -> None:
    options = ExportOptions(pixels=PIXELS, embed_preprocessing=True)
    export_model(net, X, tmp_path, ["openvino"], options=options)
    picture = (X * 255).round().to(torch.uint8)
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor(PIXELS.mean).view(shape), torch.tensor(PIXELS.std).view(shape)
    with torch.no_grad():
        expected = net((picture / 255 - mean) / std).numpy()
    for path, tolerance in ((tmp_path / "model.xml", 1e-4), (tmp_path / "model_fp16.xml", 1e-2)):
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        got = compiled(np.ascontiguousarray(picture.permute(0, 2, 3, 1)))[0]
        np.testing.assert_allclose(got, expected, atol=tolerance)
        assert compiled(np.zeros((1, 50, 70, 3), np.uint8))[0].shape == expected.shape
    with pytest.raises(ExportError, match=r"pixels: expected one value or 3"):
        export_model(
            net, X, tmp_path, ["openvino"], options=ExportOptions(pixels=Pixels((1.0, 2.0)), embed_preprocessing=True)
        )


@pytest.mark.parametrize("options", [{"pixels": PIXELS, "embed_preprocessing": True}, {"batch": 3}], ids=str)
def test_files_of_other_inputs_than_the_example_are_timed(options, net: nn.Module, tmp_path: Path) -> None:
    files = export_model(net, X, tmp_path, ["openvino", "onnx"], options=ExportOptions(**options))
    times = measure_latency({file.label: file.path for file in files}, X[:1], runs=3, warmup=1)
    assert len(times) == len(files) == 4
    assert all(latency.median_ms > 0 for latency in times.values())


def test_model_server_finds_its_version(net: nn.Module, tmp_path: Path) -> None:
    (file,) = export_to_layout(net, X, tmp_path, "ovms", name="digits", precision="fp16")
    assert file.path == tmp_path / "digits" / "1" / "model.xml"
    assert file.path.with_suffix(".bin").is_file()
    with pytest.raises(ExportError, match=r"expected optimum or ovms, got 'ovsm'\. Did you mean 'ovms'"):
        export_to_layout(net, X, tmp_path, "ovsm")
    with pytest.raises(ExportError, match=r"models of transformers and timm, got Classifier"):
        export_to_layout(net, X, tmp_path / "other", "optimum")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected 1"),
        ({"opset": 9}, "opset: expected 13"),
        ({"embed_preprocessing": True}, "pixels"),
    ],
)
def test_wrong_options_are_told_at_once(options, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options)
