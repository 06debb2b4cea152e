"""Preprocessing inside an OpenVINO file: images as they come, resized and normalised by the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino.preprocess import PrePostProcessor, ResizeAlgorithm
from torch import Tensor

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.options import Pixels
from nncf_compactprune.export.prepared import Array, Prepared

LARGEST = 255


def embedded(model: Any, pixels: Pixels) -> Any:
    """The model with preprocessing in front: u8 images ``[n, h, w, c]`` of any size.

    :param model: an ``openvino.Model`` with one input ``[n, c, h, w]``.
    :param pixels: how images are normalised.
    :raises ExportError: the model has other inputs.
    """
    shapes = [port.partial_shape for port in model.inputs]
    if len(shapes) != 1 or shapes[0].rank.get_length() != 4 or shapes[0][1].is_dynamic:
        msg = f"embed_preprocessing: expected one input [n, c, h, w], got {[str(shape) for shape in shapes]}."
        raise ExportError(msg)
    channels = shapes[0][1].get_length()
    mean, std = ([LARGEST * one for one in _spread(values, channels)] for values in (pixels.mean, pixels.std))
    processor = PrePostProcessor(model)
    tensor, steps = processor.input().tensor(), processor.input().preprocess()
    tensor.set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    processor.input().model().set_layout(openvino.Layout("NCHW"))
    if shapes[0][2].is_static and shapes[0][3].is_static:
        tensor.set_spatial_dynamic_shape()
        steps.resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    steps.convert_element_type(openvino.Type.f32).convert_layout(openvino.Layout("NCHW")).mean(mean).scale(std)
    return processor.build()


def verify_embedded(ready: Prepared, path: Path, tolerance: float) -> None:
    """Compares a file with torch on whole pixels of the model's own size.

    :param ready: the model.
    :param path: a file with preprocessing inside.
    :param tolerance: largest error, relative to the largest output.
    :raises ExportError: they differ by more.
    """
    pixels = ready.options.pixels
    if pixels is None:
        return
    pictures = pictures_of(ready.references[0].inputs.tensors[0], pixels)
    expected = ready.flat(normalised(pictures, pixels))
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(np.ascontiguousarray(pictures.numpy()))
    for at, name in enumerate(ready.output_names):
        _check(path, name, expected[at].numpy(), np.asarray(found[at]), tolerance)


def pictures_of(images: Tensor, pixels: Pixels) -> Tensor:
    """Whole pixels, u8 ``[n, h, w, c]``, as near as they come to a network's inputs ``[n, c, h, w]``.

    :param images: normalised.
    :param pixels: how.
    """
    mean, std = _per_channel(pixels, images.shape[1])
    whole = ((images * std + mean) * LARGEST).round().clamp(0, LARGEST).to(torch.uint8)
    return whole.permute(0, 2, 3, 1)


def normalised(pictures: Tensor, pixels: Pixels) -> Tensor:
    """A network's inputs ``[n, c, h, w]``, as torch computes them from whole pixels.

    :param pictures: u8 ``[n, h, w, c]``.
    :param pixels: how they are normalised.
    """
    mean, std = _per_channel(pixels, pictures.shape[3])
    return (pictures.permute(0, 3, 1, 2).float() / LARGEST - mean) / std


def _check(path: Path, name: str, expected: Array, got: Array, tolerance: float) -> None:
    error = float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-12))
    if not error <= tolerance:
        msg = (
            f"{path.name}: with its preprocessing, output '{name}' differs from torch by {error:.2e} of the largest "
            f"value, more than {tolerance:.0e}. Export without embed_preprocessing."
        )
        raise ExportError(msg)


def _per_channel(pixels: Pixels, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and std, ``[1, c, 1, 1]``."""
    mean, std = (torch.tensor(_spread(one, channels)).view(1, -1, 1, 1) for one in (pixels.mean, pixels.std))
    return mean, std


def _spread(values: tuple[float, ...], channels: int) -> list[float]:
    if len(values) not in (1, channels):
        msg = f"pixels: expected one value or {channels}, one for each channel, got {len(values)}."
        raise ExportError(msg)
    return list(values) * (channels if len(values) == 1 else 1)
