"""The search tries the rates that NNCF 2.19.0 tries, at its learning rates.

Recorded from NNCF 2.19.0 with this network, this configuration, and an accuracy that falls with the compression rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nncf_compactprune.integrations.nncf2 import (
    NNCFConfig,
    create_accuracy_aware_training_loop,
    create_compressed_model,
)

CASES = [
    (
        0.4,
        20.0,
        {
            "maximal_absolute_accuracy_degradation": 12.1,
            "initial_training_phase_epochs": 3,
            "patience_epochs": 2,
            "maximal_total_epochs": 30,
        },
        [0.1, 0.4, 0.5, 0.6, 0.7, 0.7, 0.65, 0.65, 0.6, 0.625, 0.625, 0.6125],
        [1.0] * 6 + [0.5] * 3 + [0.25] * 2 + [0.125],
    ),
    (
        0.5,
        40.0,
        {
            "maximal_relative_accuracy_degradation": 15,
            "initial_training_phase_epochs": 3,
            "patience_epochs": 1,
            "maximal_total_epochs": 30,
            "initial_compression_rate_step": 0.15,
            "lr_reduction_factor": 0.3,
            "minimal_compression_rate_step": 0.02,
        },
        [0.1, 0.5, 0.5, 0.35, 0.2, 0.275, 0.35, 0.3125, 0.33125],
        [1.0] * 5 + [0.3] * 2 + [0.09, 0.027],
    ),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3), nn.Conv2d(40, 40, 3)
        self.c, self.d = nn.Conv2d(40, 40, 3), nn.Conv2d(40, 8, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize(("target", "slope", "params", "rates", "factors"), CASES)
def test_the_search_is_nncfs(
    target: float, slope: float, params: dict[str, Any], rates: list[float], factors: list[float], tmp_path: Path
) -> None:
    pruning = {"schedule": "exponential", "pruning_target": target, "pruning_steps": 2, "all_weights": True}
    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, 3, 16, 16]},
            "accuracy_aware_training": {"mode": "adaptive_compression_level", "params": params},
            "compression": {"algorithm": "filter_pruning", "pruning_init": 0.1, "params": pruning},
        }
    )
    torch.manual_seed(0)
    ctrl, model = create_compressed_model(Net(), config, dump_graphs=False)
    tried: list[tuple[float, float]] = []

    def train_epoch(ctrl: Any, model: Any, epoch: int, optimizer: Any, lr_scheduler: Any) -> float:
        tried.append((ctrl.compression_rate, optimizer.param_groups[0]["lr"]))
        return 0.0

    loop = create_accuracy_aware_training_loop(config, ctrl, 90.0, verbose=False)
    loop.run(
        model,
        train_epoch,
        lambda model, epoch: 90.0 - slope * ctrl.compression_rate,
        lambda: (torch.optim.SGD(model.parameters(), lr=0.01), None),
        log_dir=tmp_path,
    )
    assert [rate for rate, _ in tried] == pytest.approx(rates)
    assert [lr / 0.01 for _, lr in tried] == pytest.approx(factors)
    # NNCF 2.19 leaves the controller at the last rate tried; here it is the largest that holds.
    allowed = loop.runner.minimal_tolerable_accuracy
    assert ctrl.compression_rate == pytest.approx(max(r for r in rates[1:] if 90.0 - slope * r >= allowed))
