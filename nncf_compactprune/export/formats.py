"""What a file format is: how a model is written to it, and how its files are opened in the runtime that serves them.

A format is a class that a plugin offers in ``compactprune_export_formats``; ONNX and OpenVINO come by the same door.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.foreign import conversion_reason, size_remedy
from nncf_compactprune.export.prepared import Array, Prepared, refuse_hooks, refuse_other_dtypes
from nncf_compactprune.export.unrounded import Range
from nncf_compactprune.plugins import Plugins, default_plugins


class NotLoadedError(ExportError):
    """A file that its runtime does not load.

    :param path: the file, for the message.
    :param runtime: the runtime's name.
    :param reason: why not, in sentences.
    """

    def __init__(self, path: Path, runtime: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.runtime, self.reason = runtime, reason


@dataclass(frozen=True)
class Session:
    """An opened file.

    :param runtime: the runtime's name, for messages.
    :param input_names: in the file's order.
    :param dynamic_batch: whether dim 0 of an input is open.
    :param arithmetic: ``fp32``, ``fp16``, or ``int8`` when the file holds fake quantizers.
    :param run: arrays in the file's order to output arrays in the file's order.
    :param input_shapes: of the inputs, None where a dimension is open; empty where the file does not say.
    :param input_types: NumPy's names of their types; empty where the file does not say.
    :param weights: shapes of the parameters by their names in the model; empty where the file has no such names.
    """

    runtime: str
    input_names: tuple[str, ...]
    dynamic_batch: bool
    arithmetic: str
    run: Callable[[Sequence[Array]], list[Array]]
    input_shapes: tuple[tuple[int | None, ...], ...] = ()
    input_types: tuple[str, ...] = ()
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class ExportFormat:
    """Base of the formats. A subclass names itself and implements :meth:`write` and :meth:`open`."""

    #: what configurations and ``formats=`` say
    name: ClassVar[str]
    #: what tables say
    title: ClassVar[str]
    #: what opens the files, for messages
    runtime: ClassVar[str]
    #: how its file names end, with the dot
    suffix: ClassVar[str]
    #: what it can be written in, the first where nothing is said
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    #: whether a directory gets its files where no formats are asked for
    by_default: ClassVar[bool] = True
    #: whether its files can leave the batch open; else they have a batch of 1 where none is asked for
    open_batch: ClassVar[bool] = True

    def parts(self, path: Path) -> list[Path]:
        """The files that one export may consist of, in the order in which they are put in place."""
        return [path]

    def needs(self, path: Path) -> list[Path]:
        """Those of its files without which a runtime does not load it."""
        return [path]

    def check_installed(self) -> None:
        """Refuses the format where a package that it needs is missing.

        :raises ExportError: with how to install it.
        """

    def refuse(self, model: nn.Module) -> None:
        """Refuses a model that could not be exported, before the long work.

        :raises ExportError: for NNCF hooks and other dtypes than float32, and where a package is missing.
        """
        self.check_installed()
        refuse_hooks(model, stripped_quantizers=False)
        refuse_other_dtypes(model)

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        """Writes the model, traced once, to one file for every precision.

        :param ready: the model behind a flat signature, and what to trace it with.
        :param paths: where to, by precision. Other files in these directories must be gone at the end.
        :raises ExportError: when the model cannot be exported.
        """
        raise NotImplementedError

    def finish(self, ready: Prepared, path: Path) -> None:
        """Adds to a file that was verified what changes its inputs, such as preprocessing, and verifies it again.

        :param ready: the model.
        :param path: the file, changed in place.
        """

    def open(self, path: Path) -> Session:
        """Opens a file on the CPU to compare values, in the arithmetic that it was written for."""
        raise NotImplementedError

    def open_unrounded(self, path: Path) -> tuple[Session, list[Range]] | None:
        """Opens a quantized file without its quantizers of activations, whose ranges are told beside it.

        :param path: the file.
        :return: None where a format does not know how; its quantized files are then judged by their largest error.
        """
        return None

    def open_timed(self, path: Path, inputs: Mapping[str, Array], device: str) -> Callable[[], object]:
        """Opens a file as it is deployed for single requests.

        :param path: the file.
        :param inputs: arrays by name, in call order; used by position when the file has other names.
        :param device: where it runs; here: only on the CPU.
        :return: one request on these inputs.
        :raises ExportError: when the device is not there, or the inputs do not fit.
        """
        if device.upper() != "CPU":
            msg = f"{path}: {self.runtime} has no device '{device}' here, it has ['CPU']."
            raise ExportError(msg)
        session = self.open(path)
        arrays = in_file_order(path, session.input_names, inputs)
        return lambda: session.run(arrays)


def of_batch(array: Array, size: int | None) -> Array:
    """As many rows as a file takes, the same ones again where there are too few.

    :param array: examples first.
    :param size: of the file's batch; None: open.
    """
    if size is None or not array.ndim or not len(array) or len(array) == size:
        return array
    return np.concatenate([array] * -(-size // len(array)))[:size]


def export_formats(plugins: Plugins | None = None) -> dict[str, ExportFormat]:
    """Every format by name, those first that are written without being asked for.

    :param plugins: where they come from; the installed plugins by default.
    """
    known = (plugins or default_plugins()).export_formats
    return {name: known[name]() for name in sorted(known, key=lambda name: (not known[name].by_default, name))}


def format_of(path: Path, plugins: Plugins | None = None) -> ExportFormat:
    """The format that a file name says.

    :param path: the file, there or not.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: when no format has its suffix; with the known ones and the nearest.
    """
    by_suffix = {one.suffix: one for one in export_formats(plugins).values()}
    if path.suffix not in by_suffix:
        hint = nearest(path.suffix, by_suffix)
        msg = f"{path}: expected a file name that ends in {' or '.join(by_suffix)}, got '{path.name}'.{hint}"
        raise ExportError(msg)
    return by_suffix[path.suffix]


def opened(path: Path, plugins: Plugins | None = None, shown_as: Path | None = None) -> Session:
    """Opens an existing file on the CPU to compare values.

    :param path: the file; its suffix says the format.
    :param plugins: where formats come from; the installed plugins by default.
    :param shown_as: the path for messages, of a file that is still in its staging place.
    :raises ExportError: when there is no such file, or its runtime does not load it.
    """
    kind = existing(path, plugins)
    try:
        return kind.open(path)
    except ExportError:
        raise
    except Exception as error:
        raise not_loaded(path, kind, error, shown_as) from error


def existing(path: Path, plugins: Plugins | None = None) -> ExportFormat:
    """The format of a file that is there.

    :param path: the file.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: when no format has its suffix, or there is no such file.
    """
    kind = format_of(path, plugins)
    if not path.is_file():
        msg = f"{path}: no such file."
        raise ExportError(msg)
    return kind


def not_loaded(path: Path, kind: ExportFormat, error: Exception, shown_as: Path | None = None) -> NotLoadedError:
    """What to say of a file that its runtime does not load.

    :param path: the file.
    :param kind: its format.
    :param error: what the runtime raised.
    :param shown_as: the path for the message, of a file that is still in its staging place.
    """
    missing = [part.name for part in kind.needs(path) if not part.is_file()]
    remedy = f" '{missing[0]}' is not beside it: copy it there." if missing else size_remedy(error)
    reason = f"{kind.runtime} cannot load it: {conversion_reason(error).rstrip('.')}.{remedy}"
    return NotLoadedError(shown_as or path, kind.runtime, reason)


def in_file_order(path: Path, names: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
    """Arrays in a file's order: by name where the names agree, else by position.

    :param path: the file, for the message.
    :param names: the file's inputs.
    :param inputs: arrays by name, in call order.
    :raises ExportError: when the numbers differ.
    """
    if len(names) != len(inputs):
        msg = f"{path}: takes {len(names)} inputs {list(names)}, got {len(inputs)}: {list(inputs)}."
        raise ExportError(msg)
    return [inputs[name] for name in names] if set(names) == set(inputs) else list(inputs.values())
