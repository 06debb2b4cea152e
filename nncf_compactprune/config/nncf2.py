"""NNCF 2.x's grammar where it differs from today's: entries with keys of older versions, and what became of them.

A key of an older version is taken in the place of today's, with a warning that names today's. A key that nothing reads
any more is dropped with a warning that says why. Mistakes are still told under the name that the user wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from nncf_compactprune.config.reading import Finding, JsonPath, render, show
from nncf_compactprune.config.sections import AlgorithmConfig

_MISSING = object()

#: algorithms of NNCF's past that no entry can name any more, with the way from there
GONE = {
    "binarization": 'NNCF dropped it. Use "quantization", 8 bits being the least that runtimes gain from.',
    "movement_sparsity": 'NNCF dropped it. Use "filter_pruning" to shrink layers, or "magnitude_sparsity" for zeros.',
    "experimental_quantization": 'NNCF dropped it. Use "quantization", which is what it became.',
    "fracbits_quantization": 'NNCF dropped it. Use "quantization", or "data_free_quantization" for 4 to 8 bits.',
}
#: sections of the top level that are of NNCF's past
GONE_SECTIONS = {
    "bootstrapNAS": 'NNCF dropped its search for architectures. Use a pruning entry with "family" for networks of '
    "several sizes.",
}

#: of every entry
_LEFTOVERS = {
    "initializer.batchnorm_adaptation.num_bn_forget_samples": "statistics are averages over the samples, and forget "
    "what was before",
}


@dataclass(frozen=True)
class Spelling:
    """What a key of an older version says today.

    :param today: dotted path inside the entry.
    :param value: from the old value to today's; the same, where None.
    """

    today: str
    value: Callable[[Any], Any] | None = None


class Nncf2Entry(AlgorithmConfig):
    """An entry in NNCF 2.x's grammar. Its scopes may be names of NNCF 2.x.

    A subclass names in ``spellings`` keys of older versions, and in ``leftovers`` those that nothing reads any more,
    both by dotted path. A key of ``params`` may stand beside ``params``, and the other way round, with a warning.

    :param validate_scopes: a scope that matches nothing is a mistake.
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {}
    leftovers: ClassVar[Mapping[str, str]] = {}

    validate_scopes: bool = True


@dataclass
class Modernised:
    """An entry in today's spelling.

    :param entry: the entry.
    :param written: for each path that was moved, where the user wrote it.
    :param warnings: one a key, with the path as the user wrote it.
    :param findings: keys given in both spellings.
    """

    entry: dict[str, Any]
    written: dict[JsonPath, JsonPath] = field(default_factory=dict)
    warnings: list[Finding] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def as_written(self, path: JsonPath) -> JsonPath:
        """A path of :attr:`entry` in the user's words."""
        for today, old in self.written.items():
            if path[: len(today)] == today:
                return (*old, *path[len(today) :])
        return path


def modernised(entry: Mapping[str, Any], kind: type[AlgorithmConfig]) -> Modernised:
    """Brings an entry into today's spelling.

    :param entry: one entry of ``"compression"``, as it was read.
    :param kind: its configuration class. An entry that is not of NNCF 2.x's grammar stays as it is.
    """
    result = Modernised(copy.deepcopy(dict(entry)))
    if not issubclass(kind, Nncf2Entry):
        return result
    for path, reason in {**_LEFTOVERS, **kind.leftovers}.items():
        if _pop(result.entry, path) is not _MISSING:
            result.warnings.append((tuple(path.split(".")), f"nothing reads it any more: {reason}. It was left out."))
    for old, spelling in _old_places(result.entry, kind):
        _move(result, old, spelling)
    return result


def _old_places(entry: Mapping[str, Any], kind: type[Nncf2Entry]) -> Iterator[tuple[str, Spelling]]:
    """Old and today's path of every key of the entry that stands where it stood in an older version."""
    own, inner = kind.model_fields, _params_fields(kind)
    params = entry.get("params")
    for key in [*entry]:
        spelling = kind.spellings.get(key) or kind.spellings.get(f"params.{key}")
        if key not in own and (spelling or key in inner):
            yield key, spelling or Spelling(f"params.{key}")
    for key in [*params] if isinstance(params, dict) else []:
        spelling = kind.spellings.get(f"params.{key}")
        if spelling or (key not in inner and key in own):
            yield f"params.{key}", spelling or Spelling(key)


def _params_fields(kind: type[AlgorithmConfig]) -> Mapping[str, Any]:
    params = kind.model_fields.get("params")
    inner = None if params is None else params.annotation
    return inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else {}


def _move(result: Modernised, old: str, spelling: Spelling) -> None:
    written, today = tuple(old.split(".")), tuple(spelling.today.split("."))
    value = _pop(result.entry, old)
    target: Any = result.entry
    for step in today[:-1]:
        target = target.setdefault(step, {})
    if not isinstance(target, dict):
        return  # it is reported as what it is
    if today[-1] in target:
        result.findings.append((written, f"given twice, here and as {show(render(today))}. Keep that one."))
        return
    target[today[-1]] = value if spelling.value is None else spelling.value(value)
    result.written[today] = written
    result.warnings.append((written, f"an older spelling. Write {show(render(today))} today."))


def _pop(entry: dict[str, Any], path: str) -> Any:
    *parents, last = path.split(".")
    target: Any = entry
    for step in parents:
        target = target.get(step) if isinstance(target, dict) else None
    return target.pop(last, _MISSING) if isinstance(target, dict) else _MISSING
