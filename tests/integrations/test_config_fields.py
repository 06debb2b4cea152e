"""A Hugging Face config is rewritten where its fields, alone or together, say what the pruned network is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.hugging_face import resnet

from nncf_compactprune import apply_plan
from nncf_compactprune.channels import trace
from nncf_compactprune.integrations.pretrained import save_pruned_hf
from nncf_compactprune.plan import make_plan

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def test_fields_that_only_change_together_are_found(tmp_path: Path) -> None:
    """Where embedding_size and the first of hidden_sizes are equal, there is no shortcut; alone neither may change."""
    model = resnet().eval()
    inputs = {"pixel_values": torch.randn(1, 1, 16, 16)}
    graph = trace(model, inputs)
    apply_plan(model, make_plan(graph, [np.arange(group.size) % 2 == 0 for group in graph.groups], algorithm="half"))
    save_pruned_hf(model, tmp_path)
    assert model.config.hidden_sizes == [8, 16]
    assert model.config.embedding_size == 8
    assert model.config.compactprune["plain"]
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
