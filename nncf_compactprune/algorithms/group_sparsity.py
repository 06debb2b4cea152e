"""Group-sparsity regularisation: training pushes the channels that matter least towards zero before they go.

``Σ_g Σ_k γ_k·‖w_g[k]‖²`` with ``γ_k = 2^(α·(I_max - I_k)/(I_max - I_min))`` and ``α = 4`` (Fang et al. 2023,
"DepGraph", arXiv 2301.12900, eq. 4): ``w_g[k]`` is all that coupled layers hold of channel k of group g (its filters,
the inputs of the layers behind, its scale and shift), and ``I_k`` the square of its norm. So one channel shrinks in all
of them at once.

Deviation: ``γ`` is computed anew at the start of every epoch, and only groups that may be pruned count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nncf_compactprune.channels import ChannelGraph, ChannelGroup
from nncf_compactprune.host.tensors import model_tensors

_ALPHA = 4.0


class GroupSparsity:
    """The regularisation of one network. The factors are those of the
    moment it is built.

    :param model: the network that was analysed.
    :param graph: its channels.
    :param prunable: which groups count, ``[groups]``.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, prunable: Sequence[bool]) -> None:
        self.graph, self._model = graph, model
        self._groups = [group for group, free in zip(graph.groups, prunable, strict=True) if free]
        with torch.no_grad():
            self._factors = [_factors(squares) for squares in self._squares()]

    def __call__(self) -> Tensor:
        """The sum, with its gradient: a scalar."""
        parts = [(f.to(s) * s).sum() for f, s in zip(self._factors, self._squares(), strict=True)]
        return torch.stack(parts).sum()

    def _squares(self) -> list[Tensor]:
        tensors = model_tensors(self._model).parameters
        return [_squares_of(group, tensors) for group in self._groups]


def _factors(squares: Tensor) -> Tensor:
    span = (squares.max() - squares.min()).clamp_min(1e-12)
    return torch.pow(2.0, _ALPHA * (squares.max() - squares) / span)


def _squares_of(group: ChannelGroup, tensors: dict[str, Tensor]) -> Tensor:
    """``‖w_g[k]‖²``, ``[group.size]``."""
    parts = []
    for member in group.members:
        if member.is_buffer:
            continue
        tensor = tensors[member.parameter]
        rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).square().sum(1)
        parts.append(rows[torch.as_tensor(member.indices, device=rows.device)].sum(1))
    return torch.stack(parts).sum(0)
