"""A model's tensors as safetensors: what can be saved, how it is written, whether a file fits a cut model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.tensors import NNCF_HOOKS, model_tensors, named_modules, temporary_buffers
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plan.reading import shown

SHOWN_FINDINGS = 5
#: what the header of a quantized network's weights says its quantizers by
QUANTIZERS = "quantizers"
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


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name that a plan knows them by, shared ones once."""
    everything = model_tensors(model)
    temporary = {id(buffer) for _, module in named_modules(model) for buffer in temporary_buffers(module)}
    return {name: _savable(name, tensor) for name, tensor in everything.named() if id(tensor) not in temporary}


def _savable(name: str, tensor: Tensor) -> Tensor:
    lazy = isinstance(tensor, (UninitializedParameter, UninitializedBuffer))
    if lazy or tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in SAFETENSORS_NAMES:
        kind = "not initialised" if lazy else "on the meta device" if tensor.is_meta else f"{tensor.dtype}"
        msg = f"checkpoint: '{name}' is {kind}, expected a dense tensor with data. Run or convert the model first."
        raise CompactPruneError(msg)
    return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; see :func:`~nncf_compactprune.storage.writing.whole_file` for one that appears whole.

    :param path: the file.
    :param tensors: by name, on any device; they may share memory.
    :param metadata: words for the header.
    """
    save_file(_apart(tensors), path, metadata=dict(metadata))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


@contextmanager
def opened_weights(path: Path) -> Iterator[Any]:
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


def names_of_quantizers(file: Any) -> frozenset[str]:
    """The tensors of a quantized network's hooks; none where the header tells of no quantizers.

    :param file: opened by safetensors.
    """
    if QUANTIZERS not in (file.metadata() or {}):
        return frozenset()
    return frozenset(name for name in file.keys() if name.startswith(f"{NNCF_HOOKS}."))  # noqa: SIM118 - not a dict


def stored_names(
    file: Any, path: Path, model: nn.Module, plan: PruningPlan, tensors: Mapping[str, Tensor], *, strict: bool
) -> dict[str, str]:
    """The file's name for each of the model's tensors, once names, shapes and dtypes are found to fit.

    Reads the header only. Other writers may have kept another name of a shared tensor.

    :param file: opened by safetensors.
    :param path: its path, for messages.
    :param model: dense.
    :param plan: what the cut will leave.
    :param tensors: the dense model's, by name.
    :param strict: whether every tensor must be there, and no other.
    :raises CompactPruneError: the file does not fit.
    """
    tied = model_tensors(model).tied
    shapes = plan.shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    stored: dict[str, str] = {}
    unknown, wrong = [], []
    of_quantizers = names_of_quantizers(file)  # which are read on their own
    for key in file.keys():  # noqa: SIM118 - not a dict
        if key in of_quantizers:
            continue
        name = tied.get(key, key)
        if name not in shapes or name in stored:
            unknown.append(f"'{shown(key)}'")
            continue
        stored[name] = key
        header = file.get_slice(key)
        found = (header.get_dtype(), tuple(header.get_shape()))
        expected = (SAFETENSORS_NAMES[tensors[name].dtype], shapes[name])
        if found != expected:
            wrong.append(f"'{key}' (expected {_described(*expected)}, got {_described(*found)})")
    missing = [f"'{name}'" for name in shapes if name not in stored]
    findings = {"missing": missing if strict else [], "unknown": unknown if strict else [], "other": wrong}
    if any(findings.values()):
        words = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in findings.items() if names)
        msg = f"{path}: does not hold the weights of {type(model).__name__} after the cut. Tensors {words}. "
        msg += "Build the model with the same options and dtype that it was saved with."
        raise CompactPruneError(msg)
    return stored


def placed(dense: Tensor, kept: Mapping[int, Tensor], value: Tensor) -> Tensor:
    """A copy of a dense tensor with the kept part replaced: what the cut will then select.

    :param dense: a tensor of any shape.
    :param kept: kept positions by dimension; all of a dimension that is not named.
    :param value: of the kept part's shape.
    """
    grid = [
        kept.get(dim, torch.arange(size)).to(dense.device).view([-1 if d == dim else 1 for d in range(dense.dim())])
        for dim, size in enumerate(dense.shape)
    ]
    result = dense.clone()
    result[tuple(grid)] = value.to(dense.device)
    return result


def _described(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FINDINGS} more" if len(names) > SHOWN_FINDINGS else ""
    return ", ".join(names[:SHOWN_FINDINGS]) + more
