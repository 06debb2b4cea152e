"""Other people's exporters: silent while they succeed, quoted when they fail."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.branches import ValueRead, refusal, value_reads
from nncf_compactprune.export.prepared import FlatModel, Prepared, reason_of
from nncf_compactprune.host.torch_internals import TorchDispatchMode

_FOREIGN = (
    "torch", "torchao", "executorch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "optimum",
    "transformers",
)  # fmt: skip
# Says for each of torchvision's operations that torchvision is not there, whatever the model.
_REGISTRATION = "torch.onnx._internal.exporter._registration"
_OPERATION = re.compile(r"op='(?P<dotted>\w+\.\w+)|(?P<colons>[a-z_]\w*::\w+)|torch\.ops\.(?P<torch>\w+\.\w+)")
# torch.export's, for a branch or a number that depends on the input's values
_READS_VALUES = {"GuardOnDataDependentSymNode", "UserError", "Unsupported"}
# torch.export's, its ONNX exporter's and OpenVINO's, for a size that is a constant to the network or to an operation
# (its groups)
_SIZES = ("user-specified ranges and inferred ranges", "SymbolicTensor", "dynamic weights shape")
_QUOTED_LINES = 20
_TELLING = 4  # letters of a name that tell it from others


class _Keeper(logging.Filter):
    """Keeps what foreign loggers say from being printed.

    :param kept: where to write it instead.
    """

    def __init__(self, kept: io.StringIO) -> None:
        super().__init__()
        self._kept = kept

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is ours to show."""
        if record.name.partition(".")[0] not in _FOREIGN:
            return True
        if record.name != _REGISTRATION:
            self._kept.write(f"{record.getMessage()}\n")
        return False


@contextmanager
def exporting(whose: str, ready: Prepared, remedy: str = "") -> Iterator[None]:
    """Runs an exporter without its noise.

    :param whose: the beginning of the message, such as ``OpenVINO could not convert the model``.
    :param ready: what is exported.
    :param remedy: what to do whatever went wrong, in a sentence.
    :raises ExportError: when it fails: with the operation that it does not take, the module that runs it, the cause,
        and the last lines of what it printed.
    """
    kept = io.StringIO()
    try:
        with keeping(kept):
            yield
    except Exception as error:
        if {type(error).__name__, type(error.__cause__).__name__} & _READS_VALUES and (reads := _reads(ready)):
            raise refusal(whose, reads) from error
        lines = list(dict.fromkeys(line.rstrip() for line in kept.getvalue().splitlines() if line.strip()))
        said = "".join(f"\n    {line}" for line in lines[-_QUOTED_LINES:])
        place = _place(error, ready) + (size_remedy(error) if ready.dynamic_batch else "")
        more = f"{place}{f' {remedy}' if remedy else ''}{f' It said:{said}' if said else ''}"
        msg = f"{whose}: {conversion_reason(error)}.{more}"
        raise ExportError(msg) from error


@contextmanager
def keeping(kept: io.StringIO | None = None) -> Iterator[None]:
    """Keeps what other packages log and print in Python.

    :param kept: where it is written instead; nowhere by default.
    """
    kept = io.StringIO() if kept is None else kept
    with ExitStack() as stack:
        keeper = _Keeper(kept)
        for handler in _handlers():
            handler.addFilter(keeper)
            stack.callback(handler.removeFilter, keeper)
        stack.enter_context(redirect_stdout(kept))
        stack.enter_context(redirect_stderr(kept))
        stack.enter_context(warnings.catch_warnings())
        # torch's own deprecation, raised while it copies its own tree specs
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.`", FutureWarning)
        yield


def is_foreign(filename: str) -> bool:
    """Whether a source file belongs to one of the packages whose noise is kept.

    :param filename: of a warning.
    """
    _, installed, inside = filename.replace(os.sep, "/").rpartition("/site-packages/")
    return bool(installed) and inside.partition("/")[0] in _FOREIGN


@contextmanager
def natively_quiet() -> Iterator[None]:
    """Drops what compiled code writes to the process's standard error, past Python."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def conversion_reason(error: BaseException) -> str:
    """The last cause of an exporter's error, and the first line that names an operation where that is another one."""
    cause = reason_of(error)
    line = _operation_line(error)
    if line is None or line in cause:
        return cause
    kind, _, first = cause.partition(": ")
    return f"{kind}: {line}" if first.startswith("Check '") else f"{cause} ({line})"


def _operation_line(error: BaseException) -> str | None:
    """The first line that names an operation, of the innermost cause that has one."""
    found: str | None = None
    current: BaseException | None = error
    while current is not None:
        lines = (line.strip().removeprefix("-- ").rstrip(".") for line in str(current).splitlines())
        named = [line for line in lines if _OPERATION.search(line)]
        # A constant only follows from the operation that could not take it.
        found = next((line for line in named if "prim::" not in line), next(iter(named), found))
        current = current.__cause__
    return found


def size_remedy(error: BaseException) -> str:
    """What to do where a network makes a size its own that was to stay open; empty for any other error."""
    if not any(words in str(error) for words in _SIZES):
        return ""
    return (
        " The network fixes a size that was to stay open. Ask for one batch size: batch=1, in a config "
        '"batch": 1 under "export".'
    )


def _reads(ready: Prepared) -> tuple[ValueRead, ...]:
    """The lines that read values; none where the model cannot be watched (torch's ``scan``)."""
    try:
        return value_reads(ready)
    except Exception:  # the reason must not be lost to the search for a place
        return ()


def _place(error: BaseException, ready: Prepared) -> str:
    """The module that runs the operation which an error names, in words; empty where none is found."""
    named = _OPERATION.search(_operation_line(error) or "")
    if named is None:
        return ""
    operation = re.split(r"\.|::", next(group for group in named.groups() if group))[-1]
    try:
        with torch.no_grad():
            where = _running(ready.flat, ready.trace_inputs.tensors, operation)
    except Exception:  # the reason must not be lost to the search for a place
        return ""
    return "" if where is None else f" Module '{where}' runs it."


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls back with the name of every operation."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def _running(flat: FlatModel, inputs: Sequence[Tensor], operation: str) -> str | None:
    """The innermost module in which an operation runs first. An exporter may name a part of what torch runs as one
    operation (``linalg_eig`` of ``linalg_eigvals``), so a longer or shorter name counts where no equal one is met."""
    stack: list[str] = []
    equal: list[str] = []
    alike: list[str] = []

    def seen(name: str) -> None:
        ours, theirs = name.strip("_"), operation.strip("_")
        if stack and ours == theirs:
            equal.append(stack[-1])
        elif stack and min(len(ours), len(theirs)) >= _TELLING and (theirs.startswith(ours) or ours.startswith(theirs)):
            alike.append(stack[-1])

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda *_: stack.append(name)

    with ExitStack() as hooks:
        for name, module in flat.model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter(name or type(module).__name__)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True).remove)
        hooks.enter_context(_Watch(seen))
        flat.call([tensor.clone() for tensor in inputs])
    return next(iter([*equal, *alike]), None)


def _handlers() -> list[logging.Handler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = [handler for one in loggers if isinstance(one, logging.Logger) for handler in one.handlers]
    return list(dict.fromkeys([*found, *([logging.lastResort] if logging.lastResort else [])]))
