"""Layers are told by their torch modules, where OpenVINO's own names are numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from support.networks import labelled_batches, model32
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.export import export_model
from nncf_compactprune.serving import open_server
from nncf_compactprune.serving.layers import profile


def test_a_layer_whose_norm_is_folded_is_named_by_its_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, batches = model32("residual").eval(), labelled_batches()
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    example = batches[0][0][:2]
    export_model(dense, example, tmp_path, ["openvino"], ["fp32"])
    entry = {"algorithm": "quantization", "params": {"start_epoch": None}}
    config = {"input_info": {"sample_size": list(example.shape)}, "compression": entry}
    controller, model = create_compressed_model(dense, config, batches)
    model = controller.strip()
    export_model(model, example, tmp_path, ["openvino"])
    path = tmp_path / "model_int8.xml"
    assert any(one.operation.startswith("Multiply_") for one in open_server(path).weights())
    found = profile(tmp_path / "model.xml", path, sample_size=example.shape[1:], runs=1)
    modules = {name for name, _ in model.named_modules()}
    assert {one.name for one in found.layers} <= modules
    assert len({one.name for one in found.layers}) == len(found.layers)
