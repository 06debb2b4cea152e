"""How a model is called: its inputs, its mode, and what must be as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nncf_compactprune.host.tensors import named_modules


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Calls a model with a tensor, a tuple of positional inputs or a dict of keyword inputs."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast and an untouched random state inside; training flags restored after."""
    training = [module for _, module in named_modules(model) if module.training]
    device = next((p.device.type for p in model.parameters()), "cpu")
    on = device != "meta" and torch.is_autocast_enabled(device)
    without_autocast = torch.autocast(device, enabled=False) if on else nullcontext()
    if training:
        model.eval()
    try:
        with torch.no_grad(), without_autocast, torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        for module in training:
            module.training = True


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
