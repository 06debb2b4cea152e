"""What running a model leaves in it, and how it is taken back.

A forward pass may write: a memo in an attribute or a dict, a buffer, a counter, a position table built on demand, the
rows of an embedding with ``max_norm``. Such a mark of an analysis would outlive it: an analysis runs models with
zeros for results, with masks, and with fewer channels.

Taken back are: attributes, buffers, parameters and submodules that are added, replaced or removed; containers in
attributes, three levels deep; attributes of helper objects from the network's own package, and of its classes; what is
written into any of these tensors, also through a view or ``.data``; gradients, hooks and random states that the model
keeps. Values of ``functools.cached_property`` are computed anew inside and are back afterwards. Caches of
``functools.lru_cache`` (of methods, and of functions in the file of a network's class) cannot be put back: they are
emptied before and after. Not seen is what lies outside the model: other global variables, closures, files.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse, islice
from operator import is_
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import (
    TorchDispatchMode,
    UninitializedBuffer,
    UninitializedParameter,
    tensors_of,
)

LEVELS = 3
_LruCache = type(functools.lru_cache(lambda: None))
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size})
_HOLLOW = frozenset({dict, OrderedDict, list, set, deque})
_OF_EVERY_MODULE = tuple(vars(nn.Module()))  # first its flag, then containers
_LAZY = (UninitializedParameter, UninitializedBuffer)
_Undo = Callable[[], object]


class Marks:
    """Remembers a model's state, so that :meth:`undo` can bring it back.

    :param model: what will run.
    :param inputs: what it will run on, any nesting of tensors.
    :param contents: bring the contents of tensors back too.
    """

    def __init__(self, model: nn.Module, inputs: Any = None, *, contents: bool = True) -> None:
        self._contents = contents
        self._seen: set[int] = set()
        self._empty: list[Any] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._others: list[tuple[Any, Any]] = []
        self._states: list[_Undo] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        self._caches: list[Any] = []
        self.memory = Memory()
        modules = [module for _, module in named_modules(model) if not isinstance(module, torch.jit.ScriptModule)]
        classes = own_classes(modules)
        self._packages = {cls.__module__.partition(".")[0] for cls in classes}
        self._seen.update(map(id, modules))
        for module in modules:
            self._look_at_module(vars(module))
        for cls in classes:
            self._classes(cls)
        self._look_at_all(tensors_of(inputs), 0)
        self._caches += function_caches(classes)
        for live, name in cached_properties(modules):
            del live[name]
        self._clear_caches()

    def undo(self) -> None:
        """Brings everything back."""
        self.memory.undo()
        for tensor, data, grad, requires_grad in self._tensors:
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.dtype != data.dtype:
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
        for live in filter(None, self._empty):
            live.clear()
        for live, before in self._dicts:
            _restore_dict(live, before)
        for live, before in self._others:
            _restore(live, before)
        for restore in self._states:
            restore()
        self._clear_caches()

    def _clear_caches(self) -> None:
        for cache in self._caches:
            cache.cache_clear()

    def _look_at_all(self, values: Iterable[Any], level: int) -> None:
        plain, hollow, empty = _PLAIN, _HOLLOW, self._empty
        for value in values:
            kind = type(value)
            if kind in plain:
                continue
            if kind in hollow and not value:
                empty.append(value)
            elif id(value) not in self._seen:
                self._look_at(value, level)

    def _look_at(self, value: Any, level: int) -> None:
        """
        :param level: how many containers deep the value lies.
        """
        if isinstance(value, (tuple, frozenset)):
            self._look_at_all(value, level)
            return
        kind = type(value)
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._tensor(value)
        elif level == LEVELS:
            return
        elif isinstance(value, dict):
            self._look_at_dict(value, level + 1)
        elif isinstance(value, (list, set, deque)):
            self._others.append((value, value.copy()))
            self._look_at_all(value, level + 1)
        elif kind is _LruCache:
            self._caches.append(value)
        elif (state := random_state(value)) is not None:
            self._states.append(state)
        elif kind.__module__.partition(".")[0] in self._packages and hasattr(value, "__dict__"):
            self._look_at_dict(vars(value), level + 1)

    def _look_at_module(self, live: dict[str, Any]) -> None:
        before = dict(live)
        size = len(_OF_EVERY_MODULE)
        if tuple(islice(before, size)) != _OF_EVERY_MODULE:
            self._look_at_dict(live, 0)
            return
        self._dicts.append((live, before))
        values = list(before.values())
        self._empty += filterfalse(None, values[1:size])  # most of them: hooks of ten kinds
        self._look_at_all(filter(None, values[1:size]), 0)
        self._look_at_all(values[size:], 0)

    def _look_at_dict(self, live: dict[Any, Any], level: int) -> None:
        before = dict(live)
        self._dicts.append((live, before))
        self._look_at_all(before.values(), level)

    def _tensor(self, tensor: Tensor) -> None:
        # the exact type: isinstance runs Python code for these two classes
        if not self._contents or type(tensor) in _LAZY or tensor.layout is not torch.strided:
            return
        self._tensors.append((tensor, tensor.data, tensor.grad if tensor.is_leaf else None, tensor.requires_grad))
        self.memory.watch(tensor)

    def _classes(self, cls: type) -> None:
        before = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
        self._states.append(lambda: _restore_class(cls, before))
        self._look_at_all((v for v in before.values() if isinstance(v, (*_HOLLOW, Tensor))), 1)


class Memory:
    """The memory of watched tensors, copied before the first operation that writes into it."""

    def __init__(self) -> None:
        self._watched: dict[int, Any] = {}
        self._saved: list[tuple[Any, Any]] = []

    def watch(self, tensor: Tensor) -> None:
        """Watches the memory that a tensor lies in."""
        storage = tensor.untyped_storage()
        if address := storage.data_ptr():
            self._watched[address] = storage

    def undo(self) -> None:
        """Writes the old contents back."""
        for storage, before in self._saved:
            storage.copy_(before)
        self._saved.clear()

    def save(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Copies what an operation is about to write into.

        :param func: the operation.
        :param args: its positional arguments.
        :param kwargs: its keyword arguments.
        """
        for place, name in written_arguments(func) or written_statistics(func, args, kwargs):
            value = args[place] if place < len(args) else kwargs.get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                    storage = self._watched.pop(tensor.untyped_storage().data_ptr(), None)
                    if storage is not None:
                        self._saved.append((storage, storage.clone()))


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation before it writes. A subclass calls ``self.memory.save`` before it runs an operation.

    ``torch.cond`` and its kin pass as they are: their branches may not write.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = Memory()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.memory.save(func, args, kwargs)
        return func(*args, **kwargs)


