"""NNCF's function hooks: putting them on, finding them, and taking them off without a trace.

What holds for NNCF's hooks, and is tested in ``tests/host/test_nncf_hooks.py``: a post-hook named after a parameter,
port 0, sees that parameter before each use. Operations inside a hook pass the function mode too, unless it is off. The
storage of hooks is a submodule, which a bare ``nn.Sequential`` would run as a layer.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from nncf.torch.function_hook import (
    get_hook_storage,
    is_wrapped,
    register_post_function_hook,
    register_pre_function_hook,
    wrap_model,
)
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, disable_function_hook_mode
from nncf.torch.function_hook.hook_storage import HookStorage, RemovableHookHandle, decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.function_hook.wrapper import ForwardWithHooks
from nncf.torch.layer_utils import StatefulModuleInterface
from torch import nn

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf2_parameters import is_nncf_network, unwatch_parameters, watch_parameters
from nncf_compactprune.host.tensors import NNCF_HOOKS, carries_hooks


class HookState(StatefulModuleInterface):  # type: ignore[misc]
    """What NNCF asks of a hook beside being a module."""


class HookModule(nn.Module, HookState):
    """Base of hooks: NNCF stores a hook by ``get_config`` and rebuilds it by ``from_config``."""


@dataclass(frozen=True)
class Hook:
    """One hook of a model.

    :param key: its name in NNCF's storage.
    :param before: whether it sees an operation's input; else its output.
    :param operation: NNCF's name of the operation, or the name of a parameter.
    :param port: which of the inputs or outputs.
    :param module: what is called.
    """

    key: str
    before: bool
    operation: str
    port: int
    module: nn.Module


def hooks(model: nn.Module, *, shared: bool = False) -> list[Hook]:
    """All hooks of a model, in NNCF's order; none where it is not wrapped.

    :param model: wrapped or not.
    :param shared: list a hook that sits at several places once for each of them.
    """
    if NNCF_HOOKS not in model._modules:
        return []
    found = []
    for key, module in get_hook_storage(model).named_hooks(remove_duplicate=not shared):
        kind, operation, port = decode_hook_name(key)
        found.append(Hook(key, kind == "pre_hooks", operation, port, module))
    return found


class HookHandle:
    """Takes one hook off again. Copied together with its model, it belongs to the copy: NNCF's own handle would still
    point to the original.

    :param model: the hooked model.
    :param handle: NNCF's handle.
    :param before: whether the hook sees an operation's input.
    """

    def __init__(self, model: nn.Module, handle: RemovableHookHandle, *, before: bool) -> None:
        self._model, self._handle, self._before = model, handle, before

    def remove(self) -> None:
        """Takes the hook off, if it is still there."""
        self._handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> HookHandle:
        model = copy.deepcopy(self._model, memo)
        if NNCF_HOOKS not in model._modules:  # the last hook is gone already, and the wrapper with it
            return HookHandle(model, self._handle, before=self._before)
        storage = get_hook_storage(model)
        of_kind = storage.pre_hooks if self._before else storage.post_hooks
        return HookHandle(model, RemovableHookHandle(of_kind, self._handle.key, self._handle.id), before=self._before)


def state_of_hooks(state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Operation (or parameter), name and value of every tensor in a state dict that belongs to a hook.

    :param state: a model's state dict.
    """
    for key, value in state.items():
        _, is_hook, rest = key.rpartition(f"{NNCF_HOOKS}.")
        if is_hook:
            hook, _, name = rest.rpartition(".")
            yield decode_hook_name(hook)[1], name, value


def hook_parameter(model: nn.Module, name: str, hook: nn.Module) -> Any:
    """Lets a hook change a parameter before each use. The model is wrapped, in place, where it is not yet.

    :param model: the model; it is wrapped in place.
    :param name: of the parameter.
    :param hook: is called with the parameter and returns what is used instead.
    :return: a handle with ``remove()``.
    """
    refuse_checkpointing(hook)
    return HookHandle(model, register_post_function_hook(_wrapped(model), name, 0, hook), before=False)


def hook_input(model: nn.Module, operation: str, port: int, hook: nn.Module) -> Any:
    """Lets a hook change an operation's input; see :func:`hook_parameter`.

    :param model: the model; it is wrapped in place.
    :param operation: NNCF's name of the operation.
    :param port: which input.
    :param hook: is called with the input and returns what is used instead.
    """
    return HookHandle(model, register_pre_function_hook(_with_mode(model), operation, port, hook), before=True)


