"""Inputs for a file that comes without any."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.prepared import ModelInputs
from nncf_compactprune.serving.server import Server


def noise_for(server: Server, batch: int, sample_size: Sequence[int] | None = None) -> ModelInputs:
    """Normal noise, or random bytes where a file takes whole numbers; the same at every call.

    :param server: says what the file takes.
    :param batch: how many samples.
    :param sample_size: the shape of an input without its batch, where the file leaves more than that open.
    :raises ExportError: when the file leaves more open and no sample size is given, or has no input of that size.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = []
    wanted = None if sample_size is None else tuple(sample_size)
    fits = [wanted is not None and _may_be(shape, wanted) for shape in server.input_shapes]
    if wanted is not None and not any(fits):
        shapes = " or ".join(",".join(str(side or "?") for side in shape[1:]) for shape in server.input_shapes)
        msg = f"{server.path}: --sample-size is {','.join(map(str, wanted))}, expected {shapes}, as in the file."
        raise ExportError(msg)
    for at, (name, shape, kind) in enumerate(
        zip(server.input_names, server.input_shapes, server.input_types, strict=True)
    ):
        rest = wanted if wanted is not None and fits[at] else shape[1:]
        if any(side is None for side in rest) or not shape or (shape == (None,) and sample_size is None):
            example = ",".join(str(side or 224) for side in shape[1:]) or "3,224,224"
            msg = f"{server.path}: input '{name}' has the open shape {list(shape)}. Say the size of a sample, without "
            msg += f"the batch, as in --sample-size {example}."
            raise ExportError(msg)
        size = (batch, *(side or 1 for side in rest))
        if kind.startswith("float"):
            tensors.append(torch.randn(size, generator=generator).to(getattr(torch, kind)))
        else:
            tensors.append(
                torch.randint(0, 2 if kind == "bool" else 100, size, generator=generator).to(getattr(torch, kind))
            )
    return ModelInputs(server.input_names, tuple(tensors), False, {})


def _may_be(shape: Sequence[int | None], sample_size: Sequence[int]) -> bool:
    """Whether a file's input, batch first, may have a sample's size."""
    if tuple(shape) == (None,):  # a file that does not say
        return True
    return len(shape) == len(sample_size) + 1 and all(
        side in (None, wanted) for side, wanted in zip(shape[1:], sample_size, strict=True)
    )
