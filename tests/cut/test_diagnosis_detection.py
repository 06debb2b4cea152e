"""Detection transformers choose their queries by value: the diagnosis follows them."""

from __future__ import annotations

import pytest
import torch

from nncf_compactprune import prune
from nncf_compactprune.channels import trace

pytest.importorskip("transformers", reason="transformers is not installed")
try:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
except ImportError as error:  # an installed torchvision that does not fit the installed torch
    pytest.skip(f"transformers offers no RT-DETR here: {error}", allow_module_level=True)


def rt_detr() -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 48, 64], encoder_hidden_dim=32, d_model=32,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
        decoder_layers=2, num_queries=30, num_labels=6, decoder_in_channels=[32, 32, 32], anchor_image_size=None,
    )  # fmt: skip
    return RTDetrForObjectDetection(config).eval()


def test_rt_detr_is_halved():
    model, example = rt_detr(), {"pixel_values": torch.rand(1, 3, 320, 320)}
    dense = trace(model, example).macs
    result = prune(model, example, budget={"macs": 0.5}, round_to=1)
    assert result.self_check.error <= 1e-5
    assert 0.49 < trace(model, example).macs / dense <= 0.5
