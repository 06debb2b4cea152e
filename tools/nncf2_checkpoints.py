"""Writes the checkpoints of NNCF 2.19 that tests load: ``.venv-nncf219/bin/python tools/nncf2_checkpoints.py``.

Each is what a training script of NNCF 2.x saves, ``state_dict`` and ``compression_state``, with the configuration, an
input, and what NNCF 2.19's network gives for it, without its quantizers.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("NNCF_TORCH_LEGACY_TRACING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from nncf import NNCFConfig
from nncf.torch import create_compressed_model, register_default_init_args
from support.networks import IMAGE, images, labelled_batches, model32
from torch.utils.data import DataLoader

from nncf_compactprune.host.nncf_quantization import not_compiled

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "integrations" / "nncf2" / "checkpoints"


def filters(**params: Any) -> dict[str, Any]:
    """The entry of filter pruning: half of the filters in two epochs."""
    usual = {"pruning_target": 0.5, "pruning_steps": 2, "prune_first_conv": True, "prune_downsample_convs": True}
    return {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": {**usual, **params}}


MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.1, 0.5]},
}
LEARNED = {
    "algorithm": "rb_sparsity",
    "compression_lr_multiplier": 1.1e4,
    "sparsity_init": 0.3,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2, "sparsity_freeze_epoch": 3},
}
QUANTIZATION = {"algorithm": "quantization", "initializer": {"range": {"num_init_samples": 8}}}
#: by file: network, entries, epochs
CASES: dict[str, tuple[str, list[dict[str, Any]], int]] = {
    "filters": ("residual", [filters(all_weights=True, filter_importance="geometric_median")], 4),
    "filters_on_the_way": ("squeeze_excite", [filters(all_weights=True, pruning_steps=4)], 2),
    "filters_at_once": ("transposed", [filters(schedule="baseline", pruning_target=0.4, all_weights=True)], 2),
    "flops": ("dense_concat", [filters(pruning_target=None, pruning_flops_target=0.4, all_weights=True)], 4),
    "shares": ("residual", [filters()], 4),
    "shares_by_default": ("residual", [filters(prune_first_conv=None, prune_downsample_convs=None)], 4),
    "magnitude": ("plain", [MAGNITUDE], 3),
    "learned": ("squeeze_excite", [LEARNED], 2),
    "three": ("depthwise", [MAGNITUDE, filters(all_weights=True), QUANTIZATION], 4),
    "quantization": ("squeeze_excite", [QUANTIZATION], 1),
}


def checkpoint(network: str, entries: list[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """Trains for some epochs of three steps.

    :param network: of ``tests/support/networks.py``.
    :param entries: of the configuration.
    :param epochs: how many.
    """
    for entry in entries:
        params = entry.get("params", {})
        entry["params"] = {key: value for key, value in params.items() if value is not None}
    document = {"input_info": {"sample_size": list(IMAGE)}, "compression": entries}
    loader = DataLoader([(torch.randn(IMAGE[1:]), 0) for _ in range(16)], batch_size=4)
    config = register_default_init_args(NNCFConfig.from_dict(document), loader)
    torch.manual_seed(0)
    ctrl, model = create_compressed_model(model32(network), config, dump_graphs=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for batch, _ in labelled_batches():
            ctrl.scheduler.step()
            loss = (model(batch) - 1).square().mean() + ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    state = copy.deepcopy(model.state_dict())
    for child in getattr(ctrl, "child_ctrls", [ctrl]):
        if child.name == "quantization":
            child.disable_weight_quantization()
            child.disable_activation_quantization()
    with torch.no_grad():
        output = model(images(torch.float32))
    return {
        "network": network,
        "config": document,
        "state_dict": state,
        "compression_state": ctrl.get_compression_state(),
        "output": output.clone(),
    }


def main() -> None:
    """Writes all of them."""
    warnings.simplefilter("ignore")
    FOLDER.mkdir(exist_ok=True)
    for name, case in CASES.items():
        with not_compiled():
            torch.save(checkpoint(*case), FOLDER / f"{name}.pth")


if __name__ == "__main__":
    main()
