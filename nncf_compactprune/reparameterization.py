"""Weights that train as products of factors, through NNCF function hooks.

The factors are the parameters of a hook on the layer's weight. In mode ``"merged"`` the hook gives the layer the
product, and one small convolution runs: the same function and the same gradients as the chain of three layers, since
nothing non-linear stands between them. Mode ``"chain"`` runs that chain, for reference; its factors are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from nncf.torch.function_hook import (
    get_hook_storage,
    register_post_function_hook,
    register_pre_function_hook,
    wrap_model,
)
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import Tensor, nn
from torch.nn import functional

from nncf_compactprune.channels.tensors import NNCF_HOOKS
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.factors import Factors, Geometry, factorise, merge
from nncf_compactprune.masks import unwrap_if_empty

Mode = Literal["merged", "chain"]
FACTOR_SEED = 0  # fixed: every process of a distributed run, and every resumed run, must draw the same factors
CHAINABLE = frozenset(
    f"{prefix}{n}d" for prefix in ("conv", "conv_transpose") for n in (1, 2, 3)
) | {"linear"}  # fmt: skip


class MergedWeights(dict[str, Tensor]):
    """The merged weights of the last forward in training mode, by name. A copied model must not share or copy them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedWeights:
        return MergedWeights()


class FactorizedWeight(nn.Module, StatefulModuleInterface):  # type: ignore[misc]
    """The hook on a layer's weight. Its parameters are ``first``, ``core`` and ``last``, see
    :mod:`nncf_compactprune.factors`.

    :param geometry: of the weight.
    :param expansion: how many times wider the inner layers are.
    :param mode: give the layer the merged weight, or the core where other hooks run ``first`` and ``last``.
    """

    def __init__(self, geometry: Geometry, expansion: int, mode: Mode = "merged") -> None:
        super().__init__()
        self.geometry = geometry
        self.expansion = expansion
        self.mode = mode
        self.calls = 0
        shapes = geometry.factor_shapes(expansion)
        self.first, self.core, self.last = (nn.Parameter(torch.zeros(shape)) for shape in shapes)
        self.watch: tuple[str, MergedWeights] | None = None
        self.bias: list[Tensor | None] = []  # what the chain adds in the end

    @property
    def factors(self) -> Factors:
        """The three parameters."""
        return Factors(self.first, self.core, self.last)

    def assign(self, weight: Tensor, generator: torch.Generator, core_scale: float) -> None:
        """Takes over a weight exactly, with dtype and device."""
        made = factorise(weight, self.geometry, self.expansion, generator, core_scale=core_scale)
        for parameter, value in zip(self.factors, made, strict=True):
            parameter.data = value

    def forward(self, weight: Tensor) -> Tensor:
        """What the layer computes with; ``weight`` itself only says dtype and memory format."""
        self.calls += 1
        if self.mode == "chain":
            return self.geometry.core_weight(self.core, self.expansion).to(weight.dtype)
        # In half precision three roundings would add up, in the weight itself.
        with torch.autocast(weight.device.type, enabled=False):
            merged = self.geometry.weight(merge(self.factors))
        if self.watch is not None and self.training and torch.is_grad_enabled():
            name, seen = self.watch
            seen[name] = merged
        channels_last = merged.dim() == 4 and not weight.is_contiguous()
        kept = torch.channels_last if channels_last else torch.contiguous_format
        return merged.to(weight.dtype).contiguous(memory_format=kept)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight that the factors stand for, multiplied in float64 on the CPU, in the factors' dtype."""
        doubled = Factors(*(factor.detach().to("cpu", torch.float64) for factor in self.factors))
        return self.geometry.weight(merge(doubled)).to(self.core)

    def get_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        geometry = {"shape": list(self.geometry.shape), "groups": self.geometry.groups}
        return {**geometry, "transposed": self.geometry.transposed, "expansion": self.expansion, "mode": self.mode}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> FactorizedWeight:
        """Builds the hook; the factors come from the state dict."""
        geometry = Geometry(tuple(state["shape"]), state["groups"], state["transposed"])
        return cls(geometry, state["expansion"], state["mode"])


class _ChainPart(nn.Module):
    """A hook beside the weight's own, with the weight's factors, which stay the weight hook's parameters alone."""

    def __init__(self, owner: FactorizedWeight) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple, so that it is no submodule

    def pointwise(self, x: Tensor, factor: Tensor, *, linear: bool) -> Tensor:
        """Multiplies the channels of ``x`` by a factor ``[groups, out, in]``."""
        groups, outs, ins = factor.shape
        if linear:
            return functional.linear(x, factor[0])
        dims = max(len(self.owner[0].geometry.shape) - 2, 1)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
        return convolve(x, factor.reshape(groups * outs, ins, *[1] * dims), groups=groups)

    @property
    def linear(self) -> bool:
        return len(self.owner[0].geometry.shape) == 2


class ChainInput(_ChainPart):
    """Runs the chain's first layer on the operation's input. Padding with zeros comes after it: it has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        """The operation's input."""
        return self.pointwise(x, self.owner[0].first, linear=self.linear)


