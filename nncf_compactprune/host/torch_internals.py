"""What the package takes from torch's private modules: base classes of layers, dispatch modes, trees of values."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as RunningNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.conv import _ConvTransposeNd as TransposedConvolution
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

#: the dispatch key of operations that are made of other operations
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

#: how many objects inside each other may hold the tensors that a model returns
OBJECTS_DEEP = 4

#: operations inside are not seen by dispatch modes, which would cost many times what they do
unseen_by_modes = torch._C._DisableTorchDispatch


def original(function: Any) -> Callable[..., Any]:
    """A function of torch as function modes see it: NNCF 2's legacy tracing has put a wrapper in its place.

    :param function: such as ``torch.nn.functional.linear``.
    """
    unwrapped: Callable[..., Any] = getattr(function, "_original_op", function)
    return unwrapped


@contextmanager
def one_way_of_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` computes in one operation where no mode watches, and step by step under one. Inside, it
    always goes step by step, so that an analysis sees what a check runs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in any nesting of values.

    :param values: inputs or outputs of a model or an operation.
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def results_of(output: Any) -> list[Tensor]:
    """The tensors in what a model returns, those in dataclasses and in attributes of other objects, too. A cache is no
    result: the model reads it in its next call, and its channels go with those of the layers that fill it.

    :param output: any nesting; a cache is an object whose class or base is called so (``DynamicCache``).
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def look_at(value: Any, level: int) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif level < OBJECTS_DEEP and id(leaf) not in seen and not _is_no_result(leaf):
                seen.add(id(leaf))
                look_at(attributes_of(leaf), level + 1)

    look_at(output, 0)
    return found


def _is_no_result(value: Any) -> bool:
    return isinstance(value, (type, nn.Module)) or any(base.__name__.endswith("Cache") for base in type(value).__mro__)


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object of a Python class holds, by name; those of a dataclass in the order of its fields.

    :param value: anything; of numbers, strings and the like there is nothing.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(getattr(value, "__dict__", {}))


def answer_for_onnx2torch() -> None:
    """Lets modules of onnx2torch be exported: they ask torch's first exporter for the opset, in a place that newer
    torch has left. What they do with the answer is for that exporter alone."""
    helper = torch.onnx.symbolic_helper
    if not hasattr(helper, "_export_onnx_opset_version"):
        helper._export_onnx_opset_version = 18  # type: ignore[attr-defined]


__all__ = [
    "COMPOSITE",
    "BatchNorm",
    "Convolution",
    "RunningNorm",
    "TorchDispatchMode",
    "TracerWarning",
    "TransposedConvolution",
    "UninitializedBuffer",
    "UninitializedParameter",
    "answer_for_onnx2torch",
    "attributes_of",
    "one_way_of_attention",
    "original",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "results_of",
    "tensors_of",
    "tree_leaves",
    "tree_map",
    "tree_structure",
    "unseen_by_modes",
]
