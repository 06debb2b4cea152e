"""Pruned models on disk: weights as safetensors, the plan as JSON, and nothing that can run code.

``model.safetensors`` holds parameters and persistent buffers of the cut model under the names of the dense one, shared
tensors once. ``plan.json`` turns a freshly built dense model into the one that the weights fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nncf_compactprune.channels.groups import fingerprint
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import cut, plan_of
from nncf_compactprune.cut.transaction import transaction
from nncf_compactprune.errors import CompactPruneError, PlanError
from nncf_compactprune.host.tensors import carries_hooks, model_tensors, named_modules, temporary_buffers
from nncf_compactprune.host.torch_internals import UninitializedBuffer, UninitializedParameter
from nncf_compactprune.plan import Cost, PruningPlan
from nncf_compactprune.plan.reading import shown
from nncf_compactprune.plugins import Plugins

WEIGHTS_FILE = "model.safetensors"
PLAN_FILE = "plan.json"
# Where the plan waits while the weights are put in place.
NEXT_PLAN_FILE = "plan.json.next"
CONFIG_FILE = "config.json"
PLAN_DIGEST = "plan_sha256"
SHOWN_FINDINGS = 5
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
PathLike = str | os.PathLike[str]


def save_pruned(model: nn.Module, directory: PathLike, *, config: Mapping[str, Any] | None = None) -> Path:
    """Writes a model and the plan that made it, for :func:`load_pruned`.

    A save that is killed at any moment leaves a checkpoint that loads, the previous one or the new one. (It may also
    leave a ``.tmp`` file, which nothing reads.)

    :param model: a pruned model, or a dense one: its plan then keeps everything, and states no MACs.
    :param directory: is created if it does not exist.
    :param config: a JSON document to keep beside the model, as ``config.json``; replaced after the model.
    :return: the directory.
    :raises CompactPruneError: the model is in a state that weights and plan cannot hold (NNCF hooks, extra state,
        tensors without data, a shape that its plan did not make), or the directory cannot be written. The previous
        checkpoint is as it was.
    """
    folder = Path(directory)
    _refuse_hooks(model)
    tensors = _persistent(model)
    plan = _plan_to_save(model)
    text = plan.to_json().encode() + b"\n"
    document = None if config is None else _config_text(config)
    metadata = {"format": "pt", PLAN_DIGEST: plan_digest(text)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The new plan lies ready before the weights that need it; replacing the weights is the moment of change.
        with replacing(folder / WEIGHTS_FILE) as weights:
            save_file(_unshared(tensors), weights, metadata=metadata)
            write_file(folder / NEXT_PLAN_FILE, text)
        write_file(folder / PLAN_FILE, text)
        (folder / NEXT_PLAN_FILE).unlink(missing_ok=True)
        if document is not None:
            write_file(folder / CONFIG_FILE, document)
    except (OSError, SafetensorError) as error:
        msg = f"{folder}: the model cannot be written ({error}). Choose a directory that you may write to, with space."
        raise CompactPruneError(msg) from error
    return folder


def load_pruned(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    directory: PathLike,
    *,
    strict: bool = True,
    example_inputs: Any = None,
    plugins: Plugins | None = None,
) -> nn.Module:
    """Cuts a dense model to a saved plan and loads its weights, in place. The model is in evaluation mode afterwards.

    Plan and weights may come from anyone: all of both is checked before the model is touched. What cannot be told
    without running the model is whether layers still fit each other; give ``example_inputs`` to have that proven.

    .. code-block:: python

        model = load_pruned(lambda: timm.create_model("resnet50"), "out/resnet50")

    :param model_or_factory: the dense model as it was before any pruning (same architecture, options and dtype), or
        what builds it. Parameters keep their identity; device and memory format stay.
    :param directory: what :func:`save_pruned` wrote.
    :param strict: whether the file must hold exactly the model's tensors. Otherwise missing ones keep the values the
        model came with, cut, and unknown ones are passed over; shapes and dtypes must fit in any case.
    :param example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. With it, the cut model must run
        and compute what the masked dense model computes with the same weights, as after any pruning.
    :param plugins: where facts of modules come from; the installed plugins by default.
    :return: the model, in evaluation mode.
    :raises PlanError: no plan, or one that is malformed, made for another model, or does not fit together.
    :raises SelfCheckError: with ``example_inputs``, the cut model does not run or computes something else.
    :raises CompactPruneError: weights that are missing, damaged, or of other names, shapes or dtypes. After any of
        these errors a model that was passed is bit for bit what it was.
    """
    model = _dense_model(model_or_factory)
    _refuse_hooks(model)
    tensors = _persistent(model)
    folder = Path(directory)
    with _opened(folder / WEIGHTS_FILE) as file:
        plan = _read_plan(folder, model, (file.metadata() or {}).get(PLAN_DIGEST))
        stored = _check_weights(file, folder / WEIGHTS_FILE, model, plan, tensors, strict=strict)
        loaded = {name: file.get_tensor(key) for name, key in stored.items()}
    with transaction() as log:
        if example_inputs is None:
            cut(log, model, plan, plugins=plugins)
            # Copied: the memory of what was loaded is the file's own, and follows later changes of it.
            for name, value in loaded.items():
                log.set_data(tensors[name], torch.empty_like(tensors[name].data).copy_(value))
        else:
            for name, value in loaded.items():
                log.set_data(tensors[name], _placed(tensors[name].data, plan.selection(name), value))
            prune_in_place(model, plan, example_inputs, plugins=plugins)
    return model.eval()


def _dense_model(model_or_factory: Any) -> nn.Module:
    model = model_or_factory
    if callable(model) and not isinstance(model, nn.Module):
        model = model()
    if not isinstance(model, nn.Module):
        msg = f"load_pruned: expected a torch.nn.Module or a function that builds one, got {type(model).__name__}."
        raise CompactPruneError(msg)
    return model


# -- what is saved ---------------------------------------------------------------------------------------------------


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name that a plan knows them by, shared ones once."""
    everything = model_tensors(model)
    temporary = {id(buffer) for _, module in named_modules(model) for buffer in temporary_buffers(module)}
    return {name: _savable(name, tensor) for name, tensor in everything.named() if id(tensor) not in temporary}


