"""``normalizer`` in an entry of ``fbnet_pruning``."""

from __future__ import annotations

import pytest
import torch
from support.networks import images, trained

from nncf_compactprune import prune
from nncf_compactprune.errors import ConfigError


def widths(**params):
    model = trained("residual", dtype=torch.float32)
    result = prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1, allocation="global", **params)
    return [group.after for group in result.plan.groups]


def test_it_reaches_the_allocation() -> None:
    every = {name: widths(importance="lamp", normalizer=name) for name in ("mean", "max", "sum", "none")}
    assert every["max"] == every["none"]  # the largest score of lamp is 1
    assert every["mean"] != every["none"]
    assert every["sum"] != every["mean"]


def test_it_is_refused_where_no_scores_are_compared() -> None:
    with pytest.raises(ConfigError, match='normalizer: the allocation "balanced" does not compare scores of groups'):
        prune(trained("residual", dtype=torch.float32), images(torch.float32), budget={"macs": 0.5}, normalizer="max")
