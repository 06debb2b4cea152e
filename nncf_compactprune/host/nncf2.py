"""NNCF 2's own registry of algorithms, config schema and base classes, which a plugin must extend by hand.

Its schema is closed and put together at import, in two places; its statistics list the algorithms by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from nncf.api.compression import CompressionStage
from nncf.common.schedulers import BaseCompressionScheduler
from nncf.common.statistics import NNCFStatistics
from nncf.config import NNCFConfig, schema
from nncf.config.structures import BNAdaptationInitArgs, QuantizationRangeInitArgs
from nncf.parameters import StripFormat
from nncf.torch.algo_selector import PT_COMPRESSION_ALGORITHMS
from nncf.torch.composite_compression import PTCompositeCompressionAlgorithmController as CompositeController
from nncf.torch.compression_method_api import (
    PTCompressionAlgorithmBuilder,
    PTCompressionAlgorithmController,
    PTCompressionLoss,
)
from nncf.torch.graph.transformations.layout import PTTransformationLayout
from nncf.torch.initialization import wrap_dataloader_for_init
from nncf.torch.nncf_network import NNCFNetwork
from torch import nn

__all__ = [
    "BaseCompressionScheduler",
    "CompositeController",
    "CompressionStage",
    "NNCFConfig",
    "NNCFNetwork",
    "NNCFStatistics",
    "PTCompressionAlgorithmBuilder",
    "PTCompressionAlgorithmController",
    "PTCompressionLoss",
    "PTTransformationLayout",
    "StripFormat",
]


def register(name: str, builder: type) -> bool:
    """Makes an algorithm known to NNCF's config and to ``create_compressed_model``.

    :param name: its name in configs. Its own keys are checked by this package, so the schema takes any.
    :param builder: a ``PTCompressionAlgorithmBuilder``.
    :return: whether it is known now by this builder; NNCF's own algorithm of that name stays.
    """
    if name in PT_COMPRESSION_ALGORITHMS.registry_dict or name in schema.REF_VS_ALGO_SCHEMA:
        return False
    PT_COMPRESSION_ALGORITHMS.register(name)(builder)
    schema.REF_VS_ALGO_SCHEMA[name] = {
        "type": "object",
        "properties": {"algorithm": {"const": name}},
        "required": ["algorithm"],
    }
    known: Any = schema.NNCF_CONFIG_SCHEMA["properties"]["compression"]
    for one in {id(one): one for one in _alternatives(known)}.values():  # NNCF uses one list in both places
        one.append({"$ref": f"#/$defs/{name}"})
    return True


def _alternatives(part: Any) -> Iterator[list[Any]]:
    """Every list of algorithms in the schema's ``compression``: for an object, and for an array of objects."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "oneOf" and any("$ref" in one for one in value):
                yield value
            else:
                yield from _alternatives(value)
    elif isinstance(part, list):
        for value in part:
            yield from _alternatives(value)


def list_statistics() -> None:
    """Lets NNCF's statistics hold algorithms beside its own."""
    own_register, own_iter = NNCFStatistics.register, NNCFStatistics.__iter__

    def register_any(self: Any, algorithm_name: str, stats: Any) -> None:
        if hasattr(NNCFStatistics, algorithm_name):
            own_register(self, algorithm_name, stats)
        else:
            setattr(self, algorithm_name, stats)

    def iterate(self: Any) -> Iterator[tuple[str, Any]]:
        yield from own_iter(self)
        yield from ((name, value) for name, value in vars(self).items() if not hasattr(NNCFStatistics, name))

    NNCFStatistics.register, NNCFStatistics.__iter__ = register_any, iterate


def let_function_modes_through() -> None:
    """Lets NNCF's hooks run where a torch function mode is on, as in an analysis.

    Under a mode ``torch.nn.functional.relu`` is called once more through ``handle_torch_function``. NNCF replaces that
    one too, takes the whole call for one operation, and runs no hook inside: quantizers after a ReLU were left out.
    """
    for name in dir(torch.nn.functional):
        original = getattr(getattr(torch.nn.functional, name), "_original_op", None)
        if original is not None and "torch_function" in name:
            setattr(torch.nn.functional, name, original)


def example_inputs(model: Any) -> Any:
    """What an ``NNCFNetwork`` was traced with: a tuple of tensors, or a dict where they go by keyword; None where NNCF
    knows a function only, or both kinds at once."""
    infos = model.nncf.input_infos
    if infos is None:
        return None
    args, kwargs = infos.get_forward_inputs(next(model.parameters()).device)
    return None if args and kwargs else (kwargs or args)


class InitialData:
    """Batches of the loader that ``register_default_init_args`` put into an NNCF config.

    :param loader: NNCF's ``PTInitializingDataLoader``; it says what of a batch is input and what is target.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = wrap_dataloader_for_init(loader)

    @classmethod
    def of(cls, config: Any) -> InitialData | None:
        """The config's loader, or None."""
        for kind in (BNAdaptationInitArgs, QuantizationRangeInitArgs):
            if config.has_extra_struct(kind):
                return cls(config.get_extra_struct(kind).data_loader)
        return None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            args, kwargs = self._loader.get_inputs(batch)
            try:
                target = self._loader.get_target(batch)
            except NotImplementedError:
                target = None
            inputs = dict(kwargs) if kwargs else (args[0] if len(args) == 1 else tuple(args))
            yield (inputs, target)


def renew_graph(model: nn.Module) -> None:
    """NNCF's graph of an ``NNCFNetwork`` whose layers have changed.

    :param model: where it is no ``NNCFNetwork``, nothing happens.
    """
    if isinstance(model, NNCFNetwork):
        model.nncf.rebuild_graph()