def _refuse_hooks(model: nn.Module) -> None:
    if carries_hooks(model):
        msg = (
            f"checkpoint: {type(model).__name__} carries NNCF hooks (masks, quantizers or re-parameterised weights), "
            "which plan and weights do not hold. Strip it first (nncf.strip or controller.strip())."
        )
        raise CompactPruneError(msg)


def _plan_to_save(model: nn.Module) -> PruningPlan:
    tensors = model_tensors(model)
    for name, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            msg = f"save_pruned: {type(module).__name__} '{name}' has extra state, which only a pickle could hold."
            raise CompactPruneError(msg)
        if name and plan_of(module) is not None:
            msg = (
                f"save_pruned: '{name}' was pruned on its own, not as a part of {type(model).__name__}. Save that "
                "module, or replay its plan on it before loading (apply_plan)."
            )
            raise CompactPruneError(msg)
    plan = plan_of(model)
    if plan is None:
        count = sum(parameter.numel() for parameter in tensors.parameters.values())
        return PruningPlan({}, fingerprint(tensors.shapes()), before=Cost(0, count), after=Cost(0, count))
    now = tensors.shapes()
    for name, dims in plan.kept.items():
        for dim, positions in dims.items():
            if name not in now or dim >= len(now[name]) or now[name][dim] != len(positions):
                msg = (
                    f"save_pruned: '{name}' of shape {now.get(name)} is not what the pruning left, {len(positions)} "
                    f"channels in dimension {dim}. A model that was rebuilt since cannot be replayed from its plan."
                )
                raise CompactPruneError(msg)
    return plan


