"""Hooks on the parameters of an ``NNCFNetwork``, NNCF 2's wrapper of a model.

NNCF 2 hands a layer's weight to its quantizer inside an autograd function, which function hooks do not see. So a hooked
parameter is computed before the network runs, and stands in the parameter's place until it has run: whatever reads
``layer.weight``, a quantizer or the layer itself, meets the result. Names, classes and the state dict stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nncf_compactprune.host.nncf_versions import IS_NNCF_2
from nncf_compactprune.host.tensors import NNCF_HOOKS, named_modules, own_tensors

_IN_PLACE = "_compactprune_in_place"


def is_nncf_network(model: nn.Module) -> bool:
    """Whether NNCF 2 has wrapped a model for its own algorithms."""
    if not IS_NNCF_2:
        return False
    from nncf.torch.nncf_network import NNCFNetwork

    return isinstance(model, NNCFNetwork)


def watch_parameters(model: nn.Module, storage: nn.Module) -> None:
    """Lets the hooks in NNCF's storage change parameters of an ``NNCFNetwork``, in place.

    :param model: gets the storage, and two module hooks; none of them refers to it, so copies work.
    :param storage: an empty ``HookStorage``.
    """
    model.add_module(NNCF_HOOKS, storage)
    model.register_forward_pre_hook(_put_in)
    model.register_forward_hook(_take_out, always_call=True)


def unwatch_parameters(model: nn.Module) -> None:
    """Takes away what :func:`watch_parameters` put there."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_put_in, _take_out)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    del model._modules[NNCF_HOOKS]


def _put_in(model: nn.Module, args: Any) -> None:
    storage: Any = model._modules[NNCF_HOOKS]
    computed: dict[int, Tensor] = {}
    in_place = model.__dict__.setdefault(_IN_PLACE, [])
    for name, module in named_modules(model):
        prefix = f"{name}." if name else ""
        for local, tensor in own_tensors(module).items():
            key = f"{(prefix + local).replace('.', ':')}__0"
            if key in storage.post_hooks:
                value = tensor
                for hook in storage.post_hooks[key].values():
                    value = hook(value)
                computed[id(tensor)] = value
    if not computed:
        return
    for _, module in named_modules(model):  # once more: other names of a shared parameter too
        for local, tensor in own_tensors(module).items():
            if id(tensor) in computed:
                module.__dict__[local] = computed[id(tensor)]
                in_place.append((module, local))


def _take_out(model: nn.Module, args: Any, output: Any) -> None:
    for module, local in model.__dict__.pop(_IN_PLACE, ()):
        module.__dict__.pop(local, None)