@functools.cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operation may write into."""
    found = enumerate(func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ())
    return tuple((place, said.name) for place, said in found if said.alias_info and said.alias_info.is_write)


def written_statistics(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    """Place and name of the running statistics that a normalisation in training mode writes, and does not say so.

    :param func: the operation.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    """
    statistics, flag = _statistics_of(func)
    if not statistics:
        return ()
    training = args[flag] if flag < len(args) else kwargs.get("training", False)
    return statistics if training else ()


@functools.cache
def _statistics_of(func: Any) -> tuple[tuple[tuple[int, str], ...], int]:
    """Running statistics among an operation's arguments, and the place of the flag that says whether it trains."""
    names = [said.name for said in func._schema.arguments] if isinstance(func, torch._ops.OpOverload) else []
    if "training" not in names or "running_mean" not in names:
        return (), 0
    return tuple((names.index(name), name) for name in ("running_mean", "running_var")), names.index("training")


def own_classes(modules: Sequence[nn.Module]) -> list[type]:
    """The classes of modules and their bases, torch's and Python's own left out."""
    found = dict.fromkeys(base for cls in dict.fromkeys(map(type, modules)) for base in cls.__mro__)
    return [cls for cls in found if cls.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "typing")]


def function_caches(classes: Sequence[type]) -> list[Any]:
    """Caches of ``functools.lru_cache`` among the methods of classes and the functions of the files they come from."""
    spaces: list[Mapping[str, Any]] = [vars(cls) for cls in classes]
    spaces += [vars(sys.modules[name]) for name in {cls.__module__ for cls in classes} if name in sys.modules]
    found = []
    for space in spaces:
        for value in list(space.values()):
            # no other attribute is asked for: a stand-in for a package that is not installed may raise on any
            inner = value
            if isinstance(value, property):
                inner = value.fget
            elif isinstance(value, (staticmethod, classmethod, MethodType)):
                inner = value.__func__
            if type(inner) is _LruCache:
                found.append(inner)
    return found


def cached_properties(modules: Sequence[nn.Module]) -> Iterator[tuple[dict[str, Any], str]]:
    """Values of ``functools.cached_property``: the dict of a module that holds one, and its name there."""
    names = {
        cls: [n for base in cls.__mro__ for n, v in vars(base).items() if isinstance(v, functools.cached_property)]
        for cls in set(map(type, modules))
    }
    for module in modules:
        for name in names[type(module)]:
            if name in vars(module):
                yield vars(module), name


def forget_tables(modules: Iterable[nn.Module]) -> None:
    """Lets modules drop what they looked up in parameters for as long as they are in eval mode: timm's attention does
    so in ``train``. Training flags stay.

    :param modules: all modules of a model.
    """
    for module in modules:
        if type(module).train is not nn.Module.train:
            flags = [(part, part.training) for part in module.modules()]
            module.train()
            for part, training in flags:
                part.training = training


def memos(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """What a model keeps of its own weights for later, and would give back after they were cut.

    Caches of ``functools.lru_cache`` and tables (:func:`forget_tables`) are emptied here.

    :return: of every ``functools.cached_property`` that was read the dict that holds its value, and its name there.
    """
    modules = [module for _, module in named_modules(model)]
    forget_tables(modules)
    caches = [value for module in modules for value in vars(module).values() if type(value) is _LruCache]
    for cache in (*caches, *function_caches(own_classes(modules))):
        cache.cache_clear()
    return list(cached_properties(modules))


def random_state(value: Any) -> _Undo | None:
    """How to bring a source of random numbers back to where it is now; None: the value is none."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        own = value.getstate()
        return lambda: value.setstate(own)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    return None


def _restore_dict(live: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(live) != len(before) or not all(map(is_, live, before)):
        live.clear()
        live.update(before)
    elif not all(map(is_, live.values(), before.values())):
        live.update(before)


def _restore(live: Any, before: Any) -> None:
    if len(live) == len(before) and all(a is b for a, b in zip(live, before, strict=True)):
        return
    live.clear()
    (live.update if isinstance(live, set) else live.extend)(before)


def _restore_class(cls: type, before: Mapping[str, Any]) -> None:
    for name in [n for n in vars(cls) if not n.startswith("__")]:
        if name not in before:
            delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)
