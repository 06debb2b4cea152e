"""The masked model: the dense one with everything that goes set to zero, for comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.channels.rules import BY_CONSENT
from nncf_compactprune.cut.means import Kept, means_over_kept
from nncf_compactprune.cut.transaction import for_a_while
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.host.torch_internals import TorchDispatchMode
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins


@contextmanager
def masked(model: nn.Module, plan: PruningPlan, inputs: Any, plugins: Plugins | None = None) -> Iterator[None]:
    """The dense model with everything that goes set to zero; its own weights are back afterwards, bit for bit.

    :param model: the dense model, masked in place.
    :param plan: what stays; it fits the model.
    :param inputs: what it will be called with: one run finds the means over channels that a plan cuts by consent.
    :param plugins: where the rules of operations come from; the installed plugins by default.
    """
    parameters = model_tensors(model).parameters
    means = means_over_kept(model, plan, inputs, plugins) if plan.approximate else []
    with for_a_while() as log:
        for name, parameter in parameters.items():
            if (dims := plan.masked_dims(name)) and parameter.dim():
                log.set_data(parameter, zero_removed(parameter.data, dims))
        with NormOverKept(model, plan, means) if plan.approximate else nullcontext():
            yield


def zero_removed(data: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A copy with every removed position set to zero.

    :param data: a tensor of any shape.
    :param dims: kept positions by dimension; all of a dimension that is not named.
    """
    stays: Tensor | None = None
    for dim, positions in dims.items():
        of_dim = torch.zeros(data.shape[dim], dtype=torch.bool, device=data.device)
        of_dim[positions.to(data.device)] = True
        of_dim = of_dim.view([-1 if d == dim else 1 for d in range(data.dim())])
        stays = of_dim if stays is None else stays & of_dim
    return data.clone() if stays is None else torch.where(stays, data, data.new_zeros(()))


class NormOverKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Masked LayerNorm, one-group GroupNorm, weight standardisation and means over channels (RMSNorm) take their
    statistics over the kept channels, as the compact ones do.

    :param model: the dense model.
    :param plan: what stays.
    :param means: of every mean that one run of the model takes, in turn, what it runs over.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, means: Sequence[Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._means = means
        self._means_seen = 0
        self._kept = {}
        self._kept_inputs = {}
        for name, parameter in model_tensors(model).parameters.items():
            dims = plan.kept.get(name, {})
            if parameter.dim() == 1 and 0 in dims:
                self._kept[id(parameter)] = plan.indices(name, 0).to(parameter.device)
            elif parameter.dim() > 2 and 1 in dims:
                self._kept_inputs[id(parameter)] = plan.indices(name, 1).to(parameter.device)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in BY_CONSENT and self._means:
            over = self._means[self._means_seen % len(self._means)]  # every run takes the same ones
            self._means_seen += 1
            x = args[0]
            for dim, positions in over.items():
                x = x.index_select(dim, positions.to(x.device))
            return func(x, *args[1:], **kwargs)
        if func is torch.ops.aten.native_layer_norm.default and id(args[2]) in self._kept:
            x, _, weight, bias, eps = args
            kept = self._kept[id(weight)]
            out, mean, rstd = func(
                x.index_select(-1, kept), [len(kept)], weight[kept], None if bias is None else bias[kept], eps
            )
            return x.new_zeros(x.shape).index_copy_(-1, kept, out), mean, rstd
        if func is torch.ops.aten.native_group_norm.default and args[6] == 1 and id(args[1]) in self._kept:
            x, weight, bias, n, _, positions, groups, eps = args
            kept = self._kept[id(weight)]
            out, mean, rstd = func(
                x.index_select(1, kept).contiguous(), weight[kept], None if bias is None else bias[kept],
                n, len(kept), positions, groups, eps,
            )  # fmt: skip
            return x.new_zeros(x.shape).index_copy_(1, kept, out), mean, rstd
        if func in _BATCH_NORMS and id(args[0]._base) in self._kept_inputs:
            x, parameter = args[0], args[0]._base
            taps = parameter[0, 0].numel()
            kept = self._kept_inputs[id(parameter)]
            kept = (kept[:, None] * taps + torch.arange(taps, device=kept.device)).reshape(-1)
            out, *statistics = func(x.index_select(2, kept).contiguous(), *args[1:], **kwargs)
            return x.new_zeros(x.shape).index_copy_(2, kept, out), *statistics
        return func(*args, **kwargs)


_BATCH_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten._native_batch_norm_legit.no_stats)