def hook_output(model: nn.Module, operation: str, port: int, hook: nn.Module) -> Any:
    """Lets a hook change an operation's output; see :func:`hook_input`.

    :param model: the model; it is wrapped in place.
    :param operation: NNCF's name of the operation.
    :param port: which output.
    :param hook: is called with the output and returns what is used instead.
    """
    return HookHandle(model, register_post_function_hook(_with_mode(model), operation, port, hook), before=False)


def refuse_checkpointing(hook: nn.Module) -> None:
    """Lets a hook raise an error under gradient checkpointing: what runs again in the backward pass meets no hook.

    :param hook: of a model.
    """
    if _not_in_checkpoint not in hook._forward_pre_hooks.values():
        hook.register_forward_pre_hook(_not_in_checkpoint)


def _not_in_checkpoint(hook: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling() or not (hook.training or torch.is_grad_enabled()):
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            msg = (
                "gradient checkpointing runs layers again in the backward pass, without their masks, quantizers or "
                "factors, so gradients would be wrong. Switch it off while these are at work ("
                "model.gradient_checkpointing_disable(), model.set_grad_checkpointing(False)), or prune without masks: "
                '"schedule": "one_shot", or "shrink_every": 1.'
            )
            raise CompactPruneError(msg)
        frame = frame.f_back


def _wrapped(model: nn.Module) -> nn.Module:
    if is_nncf_network(model) and NNCF_HOOKS not in model._modules:
        watch_parameters(model, HookStorage())
    # accelerate's mixed precision wraps around NNCF's wrapper, which then is not to be seen any more
    if NNCF_HOOKS in model._modules:
        return model
    for module in _recurrent(model):
        module.register_forward_hook(_own_weights_again, always_call=True)
    wrapped: nn.Module = wrap_model(model)
    return wrapped


def _recurrent(model: nn.Module) -> list[nn.RNNBase]:
    return [module for module in model.modules() if isinstance(module, nn.RNNBase)]


def _own_weights_again(module: nn.Module, *_: Any) -> None:
    """NNCF (3.4) writes what hooks return into the list of weights that a recurrent layer keeps, for good."""
    names: list[str] = module._flat_weights_names  # type: ignore[assignment]
    module._flat_weights = [getattr(module, name, None) for name in names]  # type: ignore[assignment]


def _with_mode(model: nn.Module) -> nn.Module:
    if is_nncf_network(model):
        msg = (
            "Hooks on operations do not go with NNCF 2's create_compressed_model. Without NNCF_TORCH_LEGACY_TRACING=1, "
            "nncf_compactprune.create_compressed_model runs the same entry on NNCF 2.19."
        )
        raise CompactPruneError(msg)
    return _wrapped(model)


def remove_hooks(model: nn.Module, which: Callable[[nn.Module], bool] = lambda hook: True) -> None:
    """Takes hooks off, and NNCF's wrapper with the last one.

    :param model: the model, wrapped or not.
    :param which: whether a hook goes; all, by default.
    """
    if NNCF_HOOKS not in model._modules:
        return
    storage = get_hook_storage(model)
    for hook in hooks(model, shared=True):
        if which(hook.module):
            storage.delete_hook(hook.key)
    unwrap_if_empty(model)


def unwrap_if_empty(model: nn.Module) -> None:
    """Removes NNCF's wrapper from a model that has no hooks left, unless something else was wrapped around it since:
    then it stays, and passes calls through."""
    if NNCF_HOOKS not in model._modules or carries_hooks(model):
        return
    if is_nncf_network(model):
        unwatch_parameters(model)
        return
    if isinstance(model.forward, ForwardWithHooks):
        original = model.forward.orig_forward
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original  # the model came with a forward of its own
        del model._replicate_for_data_parallel
        del model._modules[NNCF_HOOKS]
        for module in _recurrent(model):
            for key in [key for key, hook in module._forward_hooks.items() if hook is _own_weights_again]:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def unseen_by_nncf() -> AbstractContextManager[object]:
    """Arithmetic inside a hook that NNCF's function mode need not look at: nothing hooks it, and looking takes time.

    Another function mode that is on (one that follows what becomes of parameters, say) still sees it.
    """
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    others = any(not isinstance(mode, FunctionHookMode) for mode in modes)
    return nullcontext() if others else torch._C.DisableTorchFunction()


def without_function_mode() -> AbstractContextManager[None]:
    """NNCF's function mode off; unlike :func:`unseen_by_nncf`, autograd functions may run inside."""
    return disable_function_hook_mode()  # type: ignore[no-any-return]


def nncf_graph(model: nn.Module, example_inputs: Any) -> Any:
    """NNCF's graph of a model, which is as it was afterwards.

    :param model: in the mode to run it in; no bare ``nn.Sequential``.
    :param example_inputs: a tensor, a tuple or a dict.
    :return: an ``nncf.common.graph.NNCFGraph``.
    """
    if is_nncf_network(model):
        return _graph_of_network(model, example_inputs)
    own_wrapper = not is_wrapped(model)
    try:
        return build_nncf_graph(wrap_model(model) if own_wrapper else model, example_inputs)
    finally:
        if own_wrapper:
            unwrap_if_empty(model)


def _graph_of_network(model: nn.Module, example_inputs: Any) -> Any:
    """The graph of NNCF 2's ``NNCFNetwork``: function mode is on for one run, hooks on parameters stay."""
    storage = model._modules.pop(NNCF_HOOKS, None)
    try:
        model.__dict__["forward"] = ForwardWithHooks(model)  # past NNCFNetwork's own __setattr__, which warns
        model.add_module(NNCF_HOOKS, HookStorage())
        return build_nncf_graph(model, example_inputs)
    finally:
        model.__dict__.pop("forward", None)
        del model._modules[NNCF_HOOKS]
        if storage is not None:
            model.add_module(NNCF_HOOKS, storage)


def write_graph(model: nn.Module, example_inputs: Any, path: Path) -> None:
    """Writes NNCF's graph of a model as a ``.dot`` file; see :func:`nncf_graph`.

    :param model: in the mode to run it in; no bare ``nn.Sequential``.
    :param example_inputs: a tensor, a tuple or a dict.
    :param path: of the file.
    """
    nncf_graph(model, example_inputs).visualize_graph(path)


@dataclass(frozen=True)
class Operation:
    """One operation of NNCF's graph.

    :param name: NNCF's.
    :param parameters: names of the parameters and buffers that go into it.
    :param module: the module that it runs in, by its whole name: NNCF's leaves out lists of modules and their indices.
    """

    name: str
    parameters: frozenset[str]
    module: str


def operations(model: nn.Module, example_inputs: Any) -> Iterator[Operation]:
    """Every operation of NNCF's graph; see :func:`nncf_graph`.

    :param model: in the mode to run it in; no bare ``nn.Sequential``.
    :param example_inputs: a tensor, a tuple or a dict.
    """
    with _noting_modules(model) as modules:
        graph = nncf_graph(model, example_inputs)
    for node in graph.get_all_nodes():
        constants = {getattr(before.layer_attributes, "name", "") for before in graph.get_previous_nodes(node)}
        path = ".".join(node.node_name.split("/")[:-2])
        yield Operation(node.node_name, frozenset(constants), modules.get(node.node_name, path))


@contextmanager
def _noting_modules(model: nn.Module) -> Iterator[dict[str, str]]:
    """Inside, NNCF's name of each operation that runs is noted, with the name of the module that it runs in."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    # the second is its name before NNCF 3
    method = next(m for m in ("get_next_op_call_name", "get_current_executed_op_name") if hasattr(FunctionHookMode, m))
    named = getattr(FunctionHookMode, method)

    def noting(mode: FunctionHookMode, function: str) -> str:
        operation: str = named(mode, function)
        found[operation] = names.get(id(mode.module_call_stack[-1]), "")
        return operation

    setattr(FunctionHookMode, method, noting)
    try:
        yield found
    finally:
        setattr(FunctionHookMode, method, named)


def _hook_parameters_in_tuples() -> None:
    """NNCF lets hooks see parameters among arguments and in lists of them, and passes over tuples: a mask of what
    ``torch.cat((a, b))`` joins did nothing, and no graph could be built."""
    process = FunctionHookMode.process_parameters

    def of_tuples_too(mode: FunctionHookMode, args: list[Any], kwargs: dict[str, Any]) -> Any:
        def hooked(value: Any) -> Any:
            return tuple(map(mode.execute_hooks_for_parameter, value)) if type(value) is tuple else value

        return process(mode, [hooked(value) for value in args], {name: hooked(value) for name, value in kwargs.items()})

    FunctionHookMode.process_parameters = of_tuples_too


_hook_parameters_in_tuples()
