"""What the package takes from torch's private modules: base classes of layers, dispatch modes, trees of values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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
    "one_way_of_attention",
    "original",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "tensors_of",
    "tree_leaves",
    "tree_map",
    "tree_structure",
    "unseen_by_modes",
]
