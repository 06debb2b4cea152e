"""What optimum-intel does with our folders. Its environment has an older transformers, which reads our folders, too.

Skipped where optimum-intel is not installed; ``make test-optimum`` builds the environment that has it.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import safetensors.torch
import torch
from support.places import ROOT
from torch import nn
from typer.testing import CliRunner

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.cli import app
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.host import optimum
from nncf_compactprune.integrations.layouts import export_to_layout
from nncf_compactprune.integrations.pretrained import load_pruned_hf, save_pruned_hf
from nncf_compactprune.run.pipeline import run

intel = pytest.importorskip("optimum.intel", reason="optimum-intel has its own environment: make test-optimum")
hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

PIXELS = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FLAT = {**SMALL, "num_hidden_layers": 1}
SOUND = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
WORDS = {"input_ids": torch.randint(3, 100, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def image(size: int = 64) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, size, size) * 2 - 1}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 1000)}


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=64, patch_size=16, num_labels=5, **SMALL))  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    return hf.ResNetForImageClassification(config)  # type: ignore[no-any-return]


def bert(task: str, labels: int = 3) -> nn.Module:
    return getattr(hf, f"Bert{task}")(hf.BertConfig(vocab_size=100, num_labels=labels, **FLAT))  # type: ignore[no-any-return]


def clip() -> nn.Module:
    words = {"vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99, **FLAT}
    config = {"text_config": words, "vision_config": {"image_size": 64, "patch_size": 16, **FLAT}, "projection_dim": 16}
    return hf.CLIPModel(hf.CLIPConfig(**config))  # type: ignore[no-any-return]


def segformer() -> nn.Module:
    config = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    config |= {"hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(decoder_hidden_size=32, num_labels=5, **config))  # type: ignore[no-any-return]


def yolos() -> nn.Module:
    config = hf.YolosConfig(image_size=[64, 64], patch_size=16, num_detection_tokens=5, num_labels=3, **FLAT)
    return hf.YolosForObjectDetection(config)  # type: ignore[no-any-return]


def wav2vec2(task: str) -> nn.Module:
    return getattr(hf, f"Wav2Vec2For{task}")(hf.Wav2Vec2Config(vocab_size=12, num_labels=4, **FLAT, **SOUND))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Any, Any, str]] = {
    "ResNet": (resnet, image, "OVModelForImageClassification"),
    "ViT": (vit, image, "OVModelForImageClassification"),
    "ViT, features": (
        lambda: hf.ViTModel(hf.ViTConfig(image_size=64, patch_size=16, **{**FLAT, "intermediate_size": 128})),
        image,
        "OVModelForCustomTasks",
    ),
    "BERT, classes": (partial(bert, "ForSequenceClassification"), lambda: WORDS, "OVModelForSequenceClassification"),
    "BERT, words": (partial(bert, "ForMaskedLM"), lambda: WORDS, "OVModelForMaskedLM"),
    "BERT, tokens": (partial(bert, "ForTokenClassification"), lambda: WORDS, "OVModelForTokenClassification"),
    "BERT, answers": (partial(bert, "ForQuestionAnswering", 2), lambda: WORDS, "OVModelForQuestionAnswering"),
    "BERT, features": (partial(bert, "Model"), lambda: WORDS, "OVModelForFeatureExtraction"),
    "Wav2Vec2, classes": (partial(wav2vec2, "SequenceClassification"), sound, "OVModelForAudioClassification"),
    "Wav2Vec2, letters": (partial(wav2vec2, "CTC"), sound, "OVModelForCTC"),
    "CLIP": (
        clip,
        lambda: {**image(), **{k: v[:1] for k, v in WORDS.items()}},
        "OVModelForZeroShotImageClassification",
    ),
    "SegFormer": (segformer, image, "OVModelForCustomTasks"),
    "YOLOS": (yolos, image, "OVModelForCustomTasks"),
}
# One of a kind; the others are run by `make test-all`.
QUICK = ("ResNet", "BERT, answers", "SegFormer", "GPT-2", "T5")


def each(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in cases]


def pruned(build: Any, x: Any) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    before = sum(p.numel() for p in model.parameters())
    prune(model, x, budget={"macs": 0.7}, allocation="global")
    assert sum(p.numel() for p in model.parameters()) < before
    return model


def served(kind: str, folder: Path) -> Any:
    return getattr(intel, kind).from_pretrained(folder, ov_config=EXACT)


@pytest.mark.parametrize("name", each(CASES))
def test_a_pruned_network_serves_in_optimum(name: str, tmp_path: Path) -> None:
    build, example, served_by = CASES[name]
    x = example()
    model = pruned(build, x)
    options = ExportOptions(pixels=PIXELS) if "pixel_values" in x else ExportOptions()
    export_to_layout(model, x, tmp_path, "optimum", options=options)
    loaded = served(served_by, tmp_path)
    assert loaded.config.num_labels == model.config.num_labels
    larger = {key: torch.cat([value, value.roll(1, -1)]) for key, value in x.items()}
    expected, found = model(**larger), loaded(**larger)
    assert found.keys() <= expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            torch.as_tensor(value), expected[key], rtol=0, atol=1e-4 * float(expected[key].abs().max())
        )


NUMBERS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIDES = {
    f"{side}_{what}": value
    for side in ("encoder", "decoder")
    for what, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 64}.items()
}
ANSWER = {"decoder_input_ids": torch.randint(3, 100, (2, 5))}


def gpt2(layers: int = 1) -> nn.Module:
    config = hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=layers, n_head=4, n_positions=64, **NUMBERS)
    return hf.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def uneven_gpt2() -> nn.Module:
    """One layer loses more heads than the other; the config knows one number for both."""
    model = gpt2(2)
    with torch.no_grad():
        for layer in (model.transformer.h[0].attn.c_proj, model.transformer.h[0].attn.c_attn):
            layer.weight.mul_(0.01)
    return model


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=100, num_key_value_heads=2, **FLAT, **NUMBERS))  # type: ignore[no-any-return]


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=100, d_model=32, max_position_embeddings=64, forced_eos_token_id=None, **SIDES, **NUMBERS
    )
    return hf.BartForConditionalGeneration(config)  # type: ignore[no-any-return]


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(
        vocab_size=100, d_model=32, suppress_tokens=None, begin_suppress_tokens=None, **sizes, **SIDES, **NUMBERS
    )
    return hf.WhisperForConditionalGeneration(config)  # type: ignore[no-any-return]


GENERATIVE: dict[str, tuple[Any, dict[str, torch.Tensor], str]] = {
    "GPT-2": (uneven_gpt2, WORDS, "OVModelForCausalLM"),
    "Llama": (llama, WORDS, "OVModelForCausalLM"),
    "T5": (t5, {**WORDS, **ANSWER}, "OVModelForSeq2SeqLM"),
    "BART": (bart, {**WORDS, **ANSWER}, "OVModelForSeq2SeqLM"),
    "Whisper": (whisper, {"input_features": torch.randn(2, 16, 100), **ANSWER}, "OVModelForSpeechSeq2Seq"),
}


@pytest.mark.parametrize("name", each(GENERATIVE))
def test_a_pruned_network_generates_in_optimum(name: str, tmp_path: Path) -> None:
    build, x, served_by = GENERATIVE[name]
    model = pruned(build, x)
    if name == "GPT-2":
        assert len({block.attn.num_heads for block in model.transformer.h}) == 2
    config = copy.deepcopy(model.config)
    files = export_to_layout(model, x, tmp_path, "optimum")
    assert {file.path for file in files} == set(tmp_path.glob("*.xml"))
    assert all(file.verification.max_rel_error < 1e-5 and file.bytes > 1000 for file in files)
    assert vars(model.config) == vars(config)
    loaded = served(served_by, tmp_path)
    given = {key: value for key, value in x.items() if key not in ANSWER}
    for beams in (1, 3):  # the cache is put in another order between steps
        how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(loaded.generate(**given, **how), model.generate(**given, **how))


def quantized(build: Any, x: Any) -> Any:
    torch.manual_seed(0)
    entries = [
        {"algorithm": "fbnet_pruning", "budget": {"macs": 0.75}, "params": {"schedule": "one_shot"}},
        {"algorithm": "quantization", "params": {"model_type": "transformer"}},
    ]
    return create_compressed_model(build().eval(), {"compression": entries}, [x], example_inputs=x)[0].strip()


@pytest.mark.slow
def test_an_int8_decoder_generates_in_optimum(tmp_path: Path) -> None:
    model = quantized(gpt2, WORDS)
    (file,) = export_to_layout(model, WORDS, tmp_path, "optimum")
    assert file.label == "OpenVINO INT8"
    constants = {str(node.get_output_element_type(0)) for node in openvino.Core().read_model(file.path).get_ops()}
    assert any("int8" in kind for kind in constants)
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(served("OVModelForCausalLM", tmp_path).generate(**WORDS, **how), model.generate(**WORDS, **how))


@pytest.mark.slow
def test_an_int8_network_serves_in_optimum(tmp_path: Path) -> None:
    x = {"pixel_values": torch.rand(2, 3, 64, 64)}
    model = quantized(segformer, x)
    (file,) = export_to_layout(model, x, tmp_path, "optimum")
    assert file.label == "OpenVINO INT8"
    expected, found = model(**x).logits, served("OVModelForCustomTasks", tmp_path)(**x)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_what_generates_and_cannot_be_held_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"holds no quantized T5ForCond.*OVModelForSeq2SeqLM.from_pretrained"):
        export_to_layout(quantized(t5, GENERATIVE["T5"][1]), GENERATIVE["T5"][1], tmp_path, "optimum")
    with pytest.raises(ExportError, match="Leave batch, dynamic_size and embed_preprocessing out"):
        export_to_layout(gpt2(), WORDS, tmp_path, "optimum", options=ExportOptions(batch=1))
    with pytest.raises(ExportError, match="Leave input_names and output_names out"):
        export_to_layout(gpt2(), WORDS, tmp_path, "optimum", output_names=["words"])
    with pytest.raises(ExportError, match="does not export BertLMHeadModel: bert doesn't support task text-generation"):
        export_to_layout(bert("LMHeadModel"), WORDS, tmp_path, "optimum")
    with pytest.raises(ExportError, match=r"does not export MarianMTModel: it takes transformers 4\.57 to 4\.57\.6"):
        export_to_layout(
            hf.MarianMTModel(hf.MarianConfig(vocab_size=60, d_model=16, pad_token_id=0, **SIDES)),
            {},
            tmp_path,
            "optimum",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = gpt2().eval(), optimum.export_parts

    def of_other_weights(part: nn.Module, *args: Any, **kwargs: Any) -> None:
        other = copy.deepcopy(part)
        other.transformer.ln_f.weight.data[0] = 1.2
        write(other, *args, **kwargs)

    monkeypatch.setattr(optimum, "export_parts", of_other_weights)
    with pytest.raises(ExportError, match=r"optimum-intel differs from torch by .*output 'logits'"):
        export_to_layout(model, WORDS, tmp_path, "optimum")
    assert list(tmp_path.iterdir()) == []


def tokenizer() -> Any:
    words = tokenizers.models.WordLevel({f"w{at}": at for at in range(99)} | {"[UNK]": 99}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="w0")


def test_tokenizers_come_along_and_a_pipeline_takes_the_folder(tmp_path: Path) -> None:
    save_pruned_hf(pruned(llama, WORDS), tmp_path / "pruned")
    tokenizer().save_pretrained(tmp_path / "pruned")
    model = load_pruned_hf(tmp_path / "pruned")
    export_to_layout(model, WORDS, tmp_path / "served", "optimum")
    assert "compactprune" not in json.loads((tmp_path / "served" / "config.json").read_text())
    loaded = served("OVModelForCausalLM", tmp_path / "served")
    write = hf.pipeline("text-generation", loaded, tokenizer=hf.AutoTokenizer.from_pretrained(tmp_path / "served"))
    (found,) = write("w5 w6 w7", max_new_tokens=4, do_sample=False)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0]
    assert found["generated_text"] == tokenizer().decode(expected, skip_special_tokens=True)


@pytest.mark.slow
def test_the_command_line_and_a_config_write_the_folder(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch, transformers\n"
        "def gpt2():\n"
        "    sizes = {'vocab_size': 100, 'n_embd': 32, 'n_layer': 1, 'n_head': 4, 'n_positions': 64}\n"
        f"    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **{NUMBERS}))\n"
        "    return model.eval(), {'input_ids': torch.arange(24).reshape(2, 12)}\n"
    )
    config = {
        "model": f"python:{tmp_path / 'net.py'}:gpt2",
        "weights": str(tmp_path / "weights.safetensors"),
        "output_dir": str(tmp_path / "run"),
        "input_info": {"sample_size": [2, 12]},
        "epochs": 0,
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.8}, "params": {"schedule": "one_shot"}},
        "export": {"formats": ["openvino"], "layout": "optimum"},
    }
    weights = {key: value.clone() for key, value in gpt2().state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(tmp_path / "config.json")
    command = ["export", str(tmp_path / "run"), "--layout", "optimum", "--output", str(tmp_path / "again")]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    words = {"input_ids": torch.tensor([[5, 6, 7]])}
    first, again = (
        served("OVModelForCausalLM", folder).generate(**words, max_new_tokens=4, do_sample=False)
        for folder in (tmp_path / "run" / "optimum", tmp_path / "again")
    )
    assert torch.equal(first, again)


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
