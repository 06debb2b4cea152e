"""The errors a user can meet. Each is a :class:`nncf.ValidationError`, so host code that catches NNCF's sees ours.

A message says where, what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nncf


class CompactPruneError(nncf.ValidationError):  # type: ignore[misc]
    """Base of every mistake this package reports to its user."""


@dataclass(frozen=True)
class Problem:
    """One finding in a configuration.

    :param path: where, as a JSON path (``compression[0].params.round_to``); empty for the whole document.
    :param message: what was expected, what came, and the remedy.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(CompactPruneError):
    """A configuration is wrong. Carries every problem found, not only the first.

    :param source: the file name, or a word for where the configuration came from.
    :param problems: all findings, in document order.
    """

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class ResolveError(CompactPruneError):
    """The name of a model, weights file or dataset leads to nothing usable."""


class TraceError(CompactPruneError):
    """The model could not be run on the example input."""


class ScopeError(CompactPruneError):
    """An ignored or target scope matches nothing, or is no valid pattern."""


class BudgetError(CompactPruneError):
    """The floors make the budget unreachable. The message states the reachable minimum."""


class DataError(CompactPruneError):
    """The training loader does not give what an algorithm needs: samples, labels, gradients."""


class NothingPrunableError(CompactPruneError):
    """No channel group is left to prune. The message states why each was pinned."""


class PlanError(CompactPruneError):
    """A pruning plan does not fit the model, or is malformed."""


class SelfCheckError(CompactPruneError):
    """The pruned model did not compute what the masked model computed; the model was restored."""


class FixedAttributeError(SelfCheckError):
    """A module's attribute cannot be set to what it must be after a cut; the model was restored.

    :param module: its name, empty for the model itself.
    :param attribute: as ``num_heads``.
    """

    def __init__(self, module: str, attribute: str, message: str) -> None:
        super().__init__(message)
        self.module = module
        self.attribute = attribute


class RestoreError(CompactPruneError):
    """A model could not be put back whole after a change failed.

    :param failures: what is not as before, with the exception that came when it was to be put back.
    """

    def __init__(self, failures: Sequence[tuple[str, BaseException]]) -> None:
        self.failures = tuple(failures)
        shown = "\n  ".join(f"{what}: {type(error).__name__}: {error}" for what, error in self.failures)
        super().__init__(
            f"{len(self.failures)} changes could not be undone, all others are. Build the model anew or load it from "
            f"its file. Not as before:\n  {shown}"
        )


class DistillationError(CompactPruneError):
    """Teacher and student do not pair up."""


class StorageError(CompactPruneError):
    """A file cannot be written. What was there before is as it was.

    :param path: the file.
    :param reason: in the system's words, such as ``No space left on device``.
    :param remedy: what to do, in sentences.
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        self.path, self.reason, self.remedy = path, reason, remedy
        super().__init__(f"{path}: cannot be written ({reason}). {remedy}")


class ExportError(CompactPruneError):
    """A model could not be exported, or the file does not compute what the model computes."""


class QuantizationError(CompactPruneError):
    """A model cannot be quantized: no calibration samples, nothing in scope, or NNCF does not take it."""


class DataFreeError(CompactPruneError):
    """A network says too little of its own inputs, or its weights are no basis for compression without data."""


class UntrainedError(DataFreeError):
    """Inputs are to be generated from the statistics of a network that was never trained."""


class PluginError(CompactPruneError):
    """A plugin is misspelt, duplicates a name, or does not load."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a message that quotes it; empty where it says nothing.

    :param error: another package's, whose further lines are advice or places in its code.

    >>> first_line(RuntimeError("too small\\nSee the manual."))
    'too small'
    """
    return next(iter(str(error).strip().splitlines()), "")


def shortened(names: Sequence[str]) -> str:
    """The first five names in quotation marks, and how many more.

    :param names: of layers or parameters.

    >>> shortened(["conv1", "conv2"])
    "'conv1', 'conv2'"
    """
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the closest known name, or an empty string.

    >>> nearest("glboal", ["uniform", "global"])
    " Did you mean 'global'?"

    :param name: what was given.
    :param known: the valid names.
    """
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
