"""Random cuts, and what a model must still be after one."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from nncf_compactprune import PruningPlan
from nncf_compactprune.channels import trace
from nncf_compactprune.plan import make_plan


def random_plan(
    model: nn.Module, x, *, seed: int = 0, allow_approximate: bool = False, ratio: float = 0.5
) -> PruningPlan:
    graph = trace(model, x, allow_approximate=allow_approximate)
    generator = np.random.default_rng(seed)
    keep = []
    for group in graph.groups:
        mask = generator.random(group.size) >= ratio
        mask[generator.integers(group.size)] = True
        keep.append(mask)
    return make_plan(graph, keep)


def snapshot(model: nn.Module) -> dict:
    facts = {
        name: {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple, list)) and "_flat_weight" not in k}
        for name, m in model.named_modules()
    }
    return {"state": {k: v.clone() for k, v in model.state_dict().items()}, "facts": copy.deepcopy(facts)}


def same(a: dict, b: dict) -> bool:
    return (
        a["facts"] == b["facts"]
        and a["state"].keys() == b["state"].keys()
        and all(torch.equal(v, b["state"][k]) for k, v in a["state"].items())
    )


def marks(*things: nn.Module | torch.optim.Optimizer) -> list:
    """Everything of models and optimizers that a failed change could leave a mark on, to be compared by ``==``.

    Attributes of every module; identity, bits, dtype, layout and gradient of every tensor; order of every dictionary.
    """
    return [_marks_of(thing) for thing in things]


def _marks_of(thing) -> list:
    if isinstance(thing, torch.optim.Optimizer):
        return [(id(p), [(key, _mark(value)) for key, value in state.items()]) for p, state in thing.state.items()]
    return [
        (name, [(key, _mark(value)) for key, value in vars(module).items()]) for name, module in thing.named_modules()
    ]


def _mark(value):
    if isinstance(value, torch.Tensor):
        grad = None if value.grad is None else _mark(value.grad)
        return id(value), value.dtype, value.shape, value.stride(), value.detach().numpy().tobytes(), grad
    if isinstance(value, dict):
        return [(key, _mark(entry)) for key, entry in value.items()]
    if isinstance(value, (tuple, list)):
        return [_mark(entry) for entry in value]
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def assert_facts_are_true(model: nn.Module) -> None:
    """Rebuilding a layer from what it says of itself gives its shapes."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            i, o, g = module.in_channels, module.out_channels, module.groups
            assert tuple(module.weight.shape[:2]) == ((i, o // g) if module.transposed else (o, i // g))
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            assert module.weight.shape[0] == module.num_features
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.shape[0] == module.num_channels
            assert module.num_channels % module.num_groups == 0
        elif isinstance(module, nn.RNNBase):
            assert module.weight_ih_l0.shape[1] == module.input_size
            assert module.weight_hh_l0.shape[1] == module.hidden_size
            assert all(isinstance(weight, nn.Parameter) for weight in module._flat_weights)


class HardCoded(nn.Module):
    """Runs only at its dense width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.head(y.view(x.shape[0], 8, y.shape[2], y.shape[3]))
