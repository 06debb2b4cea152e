"""Norms that a re-fit meets: channels that are constant on its inputs, and statistics that are plain buffers."""

from __future__ import annotations

import copy

import torch
from support.data_free import randn
from torch import Tensor, nn

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.algorithms.data_free.reconstruction import Reconstruction, as_they_are
from nncf_compactprune.algorithms.data_free.sources import LayerInputs


class Behind(nn.Module):
    """A BatchNorm behind a ReLU, as re-parameterisable networks have it in their identity branches."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.norm(self.first(x).relu())).relu().mean((2, 3)))


class Frozen(nn.Module):
    """As torchvision's: weights and statistics are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.3), ("running_var", 0.8)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_channels_that_are_constant_on_the_inputs_keep_their_statistics() -> None:
    torch.manual_seed(0)
    dense = Behind(nn.BatchNorm2d(8))
    for _ in range(20):
        dense.train()(randn(16, 3, 8, 8))
    dense.eval()
    with torch.no_grad():
        dense.first.bias[:4] = -9  # dead on these inputs, and on few others
    model = copy.deepcopy(dense)
    Reconstruction(dense, model, LayerInputs(randn(8, 3, 8, 8)), {}, as_they_are).run()
    torch.testing.assert_close(model.norm.running_var, dense.norm.running_var, rtol=0.02, atol=0)
    with torch.no_grad():
        x = 9 * randn(8, 3, 8, 8)
        error = (model(x) - dense(x)).norm() / dense(x).norm()
    assert float(error) < 0.1


def test_frozen_norms_are_passed_by() -> None:
    torch.manual_seed(0)
    model, images = Behind(Frozen(8)).eval(), randn(64, 3, 8, 8)
    loader = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(16)]
    refit = {"refit": {}, "batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
    result = prune(model, images[:2], budget={"macs": 0.6}, round_to=1, train_loader=loader, initializer=refit)
    assert result.self_check.error < 1e-5
    assert model.norm.weight.shape == (model.first.out_channels,)
    entry = {"algorithm": "data_free_sparsity", "params": {"sparsity": 0.3}, "generation": {"source": "dataset"}}
    document = {"input_info": {"sample_size": [2, 3, 8, 8]}, "compression": entry}
    ctrl, _ = create_compressed_model(Behind(Frozen(8)).eval(), document, loader)
    assert float((ctrl.strip().last.weight == 0).float().mean()) > 0.1