def _savable(name: str, tensor: Tensor) -> Tensor:
    lazy = isinstance(tensor, (UninitializedParameter, UninitializedBuffer))
    if lazy or tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in SAFETENSORS_NAMES:
        kind = "not initialised" if lazy else "on the meta device" if tensor.is_meta else f"{tensor.dtype}"
        msg = f"checkpoint: '{name}' is {kind}, expected a dense tensor with data. Run or convert the model first."
        raise CompactPruneError(msg)
    return tensor


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that overlap nowhere, as the format wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _config_text(config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(dict(config), indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"save_pruned: config: expected a JSON document, got one with a value that is none: {error}."
        raise CompactPruneError(msg) from error


# -- files -----------------------------------------------------------------------------------------------------------


def plan_digest(text: bytes) -> str:
    """SHA-256 of a plan's text without white space: line ends and indentation may change on the way."""
    return hashlib.sha256(b"".join(text.split())).hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a path beside the target; what is written there replaces the target whole, once it is on the disk."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(target: Path, content: bytes) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open weights file; its header is checked by then: sizes, offsets and the length of the file."""
    if not path.is_file():
        msg = f"{path}: no such file. Pass the directory that save_pruned wrote."
        raise CompactPruneError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        msg = f"{path}: is no safetensors file, or a damaged one ({shown(str(error))}). Save or copy it again."
        raise CompactPruneError(msg) from error


def _read_plan(folder: Path, model: nn.Module, digest: str | None) -> PruningPlan:
    """The plan that belongs to the weights, checked against the model.

    Weights name their plan by its digest; without one (weights that were written otherwise) ``plan.json`` is taken.
    """
    path = folder / PLAN_FILE
    text = None
    for candidate in (path, folder / NEXT_PLAN_FILE) if digest is not None else (path,):
        content = _bounded(candidate, model)
        if content is not None and digest in (None, plan_digest(content)):
            path, text = candidate, content
            break
    if text is None:
        found = "is not the one that the weights were saved with" if path.is_file() else "no such file"
        msg = f"{path}: {found}. Copy {PLAN_FILE} and {WEIGHTS_FILE} from the same save."
        raise PlanError(msg)
    try:
        plan = PruningPlan.from_json(text)
        plan.validate(model)
        plan.validate_consistency(model)
    except PlanError as error:
        msg = f"{path}: {error}"
        raise PlanError(msg) from error
    return plan


def _bounded(path: Path, model: nn.Module) -> bytes | None:
    """A file's content, if it is not far longer than any plan for this model can be; None where there is none."""
    limit = 2**20 + sum(
        4096 + 16 * len(name) + 32 * sum(shape) for name, shape in model_tensors(model).shapes().items()
    )
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        msg = f"{path}: cannot be read ({error})."
        raise PlanError(msg) from error
    if len(content) > limit:
        msg = f"{path}: expected at most {limit} bytes for {type(model).__name__}, got more. This is no plan for it."
        raise PlanError(msg)
    return content


# -- what is loaded --------------------------------------------------------------------------------------------------


def _check_weights(
    file: Any, path: Path, model: nn.Module, plan: PruningPlan, tensors: Mapping[str, Tensor], *, strict: bool
) -> dict[str, str]:
    """The file's name for each of the model's tensors, once names, shapes and dtypes are found to fit.

    Reads the header only. Other writers may have kept another name of a shared tensor.
    """
    tied = model_tensors(model).tied
    shapes = plan.shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    stored: dict[str, str] = {}
    unknown, wrong = [], []
    for key in file.keys():  # noqa: SIM118 - not a dict
        name = tied.get(key, key)
        if name not in tensors or name in stored:
            unknown.append(f"'{shown(key)}'")
            continue
        stored[name] = key
        header = file.get_slice(key)
        found = (header.get_dtype(), tuple(header.get_shape()))
        expected = (SAFETENSORS_NAMES[tensors[name].dtype], shapes[name])
        if found != expected:
            wrong.append(f"'{key}' (expected {_described(*expected)}, got {_described(*found)})")
    missing = [f"'{name}'" for name in tensors if name not in stored]
    findings = {"missing": missing if strict else [], "unknown": unknown if strict else [], "other": wrong}
    if any(findings.values()):
        words = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in findings.items() if names)
        msg = f"{path}: does not hold the weights of {type(model).__name__} after the cut. Tensors {words}. "
        msg += "Build the model with the same options and dtype that it was saved with."
        raise CompactPruneError(msg)
    return stored


def _described(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FINDINGS} more" if len(names) > SHOWN_FINDINGS else ""
    return ", ".join(names[:SHOWN_FINDINGS]) + more


def _placed(dense: Tensor, kept: Mapping[int, Tensor], value: Tensor) -> Tensor:
    """A copy of a dense tensor with the kept part replaced: what the cut will then select."""
    grid = [
        kept.get(dim, torch.arange(size)).to(dense.device).view([-1 if d == dim else 1 for d in range(dense.dim())])
        for dim, size in enumerate(dense.shape)
    ]
    result = dense.clone()
    result[tuple(grid)] = value.to(dense.device)
    return result
