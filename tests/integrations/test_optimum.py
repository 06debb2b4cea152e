"""The layout ``optimum`` in optimum-intel itself, which wants an older transformers: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.hugging_face import vary
from support.places import ROOT

from nncf_compactprune import prune
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.integrations.layouts import export_to_layout

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PACKAGES = Path(os.environ.get("OPTIMUM_PACKAGES", ROOT / ".venv-optimum"))
BENCHMARKS = ROOT / "examples" / "benchmarks"  # torchvision's CUDA build beside torch's CPU build
READER = """
import json, sys
sys.path.append(sys.argv[3])
from timm_import import let_torchvision_import
let_torchvision_import()
import numpy as np, torch
from PIL import Image
from optimum.intel import OVModelForImageClassification
from transformers import AutoImageProcessor, pipeline
folder, images = sys.argv[1], np.load(sys.argv[2])
model = OVModelForImageClassification.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
logits = model(pixel_values=torch.from_numpy(images)).logits
pipe = pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(folder))
print(json.dumps({"logits": logits.tolist(), "pipeline": pipe(Image.new("RGB", (50, 40), (200, 30, 90)))}))
"""


@pytest.mark.skipif(
    not (PACKAGES / "optimum").is_dir(), reason=f"{PACKAGES} is not there: make .venv-optimum/.installed"
)
def test_a_pruned_model_loads_in_optimum_without_renaming(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = vary(transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=10))).eval()
    images = torch.randn(2, 3, 32, 32)
    prune(model, {"pixel_values": images}, budget={"macs": 0.5})
    labels = [f"label {at}" for at in range(model.config.num_labels)]
    options = ExportOptions(labels=labels, pixels=Pixels((0.5,), (0.25,)))
    export_to_layout(model, {"pixel_values": images}, tmp_path / "exported", "optimum", options=options)
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "openvino_model.xml",
        "openvino_model.bin",
        "config.json",
        "preprocessor_config.json",
    }
    np.save(tmp_path / "images.npy", images.numpy())
    ran = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "exported", tmp_path / "images.npy", BENCHMARKS],
        env={**os.environ, "PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    pixels = torch.tensor([200, 30, 90]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        scores = model(pixel_values=(pixels - 0.5) / 0.25).logits.softmax(1)[0]
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-4)
    best = found["pipeline"][0]
    assert best["label"] == labels[int(scores.argmax())]
    assert best["score"] == pytest.approx(float(scores.max()), abs=1e-3)
