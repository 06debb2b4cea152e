"""Pruned Hugging Face models on disk: what ``save_pretrained`` writes, with the plan beside the weights.

A ``config.json`` has one width for all layers, a pruned network one for each. So:

- ``plan.json`` says what every layer keeps; the config names it by its digest.
- A field of the config is rewritten where the pruned network bears it out: every dimension that the field decides has
  been cut to the same width (found by building the network, without memory, with the field doubled), or every attention
  module says the same number of heads. All other fields stay those of the dense network.
- ``config.compactprune["dense"]`` keeps the dense values of what was rewritten, so that the dense network can be built
  from the same file. ``["plain"]`` says whether the rewritten config alone already builds the pruned network: then
  plain ``from_pretrained`` loads it too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nncf_compactprune.channels.tensors import model_tensors, named_modules
from nncf_compactprune.channels.trace import HEAD_COUNTS
from nncf_compactprune.checkpoint import CONFIG_FILE, PLAN_FILE, load_pruned, plan_digest, write_file
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.integrations.loading import require_package
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.surgery import plan_of

CONFIG_KEY = "compactprune"
Place = tuple[str, int | None]  # a field, or one item of a field that is a list


def save_pruned_pretrained(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """``model.save_pretrained(directory)``, and the plan beside it, for :func:`load_pruned_pretrained`.

    :param model: a pruned ``PreTrainedModel`` without hooks; its config is brought up to date in place.
    :return: the directory.
    :raises CompactPruneError: the model was not pruned.
    """
    describe(model)
    model.save_pretrained(directory)  # type: ignore[operator]
    write_plan_beside(model, directory)
    return Path(directory)


def load_pruned_pretrained(
    directory: str | PathLike[str], model_class: type[nn.Module] | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """``from_pretrained`` of a pruned model: builds the dense one from the config, cuts it, loads the weights.

    :param directory: what :func:`save_pruned_pretrained` wrote, or the callback beside a ``Trainer``'s checkpoint.
    :param model_class: default: the class that the config names.
    :param example_inputs: with it, the cut is proven on it, see :func:`nncf_compactprune.load_pruned`.
    :return: the model in evaluation mode, as ``from_pretrained`` gives it.
    :raises CompactPruneError: files are missing, damaged, or do not belong together.
    """
    transformers = require_package("transformers", "nncf-compactprune[transformers]")
    folder = Path(directory)
    path = folder / CONFIG_FILE
    if not path.is_file():
        msg = f"{path}: no such file. Pass the directory that save_pruned_pretrained wrote."
        raise CompactPruneError(msg)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path}: transformers cannot read it ({error}). Copy it again from where the model was saved."
        raise CompactPruneError(msg) from error
    said = _said(config, path)
    _check_digest(folder / PLAN_FILE, said["plan_sha256"])
    if model_class is None:
        model_class = _named_class(transformers, config, path)
    model: Any = model_class._from_config(dense_config(config), dtype=config.dtype)  # type: ignore[attr-defined]
    load_pruned(model, folder, example_inputs=example_inputs)
    model.config = config
    return model.eval()  # type: ignore[no-any-return]


def describe(model: nn.Module) -> None:
    """Brings the config of a pruned model up to date, in place; the rules are at the head of this module.

    :raises CompactPruneError: the model was not pruned, or is no Hugging Face model.
    """
    config: Any = getattr(model, "config", None)
    plan = plan_of(model)
    if plan is None or not hasattr(model, "save_pretrained") or config is None:
        kind = type(model).__name__
        msg = f"{kind}: expected a pruned PreTrainedModel. Prune it first, or call its own save_pretrained."
        raise CompactPruneError(msg)
    digest = plan_digest(plan.to_json().encode())
    if (getattr(config, CONFIG_KEY, None) or {}).get("plan_sha256") == digest:
        return
    dense = dense_config(config)
    fields = _true_fields(model, dense)
    said = {
        "plan_sha256": digest,
        "dense": {name: getattr(dense, name) for name in fields},
        "plain": _builds(type(model), dense, fields, model, plan),
    }
    for name, value in {**said["dense"], **fields, CONFIG_KEY: said}.items():
        setattr(config, name, value)


def write_plan_beside(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes ``plan.json`` of a pruned model.

    :raises CompactPruneError: it cannot be written.
    """
    plan = plan_of(model)
    if plan is not None:
        write_file(Path(directory) / PLAN_FILE, plan.to_json().encode() + b"\n")


def dense_config(config: Any) -> Any:
    """A copy of a config as it was before the pruning."""
    dense = copy.deepcopy(config)
    said = dense.__dict__.pop(CONFIG_KEY, None) or {}
    return _with_fields(dense, said.get("dense", {}))


