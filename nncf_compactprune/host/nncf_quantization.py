"""Where NNCF puts quantizers: the places (which activations share one) are its knowledge of what runtimes fuse."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.torch.quantization.layers import BaseQuantizer
from torch import nn

from nncf_compactprune.host.nncf_hooks import Hook, hooks


def quantizer_places(
    model: nn.Module, batches: Sequence[Any], *, target_device: str, ignored: Collection[str] = ()
) -> list[Hook]:
    """The quantizers that ``nncf.quantize`` puts on a copy of a model.

    :param model: stays as it is.
    :param batches: a few of its inputs. NNCF wants them; what it measures on them is not used.
    :param target_device: a name of ``nncf.TargetDevice``.
    :param ignored: NNCF's names of operations that are not quantized.
    :return: one hook of the copy for each quantizer.
    """
    with _quiet():
        quantized = nncf.quantize(
            copy.deepcopy(model),
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice[target_device],
            subset_size=len(batches),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=sorted(ignored), validate=False),
            advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    return [hook for hook in hooks(quantized) if isinstance(hook.module, BaseQuantizer)]


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF warns of few samples."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
