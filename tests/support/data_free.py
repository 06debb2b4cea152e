"""Networks with statistics, for compression without data."""

from __future__ import annotations

import torch
from torch import nn

from nncf_compactprune.algorithms.data_free.network import batch_norms
from nncf_compactprune.algorithms.data_free.operations import Call, Calls


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def with_statistics_of(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A model whose BatchNorm statistics are those of a batch, as training makes them."""
    for norm in batch_norms(model).values():
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def calls_of(model: nn.Module, x: torch.Tensor) -> list[Call]:
    """What the convolutions and linear maps of a model get, in the order in which they run."""
    found: list[Call] = []

    def note(name: str, call: Call) -> torch.Tensor:
        found.append(call)
        return call.run(call.weight, call.bias)

    with torch.no_grad(), Calls({id(p): name for name, p in model.named_parameters()}, note):
        model(x)
    return found
