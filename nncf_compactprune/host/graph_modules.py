"""``torch.fx.GraphModule`` as NNCF takes it: what converters from ONNX give, and ``torch.fx.symbolic_trace``.

NNCF sends a graph module to another backend, which has no function hooks, and a copy of one holds what its graph names
only: hooks get lost. So it is a plain module while it is compressed: the same object, with the same forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import GraphModule

from nncf_compactprune.host.tensors import carries_hooks

GRAPH_CLASS = "_nncf_compactprune_graph_class"


@contextmanager
def plain_or_back(model: nn.Module) -> Iterator[None]:
    """The model is a plain module from here on; it is a graph module again where the body fails.

    :param model: of any class; only graph modules change.
    """
    cls = type(model)
    # one that has a graph for each mode sets its forward anew when it changes the mode, which hooks would not see
    if isinstance(model, GraphModule) and cls.train is nn.Module.train:
        model.__class__ = type(cls.__name__, (nn.Module,), {"forward": cls.forward, GRAPH_CLASS: cls})
    try:
        yield
    except BaseException:
        back_to_graph_module(model)
        raise


def back_to_graph_module(model: nn.Module) -> None:
    """Undoes :func:`plain_or_back`, unless the model carries hooks, such as quantizers.

    :param model: of any class.
    """
    cls = getattr(type(model), GRAPH_CLASS, None)
    if cls is not None and not carries_hooks(model):
        model.__class__ = cls
