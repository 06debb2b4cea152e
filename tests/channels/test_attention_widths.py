"""The width of queries and keys may go where the code keeps the scale of the scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.diagnosis import analyse

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class PixelAttention(nn.Module):
    """One head, as detectors and segmenters put it between convolutions."""

    def __init__(self, keeps_scale: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.q, self.k, self.v = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 12, 1)
        self.out = nn.Conv2d(12, 4, 1)
        self.scale = 8**-0.5 if keeps_scale else None

    def forward(self, x):
        x = self.stem(x)
        q, k, v = (layer(x).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(y[:, 0].transpose(1, 2).reshape(len(x), -1, 8, 8))


def widths(model):
    return sorted(group.size for group in analyse(model, IMAGES).groups)


def test_with_a_scale_of_its_own_they_go_together():
    torch.manual_seed(0)
    model = PixelAttention(True)
    assert widths(model) == [8, 12, 16]
    result = prune(model, IMAGES, budget={"macs": 0.4}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.q.out_channels == model.k.out_channels < 8


def test_the_scale_that_follows_from_the_width_pins_it():
    torch.manual_seed(0)
    model = PixelAttention(False)
    assert widths(model) == [12, 16]
    reasons = {pinned.name: pinned.reason for pinned in trace(model, IMAGES).pinned}
    assert "sets its scale" in reasons["q"]


class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_torchs_own_transformer_goes_one_way_in_analysis_and_check():
    torch.manual_seed(0)
    model = TorchEncoder().eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    result = prune(model, IMAGES, budget={"macs": 0.8})
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert result.plan.after.macs <= 0.8 * result.plan.before.macs
    assert all(layer.linear1.out_features < 32 for layer in model.encoder.layers)
    with torch.no_grad():
        quick = model(IMAGES)  # torch computes a layer in one operation here, and step by step with gradients
    assert torch.allclose(model(IMAGES), quick, atol=1e-5)


class ByNumber(nn.Module):
    """As GPT-2's layers end: the width is a number of the module."""

    def __init__(self, *, borrowed: bool = False) -> None:
        super().__init__()
        self.inner, self.outer, self.nf = nn.Linear(6, 16), nn.Linear(16, 3), 16
        self.borrowed = borrowed

    def forward(self, x):
        y = self.inner(x.reshape(-1, 6)).relu().view(*x.shape[:-1], self.nf)
        return self.outer(y) * (self.nf if self.borrowed else 1)


@pytest.mark.parametrize("borrowed", [False, True])
def test_a_reshape_follows_the_number_it_reads(borrowed):
    torch.manual_seed(0)
    model, x = ByNumber(borrowed=borrowed), torch.randn(2, 5, 6)
    groups = analyse(model, x).groups
    if borrowed:  # the number stands for something else, too: then it stays
        assert not groups
        assert model.nf == 16
        return
    assert [group.size for group in groups] == [16]
    prune(model, x, budget={"macs": 0.5})
    assert model.nf == model.inner.out_features < 16
