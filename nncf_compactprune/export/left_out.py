"""What torch's exporters leave out of a quantized network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from nncf_compactprune.export.prepared import Prepared
from nncf_compactprune.host.nncf_hooks import hooks


@contextmanager
def hooks_that_run(ready: Prepared) -> Iterator[set[nn.Module]]:
    """The modules in NNCF's hooks that run in the body. Those behind SmoothQuant's do not where torch exports."""
    ran: set[nn.Module] = set()
    with ExitStack() as notes:
        for hook in hooks(ready.flat.model):
            notes.callback(hook.module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        yield ran


def hooks_left_out(ready: Prepared, exported: set[nn.Module]) -> int:
    """How many modules in NNCF's hooks the network runs and its exported program does not hold.

    :param ready: the model.
    :param exported: those that ran while it was exported.
    """
    if not hooks(ready.flat.model):
        return 0
    with hooks_that_run(ready) as needed, torch.no_grad():
        ready.flat(*(tensor.clone() for tensor in ready.trace_inputs.tensors))
    return len(needed - exported)
