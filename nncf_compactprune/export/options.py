"""What an export may be asked for beyond formats and precisions, and what files say about themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nncf_compactprune.errors import ExportError

OLDEST_OPSET, OLDEST_QUANTIZED_OPSET = 13, 18


class OpsetError(ExportError):
    """A model cannot be written in the opset that was asked for."""


@dataclass(frozen=True)
class Pixels:
    """How images become inputs: pixels / 255, minus mean, over std.

    :param mean: for each channel, or one for all.
    :param std: the same.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class ExportOptions:
    """Options of :func:`~nncf_compactprune.export.export_model` that few exports need.

    :param batch: a fixed batch size; None: open.
    :param dynamic_size: height and width of images stay open too.
    :param opset: of ONNX files; None: the exporter's own.
    :param external_data: ONNX weights in a file of their own, ``model.onnx.data``.
    :param labels: of the classes, in order; written into the files.
    :param pixels: written into the files.
    :param embed_preprocessing: OpenVINO files take images as they come, u8 ``[n, h, w, c]`` of any size, and resize and
        normalise them; needs ``pixels``.
    :param metadata: more to write into the files.
    """

    batch: int | None = None
    dynamic_size: bool = False
    opset: int | None = None
    external_data: bool = False
    labels: Sequence[str] = ()
    pixels: Pixels | None = None
    embed_preprocessing: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            msg = f"batch: expected 1 or more, got {self.batch}."
            raise ExportError(msg)
        if self.opset is not None and self.opset < OLDEST_OPSET:
            msg = f"opset: expected {OLDEST_OPSET} or more, got {self.opset}."
            raise OpsetError(msg)
        if self.embed_preprocessing and self.pixels is None:
            msg = "embed_preprocessing: needs pixels, the mean and std that images are normalised with."
            raise ExportError(msg)

    def properties(self) -> dict[str, str]:
        """What files say about themselves, as text."""
        said = dict(self.metadata)
        if self.labels:
            said["labels"] = "\n".join(self.labels)
        if self.pixels is not None:
            said |= {key: " ".join(map(str, getattr(self.pixels, key))) for key in ("mean", "std")}
        return said
