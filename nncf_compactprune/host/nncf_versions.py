"""Which NNCF is installed, and what stands in for what an older one lacks.

=============================  ==================================  =========================================
needed                         NNCF 3                              NNCF 2.19
=============================  ==================================  =========================================
masks, factors                 function hooks                      function hooks; on an ``NNCFNetwork``
                                                                   ``host/nncf2_parameters.py``
BatchNorm adaptation           ``nncf.batch_norm_adaptation``      :func:`batch_norm_adaptation` below
graph names, ``quantize``      as they are                         the same, without legacy tracing
JSON config, controller        ``nncf_compactprune`` itself        NNCF's own, with legacy tracing:
                                                                   ``host/nncf2.py``
=============================  ==================================  =========================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import torch
from torch import nn

from nncf_compactprune.host.calls import call_model
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import BatchNorm

#: NNCF before 3.0, whose own JSON config and controller are still there
IS_NNCF_2 = int(nncf.__version__.split(".")[0]) < 3


def batch_norm_adaptation(model: nn.Module, batches: Sequence[Any]) -> None:
    """Runs batches through a model whose BatchNorms alone are in training mode, in place.

    :param model: whose running statistics change.
    :param batches: model inputs: tensors, tuples or dicts.
    """
    if hasattr(nncf, "batch_norm_adaptation"):
        nncf.batch_norm_adaptation(model, nncf.Dataset(batches))
        return
    with torch.no_grad(), _only_norms_train(model):
        for batch in batches:
            call_model(model, batch)


@contextmanager
def _only_norms_train(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for _, module in named_modules(model)}
    for module in modes:
        module.training = isinstance(module, BatchNorm)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
