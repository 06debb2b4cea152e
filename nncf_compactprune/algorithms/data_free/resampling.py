"""Inputs of all layers in one forward pass: every BatchNorm's output becomes a draw from N(beta, gamma^2) per channel.

What stands between two BatchNorms (activations, additions, pooling, gates) runs natively, so the inputs of all layers
come out at once, whatever is in front of them. Channels and places come out independent of each other: right for
ranges and biases, nothing for least squares to make use of.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.network import batch_norms
from nncf_compactprune.host.torch_internals import BatchNorm


@contextmanager
def resampling(model: nn.Module, rows: int, kept: Mapping[str, Mapping[int, Tensor]]) -> Iterator[None]:
    """Inside, the outputs of BatchNorms are draws for the last ``rows`` of every batch.

    A draw depends on the module's name alone, so that a model and its cut copy see the same one.

    :param model: with BatchNorms; its weights and statistics stay.
    :param rows: how many of the last examples; 0 changes nothing.
    :param kept: of a cut model: the dense positions of each ``<name>.running_mean``'s channels, under dimension 0.
    """
    handles = [
        module.register_forward_hook(_Redraw(name, rows, kept.get(f"{name}.running_mean", {}).get(0)))
        for name, module in (batch_norms(model).items() if rows else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Redraw:
    """The forward hook of :func:`resampling`."""

    def __init__(self, name: str, rows: int, kept: Tensor | None) -> None:
        self._seed = zlib.crc32(name.encode())
        self._rows, self._kept = rows, kept

    def __call__(self, module: BatchNorm, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        rest = output.shape[2:]
        width = output.shape[1] if self._kept is None else int(self._kept.max()) + 1
        # channel by channel, so that the draws of the kept ones do not depend on how many there were
        noise = torch.stack([torch.randn(self._rows, *rest, generator=generator) for _ in range(width)], 1)
        noise = (noise if self._kept is None else noise[:, self._kept]).to(output)
        shape = [1, -1, *(1 for _ in rest)]
        gamma = output.new_ones(1) if module.weight is None else module.weight.to(output)
        beta = output.new_zeros(1) if module.bias is None else module.bias.to(output)
        drawn = noise * gamma.view(shape) + beta.view(shape)
        return torch.cat([output[: len(output) - self._rows], drawn])
