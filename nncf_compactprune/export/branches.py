"""Values that a network reads while it runs, in an ``if`` or as a number: a trace keeps what the example gave.

Such a file computes something else as soon as another input takes the other branch, and no comparison on the example
shows it.
"""

from __future__ import annotations

import linecache
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.prepared import Prepared
from nncf_compactprune.host.torch_internals import TorchDispatchMode, TracerWarning, tensors_of

# How torch hands values of a tensor to Python.
_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
# Where the frames between a line of a network and its operation are: torch's, NNCF's hooks, and those of a warning.
_DISPATCH = (
    os.path.join("torch", "_"),
    os.path.join("torch", "utils", ""),
    os.path.join("torch", "function_hook", ""),
    f"{os.sep}warnings.py",
)
_REMEDY = (
    "Write it with torch.where, which every format takes. As a branch it goes into ONNX by torch.cond, "
    "and into OpenVINO in a module by torch.jit.script."
)


@dataclass(frozen=True)
class ValueRead:
    """A line that reads a value which depends on the input.

    :param file: of the line.
    :param line: its number.
    :param module: the innermost module that was running; empty for the model itself.
    """

    file: str
    line: int
    module: str

    @property
    def code(self) -> str:
        """The line itself."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def decides_nothing(self) -> bool:
        """Whether it only checks: what an ``assert`` reads is not computed with."""
        return self.code.startswith("assert ")

    def __str__(self) -> str:
        where = f"module '{self.module}'" if self.module else "the model"
        code = f" (`{self.code}`)" if self.code else ""
        return f"{where} reads a value that depends on the input, {os.path.relpath(self.file)}:{self.line}{code}"


def value_reads(ready: Prepared) -> tuple[ValueRead, ...]:
    """Every line that reads a value which depends on the model's input, in the order in which they run.

    :param ready: the model, which is run once.
    """
    watch = _Reads(ready.trace_inputs.tensors)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in ready.flat.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            hooks.callback(module.register_forward_pre_hook(watch.entering(name)).remove)
            hooks.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
        hooks.enter_context(watch)
        ready.flat.call(watch.inputs)
    return tuple(dict.fromkeys(read for read in watch.found if not read.decides_nothing))


@dataclass
class TracerWarnings:
    """What is warned of while a model is traced.

    :param places: files and lines of the network that torch's tracer warns of.
    :param others: warnings of other kinds.
    """

    places: set[tuple[str, int]]
    others: list[warnings.WarningMessage]


@contextmanager
def tracer_warnings() -> Iterator[TracerWarnings]:
    """Takes the body's warnings. A warning names the line that called the operation, which in a network with NNCF's
    hooks is always theirs; so the network's own line is looked up."""
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always", TracerWarning)
        taken, show = TracerWarnings(set(), others), warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: Any = None,
            line: Any = None,
        ) -> None:
            if issubclass(category, TracerWarning):
                taken.places.add(_place(sys._getframe(1)))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = note  # put back with the filters
        yield taken


def refuse_frozen_reads(whose: str, ready: Prepared, warned: TracerWarnings) -> None:
    """Refuses a trace that keeps a value which depends on the input.

    Tracers warn of every value that becomes Python's, sizes of tensors among them. Those are what they are for any
    input of the shape; so the model runs once more, untraced, where sizes are plain numbers and show no read.

    :param whose: the beginning of the message, such as ``OpenVINO could not convert the model``.
    :param ready: the model that was traced.
    :param warned: what was warned of meanwhile.
    :raises ExportError: naming module, file, line and remedy.
    """
    places = warned.places
    if places and (frozen := [read for read in value_reads(ready) if (read.file, read.line) in places]):
        raise refusal(whose, frozen)


def refusal(whose: str, reads: Sequence[ValueRead]) -> ExportError:
    """What to say of a network that reads values.

    :param whose: the beginning of the message.
    :param reads: at least one.
    """
    others = len(reads) - 1
    more = f" So {'does' if others == 1 else 'do'} {others} other line{'s' * (others > 1)}." if others else ""
    return ExportError(f"{whose}: {reads[0]}.{more} A file would keep what the example gave. {_REMEDY}")


class FromInputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is computed from the inputs.

    :param inputs: of the model, which is then run on copies of them, ``self.inputs``.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = [tensor.clone() for tensor in inputs]
        # Kept alive, because the number of a tensor that is gone is given to another one.
        self._derived: dict[int, Tensor] = {id(tensor): tensor for tensor in self.inputs}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the inputs."""
        return id(tensor) in self._derived

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tensors_of((args, kwargs))
        if any(tensor in self for tensor in given):
            name = func.name().partition(".")[0]
            self.taken_by(name)
            written = given[:1] if name.endswith("_") else []
            for tensor in (*written, *tensors_of(result)):
                self._derived[id(tensor)] = tensor
        return result

    def taken_by(self, operation: str) -> None:
        """An operation took something that was computed from the inputs."""


class _Reads(FromInputs):  # type: ignore[no-untyped-call]
    """Notes where Python is given a value that was computed from the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self.found: list[ValueRead] = []
        self._modules: list[str] = []

    def entering(self, name: str) -> Any:
        """A hook that notes which module runs."""
        return lambda *_: self._modules.append(name)

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook that notes that the last one ended."""
        self._modules.pop()

    def taken_by(self, operation: str) -> None:
        if operation not in _READS:
            return
        module = self._modules[-1] if self._modules else ""
        self.found.append(ValueRead(*_place(sys._getframe(2)), module))


def _place(frame: FrameType) -> tuple[str, int]:
    """File and line of the network that a frame was called from."""
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _DISPATCH):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
