"""Folders for optimum-intel, where it is not installed: tests/integrations/test_optimum.py loads them with it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.integrations.pretrained import load_pruned_hf, save_pruned_hf
from nncf_compactprune.run.models import resolve_model, save_weights
from nncf_compactprune.run.pipeline import run

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(find_spec("optimum") is not None, reason="optimum-intel is here")

WORDS = {"input_ids": torch.arange(24).reshape(2, 12)}
IMAGE = {"pixel_values": torch.rand(1, 3, 32, 32)}
GPT2 = """
import torch, transformers

def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.arange(24).reshape(2, 12)}
"""


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))  # type: ignore[no-any-return]


def test_what_generates_needs_optimum_intel_and_is_refused_with_the_way(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"GPT2LMHeadModel generates.*save_pruned_hf.*pip install optimum-intel"):
        export_to_layout(gpt2(), WORDS, tmp_path, "optimum")
    vit = hf.ViTConfig(image_size=32, patch_size=16, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    both = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2().config)
    with pytest.raises(ExportError, match="networks that generate text from text or speech, got VisionEncoderDecoder"):
        export_to_layout(hf.VisionEncoderDecoderModel(both), IMAGE, tmp_path, "optimum")
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_that_layout_ends_before_its_work(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(GPT2)
    name = f"python:{tmp_path / 'net.py'}:gpt2"
    config = {
        "model": name,
        "weights": str(tmp_path / "w.safetensors"),
        "output_dir": str(tmp_path / "out"),
        "input_info": {"sample_size": [2, 12]},
        "epochs": 0,
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.8}, "params": {"schedule": "one_shot"}},
        "export": {"layout": "optimum"},
    }
    resolved = resolve_model(name, sample_size=[2, 12])
    assert torch.equal(resolved.example_inputs["input_ids"], WORDS["input_ids"])  # words, not noise
    save_weights(resolved.model, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="only optimum-intel's own exporter"):
        run(tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


def test_processors_come_along_unless_the_pixels_are_told(tmp_path: Path) -> None:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16], depths=[1], layer_type="basic", num_labels=3)
    model = hf.ResNetForImageClassification(config).eval()
    prune(model, IMAGE, budget={"macs": 0.7})
    save_pruned_hf(model, tmp_path / "pruned")
    said = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "do_normalize": True}
    (tmp_path / "pruned" / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "pruned" / "tokenizer.json").write_text("{}")
    again = load_pruned_hf(tmp_path / "pruned")

    export_to_layout(again, IMAGE, tmp_path / "served", "optimum")
    assert json.loads((tmp_path / "served" / "preprocessor_config.json").read_text()) == said
    written = {path.name for path in (tmp_path / "served").iterdir()}
    files = {"openvino_model.xml", "openvino_model.bin", "config.json", "preprocessor_config.json", "tokenizer.json"}
    assert written == files
    described = json.loads((tmp_path / "served" / "config.json").read_text())
    assert not {"_name_or_path", "compactprune"} & described.keys()

    export_to_layout(again, IMAGE, tmp_path / "told", "optimum", options=ExportOptions(pixels=Pixels((0.5,), (0.5,))))
    told = json.loads((tmp_path / "told" / "preprocessor_config.json").read_text())
    assert told["image_mean"] == [0.5, 0.5, 0.5]
