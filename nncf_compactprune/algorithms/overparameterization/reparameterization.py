"""Weights of a model that train as something larger: putting the hooks on, and merging them away.

What trains, factors or branches, are the parameters of a hook on the layer's weight (:mod:`.weight_hooks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from nncf_compactprune.algorithms.overparameterization.factor_hooks import (
    ChainBias,
    ChainInput,
    ChainOutput,
    ChainPart,
    FactorizedWeight,
)
from nncf_compactprune.algorithms.overparameterization.factors import Geometry
from nncf_compactprune.algorithms.overparameterization.weight_hooks import MergedWeights, ReplacedWeight
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_hooks import hook_input, hook_output, hook_parameter, hooks, remove_hooks

FACTOR_SEED = 0  # fixed: every process of a distributed run, and every resumed run, must draw the same factors
CHAINABLE = frozenset(f"{prefix}{n}d" for prefix in ("conv", "conv_transpose") for n in (1, 2, 3)) | {"linear"}


class Reparameterization:
    """The replaced weights of one model.

    The layers' own weights stay where they are, frozen: they take no part, and hold stale values until :meth:`remove`.

    :param model: is wrapped for NNCF hooks (in place).
    :param layers: modules of :data:`~.factors.LAYERS` by the name of their weight.
    :param make: the hook for a weight of this geometry.
    :param operations: for hooks in mode ``"chain"``: names of the NNCF operations that use each weight.
    :param keep_merged: keep the merged weights of every training forward in ``merged`` (for a loss on them).
    :raises CompactPruneError: a bare ``nn.Sequential``, a weight with another hook on it, or a chain where the weight
        does not go straight into a convolution or linear operation. The model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        make: Callable[[Geometry], ReplacedWeight],
        *,
        operations: Mapping[str, Sequence[str]] | None = None,
        keep_merged: bool = False,
    ) -> None:
        _check(model, layers, operations)
        self._model = model
        self.merged = MergedWeights()
        self.hooks: dict[str, ReplacedWeight] = {}
        generator = torch.Generator().manual_seed(FACTOR_SEED)
        try:
            for name, module in layers.items():
                hook = make(Geometry.of(module))
                hook.assign(module.weight, generator)  # type: ignore[arg-type]
                hook.watch = (name, self.merged) if keep_merged else None
                hook.trainable = module.weight.requires_grad  # type: ignore[assignment]
                hook.train(module.training)
                self.hooks[name] = hook
                hook_parameter(model, name, hook)
                module.weight.requires_grad_(False)
                if operations is not None and isinstance(hook, FactorizedWeight):
                    _register_chain(model, name, module, hook, operations[name])
        except BaseException:  # out of memory, above all
            fold(model, write=False)
            raise

    @property
    def factors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, each with the name of the weight it stands for."""
        for name, hook in self.hooks.items():
            for factor in hook.parameters():
                yield name, factor

    def remove(self, *, keep_training: bool = True) -> None:
        """Takes the hooks off; the layers' own weights train again if they did before.

        :param keep_training: write the merged weights back; otherwise these are what they were in the beginning.
        """
        fold(self._model, write=keep_training)
        self.merged.clear()


@torch.no_grad()
def fold(model: nn.Module, *, write: bool = True) -> None:
    """Merges every replaced weight of a model (the one at hand, or a copy of it) and removes the hooks.

    :param model: the model, or a copy of it.
    :param write: write the merged weights back; otherwise the weights stay as they are.
    """
    parameters = dict(model.named_parameters())
    for hook in hooks(model):
        if isinstance(hook.module, ReplacedWeight):
            weight = parameters[hook.operation]
            weight.requires_grad_(hook.module.trainable)
            if write:
                weight.copy_(hook.module.merged())
    remove_hooks(model, lambda hook: isinstance(hook, (ReplacedWeight, ChainPart)))


def _register_chain(
    model: nn.Module, name: str, module: nn.Module, hook: FactorizedWeight, operations: Sequence[str]
) -> None:
    if isinstance(module.bias, nn.Parameter):
        hook_parameter(model, f"{name.removesuffix('weight')}bias", ChainBias(hook))
    for operation in operations:
        hook_input(model, operation, 0, ChainInput(hook))
        hook_output(model, operation, 0, ChainOutput(hook))


def _check(model: nn.Module, layers: Mapping[str, nn.Module], operations: Mapping[str, Sequence[str]] | None) -> None:
    if isinstance(model, nn.Sequential):
        msg = (
            "NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a layer). Put it "
            "inside a module of your own."
        )
        raise CompactPruneError(msg)
    taken = {hook.operation for hook in hooks(model)}
    for name in layers:
        if name in taken:
            msg = f"'{name}' has an NNCF hook already (a mask, a quantizer). Strip that one first."
            raise CompactPruneError(msg)
        used_by = [] if operations is None else operations.get(name, [])
        layer = name.rpartition(".")[0]
        if operations is not None and (not used_by or not all(_is_its_own(op, layer) for op in used_by)):
            msg = (
                f"mode \"chain\": '{name}' goes into {', '.join(used_by) or 'no operation'}, expected only its own "
                'layer\'s convolution or linear operation. Use "merged", or leave the layer out by ignored_scopes.'
            )
            raise CompactPruneError(msg)


def _is_its_own(operation: str, layer: str) -> bool:
    """Whether an operation's name is that of a layer's own convolution or matrix product. Names lack what is not called
    on the way to the layer, such as a ``ModuleList``."""
    *path, kind, _ = operation.split("/")
    where = ".".join(path).strip(".")
    return kind in CHAINABLE and (not where or f".{layer}".endswith(f".{where}"))
