"""Soft removal: masks as NNCF function hooks, so that training can ramp up before anything is cut.

A masked model and its compact form compute the same function; only the compact one is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.channels.groups import ChannelGraph
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_hooks import (
    HookModule,
    hook_parameter,
    remove_hooks,
    state_of_hooks,
    unseen_by_nncf,
    unwrap_if_empty,
)
from nncf_compactprune.host.tensors import copy_in, device_of, model_tensors
from nncf_compactprune.plan import PruningPlan


class ChannelMask(HookModule):
    """Multiplies removed slices of one parameter by zero.

    :param shape: the parameter's shape.
    :param dims: the dimensions that can be masked; each has a 0/1 buffer ``mask_<dim>`` of its size.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dims = tuple(dims)
        for dim in self.dims:
            view = [1] * len(self.shape)
            view[dim] = self.shape[dim]
            self.register_buffer(f"mask_{dim}", torch.ones(view))
        self.used = [False]  # shared with the replicas that nn.DataParallel makes

    def forward(self, parameter: Tensor) -> Tensor:
        """The masked parameter; gradients of removed slices are zero."""
        self.used[0] = True
        with unseen_by_nncf():
            for dim in self.dims:
                mask: Tensor = getattr(self, f"mask_{dim}")
                parameter = parameter * (mask if mask.dtype == parameter.dtype else mask.to(parameter.dtype))
            return parameter

    @torch.no_grad()
    def keep(self, dim: int, positions: Tensor | None) -> None:
        """Sets what stays along one dimension.

        :param dim: one of ``dims``.
        :param positions: what stays; None keeps all.
        """
        mask = getattr(self, f"mask_{dim}")
        if positions is None:
            mask.fill_(1)
        else:
            mask.zero_().view(-1)[positions.to(mask.device)] = 1

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {"shape": list(self.shape), "dims": list(self.dims)}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> ChannelMask:
        """Builds a mask that keeps everything; the buffers come from the state dict."""
        return cls(state["shape"], state["dims"])


class Masks:
    """The masks of one model.

    A parameter carries its hook only while something of it is removed: with no hooks at all, NNCF's function mode is
    off, and the epochs before the first channel goes cost nothing.

    :param model: is wrapped for NNCF hooks (in place) when the first channel goes.
    :param graph: its channels; every member parameter of every prunable group can be masked.
    :raises CompactPruneError: the model is a bare ``nn.Sequential``.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        if isinstance(model, nn.Sequential):
            msg = (
                "NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a layer). Put it "
                'inside a module of your own, or use "schedule": "one_shot", which needs no masks.'
            )
            raise CompactPruneError(msg)
        dims: dict[str, set[int]] = {}
        for group in graph.groups:
            for member in group.members:
                if not member.is_buffer:  # NNCF hooks see parameters only; zeroed consumers make buffers irrelevant
                    dims.setdefault(member.parameter, set()).add(member.dim)
        for name, parameter in model_tensors(model).parameters.items() if graph.branches else ():
            if parameter.dim() and any(branch.owns(name) for branch in graph.branches):
                dims.setdefault(name, set()).add(0)  # a branch goes with its last layer's shift
        self._masks = {name: ChannelMask(graph.parameters[name], sorted(of)) for name, of in dims.items()}
        self._models = [model]
        self._handles: list[Any] = []

    def share(self, ema: object | None) -> None:
        """Puts the same masks on a shadow copy from the next :meth:`update` on. A copy that was taken of a masked model
        has masks of its own, which would be averaged; they go.

        :param ema: a module with the same parameter names, or a holder with a ``module`` attribute.
        """
        shadow = None if ema is None else copy_in(ema, self._models[0])
        if shadow is None or any(shadow is model for model in self._models):
            return
        self._models.append(shadow)
        drop_masks(shadow)

    def update(self, plan: PruningPlan) -> None:
        """Masks what the plan removes and nothing else."""
        self.remove()
        device = device_of(self._models[0])  # it may have been moved since
        for name, mask in self._masks.items():
            mask.to(device).used[0] = False
            kept = plan.masked_dims(name)
            for dim in mask.dims:
                mask.keep(dim, kept.get(dim))
            if kept:
                for model in self._models:
                    self._handles.append(hook_parameter(model, name, mask))

    @property
    def idle(self) -> bool:
        """Whether masks are on, and no forward has passed any of them."""
        return bool(self._handles) and not any(mask.used[0] for mask in self._masks.values())

    def remove(self) -> None:
        """Takes the masks off; without other hooks the model's own forward is back and nothing of NNCF is left."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for model in self._models:
            unwrap_if_empty(model)


def kept_by_masks(graph: ChannelGraph, state: Mapping[str, Tensor]) -> list[npt.NDArray[np.bool_]]:
    """Which channels the masks in a model's state dict keep, for every group: ``[group.size]``.

    :param graph: the dense model's channels.
    :param state: with masks or without; without one, a group keeps all.
    """
    masks = {(of, name): value.flatten().cpu().numpy() != 0 for of, name, value in state_of_hooks(state)}
    kept = []
    for index, group in enumerate(graph.groups):
        keep = np.ones(group.size, bool)
        for member in group.members:
            mask = masks.get((member.parameter, f"mask_{member.dim}"))
            if mask is not None and not mask.any() and index not in graph.in_branches:
                continue  # what goes with a branch says nothing of the channels that it shares
            if mask is not None and len(mask) == graph.parameters[member.parameter][member.dim]:
                keep &= mask[member.indices].all(axis=1)
        kept.append(keep)
    return kept


def drop_masks(model: nn.Module) -> None:
    """Takes every mask off a model: an EMA copy made while masks were on has them too."""
    remove_hooks(model, lambda hook: isinstance(hook, ChannelMask))
