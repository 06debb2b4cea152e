"""Named models: ``timm:NAME``, ``hf:MODEL_TYPE`` or ``hf:PATH``, ``torchvision:NAME``, ``python:module:function``,
``onnx:FILE``.

Models are built from code or a file, never downloaded, and come with example inputs from their own data config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nncf_compactprune.errors import ResolveError, nearest
from nncf_compactprune.host.huggingface import image_classifiers
from nncf_compactprune.host.packages import load_function, pick, require_package
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.plugins.hookspecs import hookimpl
from nncf_compactprune.run.onnx_files import read_onnx
from nncf_compactprune.storage.weights import write_tensors
from nncf_compactprune.storage.writing import whole_file

if TYPE_CHECKING:
    from os import PathLike

ExampleInputs = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
IMAGENET_SHAPE = (3, 224, 224)
SHOWN_KEYS = 5


@dataclass(frozen=True)
class ResolvedModel:
    """A dense model and what it is run on.

    :param name: the name it was resolved from.
    :param model: the model, on the CPU, in evaluation mode.
    :param example_inputs: one float32 batch: a tensor, a tuple of tensors, or keyword arguments by name.
    :param mean: what the network wants subtracted from each image channel, for pixels in [0, 1]; None: it does not say.
    :param std: what it wants each channel divided by after that.
    """

    name: str
    model: nn.Module
    example_inputs: ExampleInputs
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def resolve_model(
    name: str,
    *,
    sample_size: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    weights: str | PathLike[str] | None = None,
    plugins: Plugins | None = None,
) -> ResolvedModel:
    """Builds the model that a name stands for.

    :param name: ``scheme:rest``, such as ``timm:fbnetv3_b`` or ``python:my_module:my_function``.
    :param sample_size: shape of the example input, batch included; the model's own data config decides by default.
    :param options: keyword options handed to the model's builder (``{"num_classes": 10}``).
    :param weights: a safetensors file to load.
    :param plugins: where schemes come from; the installed plugins by default.
    :raises ResolveError: if the scheme, the name, an option or the weights do not fit.
    """
    scheme, separator, rest = name.partition(":")
    schemes = (plugins or default_plugins()).models
    if not separator or not rest:
        msg = f"'{name}' names no model. Write SCHEME:NAME, with SCHEME one of: {', '.join(sorted(schemes))}."
        raise ResolveError(msg)
    resolved = pick("model scheme", scheme, schemes)(rest, **(options or {}))
    if not isinstance(resolved, ResolvedModel):
        msg = f"Model '{name}': expected a ResolvedModel, got {type(resolved).__name__}."
        raise ResolveError(msg)
    if sample_size is not None:
        resolved = replace(resolved, example_inputs=_resized(resolved.example_inputs, sample_size, name))
    if weights is not None:
        load_weights(resolved.model, weights)
    resolved.model.eval()
    return replace(resolved, name=name)


def load_weights(model: nn.Module, path: str | PathLike[str]) -> None:
    """Loads a safetensors file into a model whose parameters have exactly its names and shapes.

    BatchNorm's batch counters may be absent: many published files leave them out, and evaluation never reads them.

    :param model: filled in place.
    :param path: the file.
    :raises ResolveError: if the file is missing or no safetensors file, or names or shapes differ; the model is then
        unchanged.
    """
    file = Path(path)
    if not file.is_file():
        msg = f"No such weights file: {file}"
        raise ResolveError(msg)
    try:
        loaded = load_file(file)
    except (SafetensorError, OSError) as error:
        msg = f"{file} is not a safetensors file ({error}). Pickled weights are not read: convert them with "
        msg += "safetensors.torch.save_file(model.state_dict(), path)."
        raise ResolveError(msg) from error
    expected = model.state_dict()
    # safetensors stores tied tensors once, under any one of their names.
    stored = {expected[name].data_ptr() for name in loaded if name in expected}
    missing = [
        name
        for name, tensor in expected.items()
        if name not in loaded and not name.endswith("num_batches_tracked") and tensor.data_ptr() not in stored
    ]
    unexpected = [name for name in loaded if name not in expected]
    reshaped = [
        f"{name} (model {list(expected[name].shape)}, file {list(tensor.shape)})"
        for name, tensor in loaded.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    findings = [
        f"{label}: {_shortened(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if findings:
        msg = f"{file} does not fit the model. Tensors {'; '.join(findings)}. Was it saved from this architecture?"
        raise ResolveError(msg)
    model.load_state_dict(loaded, strict=False)


def save_weights(model: nn.Module, path: str | PathLike[str]) -> Path:
    """Writes a model's parameters and buffers as safetensors, tied tensors once: what :func:`load_weights` reads.

    :param model: any.
    :param path: its directory is created if it does not exist.
    :return: the path.
    :raises StorageError: if the file cannot be written.
    """
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    with whole_file(Path(path)) as temporary:
        write_tensors(temporary, tensors, {})
    return Path(path)


def timm_model(rest: str, **options: Any) -> ResolvedModel:
    """Builds ``timm.create_model(rest, **options)``, untrained unless the options say ``pretrained``.

    :param rest: timm's name of the model.
    :param options: its keyword arguments (``{"num_classes": 10}``).
    """
    timm = require_package("timm", "nncf-compactprune[timm]")
    if not timm.is_model(rest):
        msg = f"timm has no model '{rest}'.{nearest(rest, timm.list_models())}"
        raise ResolveError(msg)
    model = _build(f"timm:{rest}", lambda: timm.create_model(rest, **options))
    shape = _image_shape(model.pretrained_cfg.get("input_size", IMAGENET_SHAPE))
    shape = (options.get("in_chans", shape[0]), *_pair(options.get("img_size", shape[1:])))
    mean, std = (_numbers(model.pretrained_cfg.get(key)) for key in ("mean", "std"))
    return ResolvedModel(f"timm:{rest}", model, _image(shape), mean, std)


def hf_model(rest: str, **options: Any) -> ResolvedModel:
    """Builds a Hugging Face image classifier from a config.

    :param rest: a model type (``resnet``), a ``config.json``, or a folder with one.
    :param options: config fields to set (``{"num_labels": 10}``).
    """
    transformers = require_package("transformers", "nncf-compactprune[transformers]")
    known = image_classifiers()
    path, name = Path(rest), f"hf:{rest}"
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        config = _build(name, lambda: transformers.AutoConfig.from_pretrained(path, **options))
    elif rest in known:
        config = _build(name, lambda: transformers.AutoConfig.for_model(rest, **options))
    else:
        msg = f"'{rest}' is neither an image classification model type of transformers nor the path of a config.json."
        msg += f"{nearest(rest, known)} Nothing is downloaded: for a hub model, save its config.json and weights."
        raise ResolveError(msg)
    model = _build(name, lambda: transformers.AutoModelForImageClassification.from_config(config))
    channels = getattr(config, "num_channels", None) or IMAGENET_SHAPE[0]
    size = _pair(getattr(config, "image_size", None) or IMAGENET_SHAPE[1:])
    mean, std = _processor(path.parent / "preprocessor_config.json")
    return ResolvedModel(name, model, {model.main_input_name: _image((channels, *size))}, mean, std)


def torchvision_model(rest: str, **options: Any) -> ResolvedModel:
    """Builds ``torchvision.models.get_model(rest, **options)``, untrained.

    :param rest: torchvision's name of the model.
    :param options: its keyword arguments (``{"num_classes": 10}``).
    """
    models = require_package("torchvision.models", "nncf-compactprune[images]")
    known = models.list_models(module=models)  # classification only: detection and video models take other inputs
    if rest not in known:
        msg = f"torchvision has no classification model '{rest}'.{nearest(rest, known)}"
        raise ResolveError(msg)
    model = _build(f"torchvision:{rest}", lambda: models.get_model(rest, **options))
    return ResolvedModel(f"torchvision:{rest}", model, _image(IMAGENET_SHAPE))


def onnx_model(rest: str, **options: Any) -> ResolvedModel:
    """Reads a network from an ONNX file, by onnx2torch. Its weights are the file's.

    :param rest: path of the file.
    :param options: ``shapes``, a list with the shape of each input, where the file leaves sides open.
    """
    model, examples = _build(f"onnx:{rest}", lambda: read_onnx(rest, **options))
    return ResolvedModel(f"onnx:{rest}", model, examples[0] if len(examples) == 1 else examples)


def python_model(rest: str, **options: Any) -> ResolvedModel:
    """Calls a user's own function, which returns a module or a pair of module and example inputs.

    A module's attribute ``input_size``, as ``(c, h, w)``, gives the example input's shape; 3 x 224 x 224 otherwise.

    :param rest: ``module:function`` or ``file.py:function``.
    :param options: the function's keyword arguments.
    """
    function = load_function(rest)
    built = _build(f"python:{rest}", lambda: function(**options))
    model, example_inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        msg = f"python:{rest} must return a torch.nn.Module, or one and its example inputs, not {type(model).__name__}."
        raise ResolveError(msg)
    if example_inputs is None:
        example_inputs = _image(_image_shape(getattr(model, "input_size", IMAGENET_SHAPE)))
    return ResolvedModel(f"python:{rest}", model, example_inputs)


def _processor(path: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std that the image processor beside a Hugging Face config applies."""
    if not path.is_file():
        return None, None
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is no JSON file: {error}"
        raise ResolveError(msg) from error
    if not stated.get("do_normalize", True):
        return None, None
    return _numbers(stated.get("image_mean")), _numbers(stated.get("image_std"))


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _build(name: str, build: Callable[[], Any]) -> Any:
    """Runs a library's or user's builder; what it says about its arguments becomes one clear error."""
    try:
        return build()
    except (TypeError, ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        because = "" if root is error else f" Because of {type(root).__name__}: {root}"
        msg = f"Cannot build '{name}': {type(error).__name__}: {error}{because}"
        raise ResolveError(msg) from error


def _resized(inputs: ExampleInputs, sample_size: Sequence[int], name: str) -> ExampleInputs:
    tensors = [inputs] if isinstance(inputs, torch.Tensor) else list(_values(inputs))
    if len(tensors) != 1:
        msg = f"Model '{name}' takes {len(tensors)} inputs; one sample size cannot stand for all."
        raise ResolveError(msg)
    if tensors[0].dim() != len(sample_size) or any(side < 1 for side in sample_size):
        expected = "x".join(str(side) for side in tensors[0].shape)
        msg = f"Model '{name}': expected a sample size like {expected} (batch first), got {list(sample_size)}."
        raise ResolveError(msg)
    if tuple(tensors[0].shape) == tuple(sample_size):  # as given, which may be words
        return inputs
    image = _image(sample_size[1:], sample_size[0])
    if isinstance(inputs, dict):
        return dict.fromkeys(inputs, image)
    return image if isinstance(inputs, torch.Tensor) else (image,)


def _values(inputs: tuple[torch.Tensor, ...] | dict[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    return inputs.values() if isinstance(inputs, dict) else inputs


def _image(shape: Sequence[int], batch: int = 1) -> torch.Tensor:
    # Noise rather than zeros: a batch that no activation swallows. The seed is local, the caller's stays untouched.
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def _image_shape(size: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = size
    return channels, height, width


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


@hookimpl
def compactprune_models() -> Mapping[str, Callable[..., ResolvedModel]]:
    """The model schemes that come with the package."""
    return {
        "hf": hf_model,
        "onnx": onnx_model,
        "python": python_model,
        "timm": timm_model,
        "torchvision": torchvision_model,
    }