class ChainBias(_ChainPart):
    """Keeps the bias back until the chain's end."""

    def forward(self, bias: Tensor) -> None:
        """The operation runs without."""
        # A view, no longer the parameter: used in the chain's end, that would meet this hook again.
        self.owner[0].bias.append(bias.view_as(bias))


class ChainOutput(_ChainPart):
    """Runs the chain's last layer on the operation's output, and adds the bias."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        owner = self.owner[0]
        y = self.pointwise(x, owner.last, linear=self.linear)
        bias = owner.bias.pop() if owner.bias else None
        if bias is None:
            return y
        return y + (bias if self.linear else bias.view(-1, *[1] * (len(owner.geometry.shape) - 2)))


class Reparameterization:
    """The factorised weights of one model.

    The layers' own weights stay where they are, frozen: they take no part, and hold stale values until :meth:`remove`.

    :param model: is wrapped for NNCF hooks (in place).
    :param layers: modules of :data:`~nncf_compactprune.factors.LAYERS` by the name of their weight.
    :param expansion: :param mode: see :class:`FactorizedWeight`.
    :param core_scale: see :func:`~nncf_compactprune.factors.factorise`.
    :param operations: for the chain: names of the NNCF operations that use each weight.
    :param keep_merged: keep the merged weights of every training forward in ``merged`` (for a loss on them).
    :raises CompactPruneError: a bare ``nn.Sequential``, a weight with another hook on it, or a chain where the weight
        does not go straight into a convolution or linear operation. The model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        expansion: int,
        *,
        mode: Mode = "merged",
        core_scale: float = 0.0,
        operations: Mapping[str, Sequence[str]] | None = None,
        keep_merged: bool = False,
    ) -> None:
        _check(model, layers, operations if mode == "chain" else None)
        self._model = model
        self.merged = MergedWeights()
        self.hooks: dict[str, FactorizedWeight] = {}
        wrap_model(model)
        generator = torch.Generator().manual_seed(FACTOR_SEED)
        for name, module in layers.items():
            hook = FactorizedWeight(Geometry.of(module), expansion, mode)
            hook.assign(module.weight, generator, core_scale)  # type: ignore[arg-type]
            hook.watch = (name, self.merged) if keep_merged else None
            hook.train(module.training)
            self.hooks[name] = hook
            register_post_function_hook(model, name, 0, hook)
            module.weight.requires_grad_(False)
            if mode == "chain" and operations is not None:
                _register_chain(model, name, module, hook, operations[name])

    @property
    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable factors with the name of the weight they stand for."""
        for name, hook in self.hooks.items():
            for factor in (hook.first, hook.core, hook.last):
                yield name, factor

    def remove(self, *, keep_training: bool = True) -> None:
        """Takes the hooks off; the layers' own weights train again.

        :param keep_training: write the products into the weights; otherwise these are what they were in the beginning.
        """
        fold(self._model, write=keep_training)
        self.merged.clear()


@torch.no_grad()
def fold(model: nn.Module, *, write: bool = True) -> None:
    """Merges every factorised weight of a model (the one at hand, or a copy of it) and removes the hooks."""
    if NNCF_HOOKS not in model._modules:
        return
    storage = get_hook_storage(model)
    parameters = dict(model.named_parameters())
    for name, hook in list(storage.named_hooks()):
        if isinstance(hook, FactorizedWeight):
            weight = parameters[decode_hook_name(name)[1]]
            weight.requires_grad_(True)
            if write:
                weight.copy_(hook.merged())
        if isinstance(hook, (FactorizedWeight, _ChainPart)):
            storage.delete_hook(name)
    unwrap_if_empty(model)


def _register_chain(
    model: nn.Module, name: str, module: nn.Module, hook: FactorizedWeight, operations: Sequence[str]
) -> None:
    if isinstance(module.bias, nn.Parameter):
        register_post_function_hook(model, f"{name.removesuffix('weight')}bias", 0, ChainBias(hook))
    for operation in operations:
        register_pre_function_hook(model, operation, 0, ChainInput(hook))
        register_post_function_hook(model, operation, 0, ChainOutput(hook))


def _check(model: nn.Module, layers: Mapping[str, nn.Module], operations: Mapping[str, Sequence[str]] | None) -> None:
    if isinstance(model, nn.Sequential):
        msg = (
            "NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a layer). Put it "
            "inside a module of your own."
        )
        raise CompactPruneError(msg)
    taken = set()
    if NNCF_HOOKS in model._modules:
        taken = {decode_hook_name(name)[1] for name, _ in get_hook_storage(model).named_hooks()}
    for name in layers:
        if name in taken:
            msg = f"'{name}' has an NNCF hook already (a mask, a quantizer). Strip that one first."
            raise CompactPruneError(msg)
        used_by = [] if operations is None else operations.get(name, [])
        scope = name.rpartition(".")[0].replace(".", "/")
        own = {f"{scope}/{kind}" for kind in CHAINABLE}
        if operations is not None and (not used_by or any(op.rpartition("/")[0] not in own for op in used_by)):
            msg = (
                f"mode \"chain\": '{name}' goes into {', '.join(used_by) or 'no operation'}, expected only its own "
                'layer\'s convolution or linear operation. Use "merged", or leave the layer out by ignored_scopes.'
            )
            raise CompactPruneError(msg)