# -- which fields are true ---------------------------------------------------------------------------------------------


def _true_fields(model: nn.Module, dense: Any) -> dict[str, Any]:
    """Fields of a dense config with the values that the pruned model bears out, where these differ."""
    kind = type(model)
    before, now = _shapes(kind, dense, {}), model_tensors(model).shapes()
    if before is None or before.keys() != now.keys():
        return {}
    fields: dict[str, Any] = {}
    for (name, at), value in _integers(dense):
        decided = _decided_by(kind, dense, (name, at), value, before)
        shares = {Fraction(now[parameter][dim], before[parameter][dim]) for parameter, dim in decided}
        if len(shares) == 1 and (new := value * shares.pop()) != value and new.denominator == 1:
            fields[name] = _placed(fields.get(name, getattr(dense, name)), at, int(new))
    return {**fields, **_head_counts(model, dense)}


def _decided_by(
    kind: type[nn.Module], dense: Any, place: Place, value: int, before: Mapping[str, tuple[int, ...]]
) -> set[tuple[str, int]]:
    """Parameter dimensions that grow with a field; none where the field changes more than widths."""
    name, at = place
    doubled = _shapes(kind, dense, {name: _placed(getattr(dense, name), at, 2 * value)})
    if doubled is None or doubled.keys() != before.keys():
        return set()
    return {
        (parameter, dim)
        for parameter, shape in before.items()
        for dim, (a, b) in enumerate(zip(shape, doubled[parameter], strict=False))
        if a != b
    }


def _head_counts(model: nn.Module, dense: Any) -> dict[str, int]:
    result = {}
    for attribute in HEAD_COUNTS:
        counts = {getattr(module, attribute) for _, module in named_modules(model) if hasattr(module, attribute)}
        if type(getattr(dense, attribute, None)) is int and len(counts) == 1 and type(new := counts.pop()) is int:
            if new != getattr(dense, attribute):
                result[attribute] = new
    return result


def _integers(config: Any) -> Iterator[tuple[Place, int]]:
    for name, value in config.to_dict().items():
        if type(value) is int and value > 1:
            yield (name, None), value
        elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            yield from (((name, at), item) for at, item in enumerate(value) if item > 1)


def _placed(field: Any, at: int | None, value: int) -> Any:
    return value if at is None else [*field[:at], value, *field[at + 1 :]]


def _with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    result = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def _build(kind: type[nn.Module], config: Any, fields: Mapping[str, Any]) -> nn.Module | None:
    """The network on the meta device, which costs no memory; None where the config does not make one."""
    try:
        with torch.device("meta"):
            return kind(_with_fields(config, fields))
    except Exception:  # whatever a config's or a network's own checks raise
        return None


def _shapes(kind: type[nn.Module], config: Any, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    built = _build(kind, config, fields)
    return None if built is None else model_tensors(built).shapes()


def _builds(
    kind: type[nn.Module], config: Any, fields: Mapping[str, Any], model: nn.Module, plan: PruningPlan
) -> bool:
    """Whether a config alone makes the model's shapes and counts of heads."""
    built = _build(kind, config, fields)
    if built is None or model_tensors(built).shapes() != model_tensors(model).shapes():
        return False
    return all(
        getattr(built.get_submodule(name), attribute) == value
        for name, values in plan.attributes.items()
        for attribute, value in values.items()
    )


# -- what a directory says -------------------------------------------------------------------------------------------


def _said(config: Any, path: Path) -> dict[str, Any]:
    said = getattr(config, CONFIG_KEY, None)
    if not isinstance(said, dict) or not isinstance(said.get("dense"), dict) or "plan_sha256" not in said:
        msg = f"{path}: does not speak of a pruned model. Load it with from_pretrained, or save it with "
        msg += "save_pruned_pretrained."
        raise CompactPruneError(msg)
    return said


def _check_digest(path: Path, expected: str) -> None:
    found = plan_digest(path.read_bytes()) if path.is_file() else None
    if found != expected:
        what = "no such file" if found is None else "is not the plan that the config speaks of"
        msg = f"{path}: {what}. Copy {PLAN_FILE} beside {CONFIG_FILE} from where the model was saved."
        raise CompactPruneError(msg)


def _named_class(transformers: Any, config: Any, path: Path) -> Any:
    names = config.architectures or [""]
    found = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        msg = f"{path}: names the class {json.dumps(names[0])}, which transformers does not have. Pass model_class."
        raise CompactPruneError(msg)
    return found
