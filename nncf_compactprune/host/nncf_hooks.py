"""NNCF's function hooks: putting them on and taking them off without a trace."""

from __future__ import annotations

from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.wrapper import ForwardWithHooks
from torch import nn

from nncf_compactprune.host.tensors import NNCF_HOOKS


def unwrap_if_empty(model: nn.Module) -> None:
    """Removes NNCF's wrapper from a model that has no hooks left, unless something else was wrapped around it since:
    then it stays, and passes calls through."""
    if NNCF_HOOKS not in model._modules or not get_hook_storage(model).is_empty():
        return
    if isinstance(model.forward, ForwardWithHooks):
        original = model.forward.orig_forward
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original  # the model came with a forward of its own
        del model._replicate_for_data_parallel
        del model._modules[NNCF_HOOKS]
