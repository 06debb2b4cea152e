"""Small quantized networks, and what NNCF's quantizers measured."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nncf_compactprune import create_compressed_model
from support.networks import labelled_batches

QUANTIZATION: dict[str, Any] = {"algorithm": "quantization", "params": {"start_epoch": None}}


def quantized(model: nn.Module, *entries: dict[str, Any]) -> nn.Module:
    """A network of this folder behind the entries of a config, stripped."""
    config = {"input_info": {"sample_size": [1, 3, 12, 12]}, "compression": list(entries)}
    ctrl, _ = create_compressed_model(model, config, labelled_batches())
    return ctrl.strip().eval()


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the ranges of all quantizers, by name; there are some."""
    found = {k: v.clone() for k, v in model.state_dict().items() if k.endswith((".scale", ".input_range"))}
    assert found
    return found
