"""``nncf.prune``: single weights are set to zero by hooks. Putting masks on, moving them, writing them into weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import nncf
import torch
from nncf.torch.function_hook.pruning.magnitude.algo import update_pruning_ratio
from nncf.torch.function_hook.pruning.magnitude.modules import UnstructuredPruningMask
from nncf.torch.function_hook.pruning.rb.losses import RBLoss
from nncf.torch.function_hook.pruning.rb.modules import RBPruningMask, binary_mask
from nncf.torch.function_hook.pruning.scheduler_fns import multi_step_ratio_scheduler
from torch import Tensor, nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_hooks import Hook, hook_parameter, hooks, remove_hooks

__all__ = ["RBLoss", "Sparsity", "is_mask", "multi_step_ratio_scheduler"]

_MASKS = (UnstructuredPruningMask, RBPruningMask)


def is_mask(module: nn.Module) -> bool:
    """Whether a hook is a mask of ``nncf.prune``, on single weights."""
    return isinstance(module, _MASKS)


class Sparsity:
    """The masks of single weights on one model.

    :param model: gets hooks, in place.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param ignored: NNCF's names of operations whose weights stay.
    :param learned: the masks are parameters that training moves (regularisation-based).
    :raises CompactPruneError: the model is a bare ``nn.Sequential``, or no operation has weights.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, ignored: Collection[str] = (), *, learned: bool = False
    ) -> None:
        if isinstance(model, nn.Sequential):
            msg = (
                "NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a layer). Put it "
                "inside a module of your own."
            )
            raise CompactPruneError(msg)
        before = {hook.key for hook in hooks(model)}
        modes = nncf.PruneMode
        try:
            nncf.prune(
                model,
                mode=modes.UNSTRUCTURED_REGULARIZATION_BASED if learned else modes.UNSTRUCTURED_MAGNITUDE_LOCAL,
                ratio=None if learned else 0.0,
                ignored_scope=nncf.IgnoredScope(names=sorted(ignored), validate=False),
                examples_inputs=example_inputs,
            )
        except nncf.InternalError as error:
            remove_hooks(model, lambda module: isinstance(module, _MASKS))
            msg = f"no weight can be set to zero in {type(model).__name__}: no operation in scope has weights."
            raise CompactPruneError(msg) from error
        self.model = model
        if not self._hooks() or before == {hook.key for hook in hooks(model)}:
            msg = f"no weight can be set to zero in {type(model).__name__}: no operation in scope has weights."
            raise CompactPruneError(msg)

    def _hooks(self) -> list[Hook]:
        return [hook for hook in hooks(self.model) if isinstance(hook.module, _MASKS)]

    def weights(self) -> dict[str, Tensor]:
        """The masked parameters by name, unmasked."""
        return {hook.operation: self.model.get_parameter(hook.operation) for hook in self._hooks()}

    def masks(self) -> dict[str, Tensor]:
        """What stays of each masked parameter: booleans of its shape."""
        found = {}
        for hook in self._hooks():
            module: Any = hook.module
            learned = isinstance(module, RBPruningMask)
            found[hook.operation] = binary_mask(module.mask.detach()) > 0.5 if learned else module.binary_mask
        return found

    def mask_parameters(self) -> list[nn.Parameter]:
        """The parameters behind learned masks."""
        modules: list[Any] = [hook.module for hook in self._hooks() if isinstance(hook.module, RBPruningMask)]
        return [module.mask for module in modules]

    @property
    def level(self) -> float:
        """Share of the masked weights that are zero now."""
        masks = self.masks().values()
        return 1 - sum(int(mask.sum()) for mask in masks) / max(sum(mask.numel() for mask in masks), 1)

    def by_magnitude(self, level: float, *, local: bool, normalised: bool) -> None:
        """Masks the weights of least magnitude.

        :param level: share of the weights, in [0, 1).
        :param local: the share of each layer; else of all layers together.
        :param normalised: magnitudes are divided by the L2 norm of their layer, where layers are taken together.
        """
        if local or normalised:
            modes = nncf.PruneMode
            mode = modes.UNSTRUCTURED_MAGNITUDE_LOCAL if local else modes.UNSTRUCTURED_MAGNITUDE_GLOBAL
            update_pruning_ratio(self.model, mode, level)
            return
        magnitudes = {name: weight.detach().abs() for name, weight in self.weights().items()}
        together = torch.cat([magnitude.flatten() for magnitude in magnitudes.values()])
        threshold = together.kthvalue(int((together.numel() - 1) * level) + 1).values
        self.set_masks(lambda name, weight: magnitudes[name] > threshold)

    @torch.no_grad()
    def set_masks(self, stays: Callable[[str, Tensor], Tensor]) -> None:
        """Sets every fixed mask.

        :param stays: from name and weight to what stays of it.
        """
        for hook in self._hooks():
            module: Any = hook.module
            module.binary_mask.copy_(stays(hook.operation, self.model.get_parameter(hook.operation)))

    @torch.no_grad()
    def take_masks(self, masks: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> None:
        """Sets masks, fixed or learned, to those of another run. Those of unknown parameters or other sizes are left.

        :param masks: by parameter, what stays: booleans of its shape.
        :param learned: by parameter, logits of the probability to stay.
        """
        for hook in self._hooks():
            module: Any = hook.module
            is_learned = isinstance(module, RBPruningMask)
            own = module.mask if is_learned else module.binary_mask
            given = (learned if is_learned else masks).get(hook.operation)
            if given is not None and given.shape == own.shape:
                own.copy_(given)

    def fix(self) -> None:
        """Learned masks stay as they are from here on, without noise, and are no parameters any more."""
        masks = self.masks()
        remove_hooks(self.model, lambda module: isinstance(module, RBPruningMask))
        for name, mask in masks.items():
            fixed = UnstructuredPruningMask(tuple(mask.shape)).to(mask.device)
            fixed.binary_mask.copy_(mask)
            hook_parameter(self.model, name, fixed)

    @torch.no_grad()
    def write(self, copies: Iterable[nn.Module] = ()) -> None:
        """Ends: the zeros are in the weights, and the hooks are gone.

        :param copies: models with the same parameters, such as an EMA copy, that get the same zeros.
        """
        masks = self.masks()
        for model in (self.model, *copies):
            for name, mask in masks.items():
                parameter = model.get_parameter(name)
                parameter.mul_(mask.to(parameter.device))
            remove_hooks(model, lambda module: isinstance(module, _MASKS))
