"""What optimum-intel does with our folders. Its environment has an older transformers, which reads our folders, too.

Skipped where optimum-intel is not installed; ``make test-optimum`` builds the environment that has it.
"""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.places import ROOT
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.integrations.pretrained import load_pruned_hf, save_pruned_hf

intel = pytest.importorskip("optimum.intel", reason="optimum-intel has its own environment: make test-optimum")
hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

PIXELS = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = {"input_ids": torch.randint(3, 100, (1, 12)), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}


def image(size: int = 64) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, size, size) * 2 - 1}


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=64, patch_size=16, num_labels=5, **SMALL))  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=100, num_labels=3, **SMALL))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Any, Any, str]] = {
    "ResNet": (resnet, image, "OVModelForImageClassification"),
    "ViT": (vit, image, "OVModelForImageClassification"),
    "BERT": (bert, lambda: TOKENS, "OVModelForSequenceClassification"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_network_serves_in_optimum(name: str, tmp_path: Path) -> None:
    build, example, served_by = CASES[name]
    torch.manual_seed(0)
    model, x = build().eval(), example()
    before = sum(p.numel() for p in model.parameters())
    prune(model, x, budget={"macs": 0.75})
    assert sum(p.numel() for p in model.parameters()) < before
    options = ExportOptions(pixels=PIXELS) if "pixel_values" in x else ExportOptions()
    export_to_layout(model, x, tmp_path, "optimum", options=options)
    served = getattr(intel, served_by).from_pretrained(tmp_path, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    assert served.config.num_labels == model.config.num_labels
    expected = model(**x).logits.detach().numpy()
    np.testing.assert_allclose(served(**x).logits.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_a_pipeline_takes_the_folder(tmp_path: Path) -> None:
    from PIL import Image

    model, x = resnet().eval(), image()
    prune(model, x, budget={"macs": 0.7})
    export_to_layout(model, x, tmp_path, "optimum", options=ExportOptions(pixels=PIXELS))
    served = intel.OVModelForImageClassification.from_pretrained(tmp_path)
    classify = hf.pipeline(
        "image-classification", model=served, image_processor=hf.AutoImageProcessor.from_pretrained(tmp_path)
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8))
    assert {found["label"] for found in classify(picture)} == set(model.config.id2label.values())


SAVE = """
    config = transformers.ViTConfig(image_size=64, patch_size=16, num_labels=5, **options)
    model = transformers.ViTForImageClassification(config).eval()
    prune(model, x, budget={"macs": 0.7})
    assert any("num_attention_heads" in values for values in plan_of(model).attributes.values())
    save_pruned_hf(model, saved)
"""
LOAD = """
    model = load_pruned_hf(saved)
"""


def elsewhere(code: str, folder: Path) -> torch.Tensor:
    """Scores of the ``model`` that code leaves in the environment of another transformers."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "examples" / "benchmarks")!r})
from timm_import import let_torchvision_import
let_torchvision_import()
import torch, transformers
from nncf_compactprune import plan_of, prune
from nncf_compactprune.integrations.pretrained import load_pruned_hf, save_pruned_hf
torch.manual_seed(0)
saved, options = {str(folder / "saved")!r}, {SMALL!r}
x = torch.load({str(folder / "x.pt")!r})
{textwrap.dedent(code)}
torch.save(model(**x).logits, {str(folder / "logits.pt")!r})
print(transformers.__version__)
"""
    command = [os.environ["COMPACTPRUNE_PYTHON"], "-W", "ignore", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] != hf.__version__
    return torch.load(folder / "logits.pt")  # type: ignore[no-any-return]


@pytest.mark.skipif("COMPACTPRUNE_PYTHON" not in os.environ, reason="COMPACTPRUNE_PYTHON names no other environment")
@pytest.mark.parametrize("saved_here", [False, True])
def test_a_folder_loads_under_another_version_of_transformers(saved_here: bool, tmp_path: Path) -> None:
    x = image()
    torch.save(x, tmp_path / "x.pt")
    if saved_here:
        model = vit().eval()
        prune(model, x, budget={"macs": 0.7})
        save_pruned_hf(model, tmp_path / "saved")
        there = elsewhere(LOAD, tmp_path)
    else:
        there = elsewhere(SAVE, tmp_path)
        model = load_pruned_hf(tmp_path / "saved")
    torch.testing.assert_close(model(**x).logits, there, rtol=1e-4, atol=1e-5)
