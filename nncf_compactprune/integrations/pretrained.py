"""Pruned Hugging Face models on disk: what ``save_pretrained`` writes, with the plan beside the weights.

A ``config.json`` has one width for all layers, a pruned network one for each. So:

- ``plan.json`` says what every layer keeps; the config names it by its digest.
- A field of the config is rewritten where the pruned network bears it out: every dimension that the field decides has
  been cut to the same width (found by building the network, without memory, with the field doubled), or every attention
  module says the same number of heads, or the classifier was cut to some classes. All other fields stay those of the
  dense network.
- ``config.compactprune["dense"]`` keeps the dense values of what was rewritten, so that the dense network can be built
  from the same file. ``["plain"]`` says whether the rewritten config alone already builds the pruned network: then
  plain ``from_pretrained`` loads it too. ``["names"]`` says what the weights file calls the parameters that the plan
  cuts, where that differs, so that other versions of transformers find them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from nncf_compactprune.channels.terms import HEAD_COUNTS
from nncf_compactprune.cut.surgery import CONFIG_ATTRIBUTE, apply_plan, plan_of
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.huggingface import tied
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.host.tensors import NNCF_HOOKS, carries_hooks, model_tensors, named_modules
from nncf_compactprune.integrations.renamed_layers import as_named_here, names_to_save
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.storage.checkpoint import CONFIG_FILE
from nncf_compactprune.storage.plan_file import PLAN_FILE, plan_digest
from nncf_compactprune.storage.writing import whole_files, write_whole

# What transformers writes weights to, by their size.
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
Place = tuple[str, int | None]  # a field, or one item of a field that is a list


def save_pruned_hf(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """``model.save_pretrained(directory)``, and the plan beside it, for :func:`load_pruned_hf`.

    :param model: a pruned ``PreTrainedModel`` without hooks; its config is brought up to date in place.
    :param directory: is created if it does not exist.
    :return: the directory.
    :raises CompactPruneError: the model was not pruned, or carries hooks.
    :raises StorageError: the directory cannot be written. What was saved there before is as it was.
    """
    if carries_hooks(model):
        msg = (
            f"save_pruned_hf: {type(model).__name__} carries NNCF hooks (masks, quantizers), which Transformers does "
            "not load. Strip it first; keep a quantized network by save_pruned."
        )
        raise CompactPruneError(msg)
    describe(model)
    folder = Path(directory)
    with whole_files(folder, [PLAN_FILE], stale=WEIGHT_FILES) as new:
        model.save_pretrained(new)  # type: ignore[operator]
        (new / PLAN_FILE).write_bytes(_plan_text(model))
    return folder


def load_pruned_hf(
    directory: str | PathLike[str], *, model_class: type[nn.Module] | None = None, **options: Any
) -> nn.Module:
    """``from_pretrained`` of a pruned model: builds the dense one from the config, cuts it, loads the weights.

    :param directory: what :func:`save_pruned_hf` wrote, or the callback beside a ``Trainer``'s checkpoint.
    :param model_class: default: the class that the config names.
    :param options: for ``from_pretrained`` (``dtype``, ...).
    :return: the model, in evaluation mode.
    :raises CompactPruneError: files are missing, damaged, or do not belong together.
    """
    transformers = require_package("transformers", "nncf-compactprune[transformers]")
    folder = Path(directory)
    path = folder / CONFIG_FILE
    if not path.is_file():
        msg = f"{path}: no such file. Pass the directory that save_pruned_hf wrote."
        raise CompactPruneError(msg)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path}: transformers cannot read it ({error}). Copy it again from where the model was saved."
        raise CompactPruneError(msg) from error
    said = _said(config, path)
    plan = _read_plan(folder / PLAN_FILE, said["plan_sha256"])
    kind = model_class or _named_class(transformers, config, path)
    model = _from_pretrained(kind, plan, folder, dense_config(config), said.get("names", {}), **options)
    model.config = config
    return model  # type: ignore[no-any-return]


def fill(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Loads the weights of a ``Trainer``'s checkpoint into a model of that shape, in place.

    ``Trainer`` itself (transformers 5.23) passes over every tensor that ``save_pretrained`` wrote under a name of old,
    as it does for a ViT, with no more than a warning.

    :param model: dense, masked, or cut to the checkpoint's plan.
    :param directory: the checkpoint's folder.
    :raises CompactPruneError: the checkpoint does not hold this model's weights.
    """
    config: Any = model.config
    loaded = _from_pretrained(type(model), plan_of(model), Path(directory), dense_config(config), {}, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict(), strict=False)  # the masks, if any, follow from the compression's state


