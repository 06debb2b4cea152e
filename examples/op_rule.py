"""Teaches the channel analysis an operation that it has no rule for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune import analyse, hookimpl
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.plugins.hookspecs import OpRule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.second = nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cumprod(self.first(x), dim=-1))


def cumprod(tracer: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
    """Works along one dimension, which must not be the channels; the others pass through."""
    x, dim = args[0], args[1]
    labels = list(tracer.labels(x))
    tracer.pin(labels[dim], "multiplied along its channels by cumprod")
    tracer.set(out, labels)


class Rules:
    @hookimpl
    def compactprune_op_rules(self) -> dict[str, OpRule]:
        return {"aten.cumprod": cumprod}


net, images = Net(), torch.randn(1, 3, 8, 8)
without = analyse(net, images)
print(f"without the rule: {len(without.groups)} groups; {without.pinned[0].name}: {without.pinned[0].reason}")

plugins = Plugins()
plugins.load_entry_points()  # the built-in rules and what else is installed
plugins.register(Rules(), "my rules")
graph = analyse(net, images, plugins=plugins)
print(f"with the rule: {graph.groups[0].size} channels of {graph.groups[0].name} can go")
