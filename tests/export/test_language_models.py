"""Language models of transformers become files: caches are off, and experts side by side, while these are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nncf_compactprune import export_model

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip


def language_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    options = SIZES | ({"num_local_experts": 3, "num_experts_per_tok": 2} if kind == "Mixtral" else {})
    config = getattr(transformers, f"{kind}Config")(**options)
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


TOKENS = {"input_ids": torch.tensor([[3, 7, 9, 11, 4, 2]]), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Mixtral", marks=pytest.mark.slow)])
def test_a_language_model_becomes_files_and_keeps_its_settings(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    before = model.config.to_dict()
    files = export_model(model, TOKENS, tmp_path, formats=["onnx", "openvino"], dynamic_batch=False)
    assert {file.format for file in files} == {"onnx", "openvino"}
    assert model.config.to_dict() == before
    assert model(**TOKENS).past_key_values is not None


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_what_openvino_cannot_trace_comes_as_an_exported_program(tmp_path: Path, dynamic_batch: bool) -> None:
    """Without an attention mask transformers looks for packed sequences, by an operation that OpenVINO lacks."""
    tokens = {"input_ids": TOKENS["input_ids"]}
    (file,) = export_model(language_model("Llama"), tokens, tmp_path / "model.xml", dynamic_batch=dynamic_batch)
    assert file.verification.batch_sizes == ((1, 3) if dynamic_batch else (1,))