def _from_pretrained(
    kind: Any, plan: PruningPlan | None, folder: Path, config: Any, names: Mapping[str, str], **options: Any
) -> Any:
    try:
        model, info = _cut_when_built(kind, plan, names).from_pretrained(
            folder, config=config, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        msg = f"{folder}: the weights cannot be loaded into the pruned {kind.__name__}: {error}"
        raise CompactPruneError(msg) from error
    wrong = {what: sorted(str(name) for name in info[what]) for what in FAULTS if info.get(what)}
    if wrong:
        msg = f"{folder}: does not hold the weights of the pruned {kind.__name__}: {wrong}. Save or copy it again."
        raise CompactPruneError(msg)
    model.__class__ = kind
    for _, tensor in model_tensors(model).named():
        # What was loaded lies in the file's own memory, unaligned, where some kernels round otherwise.
        tensor.data = tensor.data.clone()
    return model


def _cut_when_built(kind: Any, plan: PruningPlan | None, names: Mapping[str, str]) -> Any:
    """A subclass whose networks are cut before ``from_pretrained`` fills them: transformers then does the rest, with
    its old names, its shards and its dtypes. The masks in a masked model's file are passed over."""

    tie = kind.tie_weights

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        if plan is not None:
            # On the CPU for the plan's own indices; the network is built on the meta device.
            with torch.device("cpu"), tied(self, tie):
                apply_plan(self, as_named_here(plan, names, self))

    passed_over = [*(kind._keys_to_ignore_on_load_unexpected or ()), re.escape(NNCF_HOOKS)]
    members = {"__init__": build, "__module__": kind.__module__, "_keys_to_ignore_on_load_unexpected": passed_over}
    return type(kind.__name__, (kind,), members)


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
    earlier = getattr(config, CONFIG_ATTRIBUTE, None) or {}
    if earlier.get("plan_sha256") == digest:
        return
    dense = dense_config(config)
    fields = _true_fields(model, dense)
    if len(dense.id2label) != len(config.id2label):  # the classifier was cut to some classes
        fields |= {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}
    said = {
        "plan_sha256": digest,
        "dense": {name: getattr(dense, name) for name in fields},
        "plain": _builds(type(model), dense, fields, model, plan),
    }
    if names := names_to_save(model, plan):
        said["names"] = names
    for name, value in (earlier.get("dense", {}) | fields | {CONFIG_ATTRIBUTE: said}).items():
        setattr(config, name, value)


def write_plan_beside(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Writes ``plan.json`` of a model, if it is pruned.

    :param model: any.
    :param directory: where its weights are.
    :raises StorageError: it cannot be written.
    """
    if plan_of(model) is not None:
        write_whole(Path(directory) / PLAN_FILE, _plan_text(model))


def _plan_text(model: nn.Module) -> bytes:
    plan = plan_of(model)
    return b"" if plan is None else plan.to_json().encode() + b"\n"


def dense_config(config: Any) -> Any:
    """A copy of a config as it was before the pruning."""
    dense = copy.deepcopy(config)
    said = dense.__dict__.pop(CONFIG_ATTRIBUTE, None) or {}
    fields = dict(said.get("dense", {}))
    if "id2label" in fields:  # JSON has no numbers for keys
        fields["id2label"] = {int(at): name for at, name in fields["id2label"].items()}
    return _with_fields(dense, fields)


# -- which fields are true ---------------------------------------------------------------------------------------------


def _true_fields(model: nn.Module, dense: Any) -> dict[str, Any]:
    """Fields of a dense config with the values that the pruned model bears out, where these differ."""
    kind = type(model)
    before, now = _shapes(kind, dense, {}), model_tensors(model).shapes()
    if before is None or before.keys() != now.keys():
        return {}
    fields: dict[str, Any] = {}
    places = dict(_integers(dense))
    for place, value in places.items():
        decided, together = _decided_by(kind, dense, [place], value, before), [place]
        if not decided:
            # Alone it changes more than widths: a shortcut of a ResNet is there where two widths differ.
            together = [other for other, equal in places.items() if equal == value]
            decided = _decided_by(kind, dense, together, value, before) if len(together) > 1 else set()
        shares = {Fraction(now[parameter][dim], before[parameter][dim]) for parameter, dim in decided}
        if len(shares) == 1 and (new := value * shares.pop()) != value and new.denominator == 1:
            for name, at in together:
                fields[name] = _placed(fields.get(name, getattr(dense, name)), at, int(new))
    return {**fields, **_head_counts(model, dense)}


def _decided_by(
    kind: type[nn.Module], dense: Any, places: Sequence[Place], value: int, before: Mapping[str, tuple[int, ...]]
) -> set[tuple[str, int]]:
    """Parameter dimensions that grow with fields of one value; none where they change more than widths."""
    fields: dict[str, Any] = {}
    for name, at in places:
        fields[name] = _placed(fields.get(name, getattr(dense, name)), at, 2 * value)
    doubled = _shapes(kind, dense, fields)
    if doubled is None or doubled.keys() != before.keys():
        return set()
    return {
        (parameter, dim)
        for parameter, shape in before.items()
        for dim, (a, b) in enumerate(zip(shape, doubled[parameter], strict=False))
        if a != b
    }


def _head_counts(model: nn.Module, dense: Any) -> dict[str, int]:
    """Counts of heads in which all attention modules agree, under the config's own name."""
    result: dict[str, int] = {}
    for attribute in HEAD_COUNTS:
        counts = {getattr(module, attribute, None) for _, module in named_modules(model)} - {None}
        stated = getattr(dense, attribute, None)
        if type(stated) is int and len(counts) == 1 and counts != {stated}:
            result[attribute] = int(counts.pop())  # type: ignore[arg-type]
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


def _builds(kind: type[nn.Module], config: Any, fields: Mapping[str, Any], model: nn.Module, plan: PruningPlan) -> bool:
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
    said = getattr(config, CONFIG_ATTRIBUTE, None)
    if not isinstance(said, dict) or not isinstance(said.get("dense"), dict) or "plan_sha256" not in said:
        msg = f"{path}: does not describe a pruned model. Load it with from_pretrained, or save it with "
        msg += "save_pruned_hf."
        raise CompactPruneError(msg)
    return said


def _read_plan(path: Path, expected: str) -> PruningPlan:
    text = path.read_bytes() if path.is_file() else None
    if text is None or plan_digest(text) != expected:
        what = "no such file" if text is None else "is not the plan that the config names"
        msg = f"{path}: {what}. Copy {PLAN_FILE} beside {CONFIG_FILE} from where the model was saved."
        raise CompactPruneError(msg)
    return PruningPlan.from_json(text)


def _named_class(transformers: Any, config: Any, path: Path) -> Any:
    names = config.architectures or [""]
    found = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        msg = f"{path}: names the class {json.dumps(names[0])}, which transformers does not have. Pass model_class."
        raise CompactPruneError(msg)
    return found
