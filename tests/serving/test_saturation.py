"""Whether INT8 sums saturate here is tried, and told where a file is wrong by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.networks import model32
from support.quantizers import QUANTIZATION, quantized

from nncf_compactprune.export import export_model
from nncf_compactprune.serving import open_server, saturation
from nncf_compactprune.serving import verify as verifying
from nncf_compactprune.serving.reference import TorchSide


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_weights_of_seven_bits_saturate_nowhere(suffix: str) -> None:
    assert saturation.largest_sum(suffix, "CPU", 63) == pytest.approx(saturation.MOST, rel=0.02)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_saturated_sums_are_seen(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the largest sum is what pairs of 16 bits leave."""
    model = quantized(model32("residual"), QUANTIZATION)
    server = open_server(export_model(model, torch.randn(1, 3, 12, 12), tmp_path / f"net{suffix}")[0].path)
    for found, answer in ((saturation.MOST / 2, True), (saturation.MOST, False)):
        monkeypatch.setattr(saturation, "largest_sum", lambda *_, found=found: found)
        saturation._saturates.cache_clear()
        assert saturation.saturates(server) == answer
    saturation._saturates.cache_clear()


@pytest.mark.parametrize("saturated", [True, False])
def test_a_loss_by_it_is_told_with_the_remedy(saturated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = quantized(model32("residual"), QUANTIZATION), torch.randn(20, 3, 12, 12)
    (file,) = export_model(model, images[:1], tmp_path / "net.onnx")
    with torch.no_grad():
        labels = model(images).argmax(1)
    side = TorchSide(model, images[:1], images, labels, batch_size=8)
    monkeypatch.setattr(verifying, "saturates", lambda server: saturated)
    assert verifying.verify_served(file.path, side, max_drop=1).passed
    check = verifying.verify_served(file.path, side, tolerance=0)
    assert any('"overflow_fix": "enable"' in problem for problem in check.problems) == saturated, check
