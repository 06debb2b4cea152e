"""Directories as other programs want them: optimum-intel's, and OpenVINO Model Server's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nncf_compactprune.cut.surgery import CONFIG_ATTRIBUTE
from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export import ExportedFile, ExportOptions, export_model, is_quantized
from nncf_compactprune.export.prepared import ModelInputs
from nncf_compactprune.integrations.generative import export_generative, generates, task_of
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.storage.writing import whole_files

LAYOUTS = ("plain", "optimum", "ovms")
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_PLAIN_PROCESSOR = "ViTImageProcessor"  # resizes, rescales and normalises, and nothing else
#: how transformers names what prepares inputs: tokenizers, processors, feature extractors
_PREPARING = (
    "tokenizer*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "bpe*",
    "normalizer.json",
    "chat_template*",
    "*processor_config.json",
)
#: what ``optimum`` writes
OPTIMUM_FILES = ("openvino_*", CONFIG, "generation_config.json", *_PREPARING)


def export_to_layout(
    model: nn.Module,
    example_inputs: Any,
    directory: str | PathLike[str],
    layout: str,
    *,
    name: str = "model",
    precision: str | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    options: ExportOptions | None = None,
    plugins: Plugins | None = None,
) -> list[ExportedFile]:
    """Writes OpenVINO IR where another program looks for it.

    ``optimum`` gives a folder that ``OVModelFor*.from_pretrained`` and pipelines read: ``openvino_model.xml``,
    ``config.json``, and what prepares inputs. Tokenizers and processors are copied from the folder that the model was
    loaded from; ``options.pixels`` go into ``preprocessor_config.json``. For networks that generate (GPT-2, Llama, T5,
    BART, Whisper) optimum-intel must be installed: its exporter writes their parts, which keep keys and values of the
    past. ``ovms`` gives ``NAME/1/model.xml``, a model repository.

    :param model: see :func:`~nncf_compactprune.export.export_model`; for ``optimum`` one of transformers or timm.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
    :param directory: created if missing.
    :param layout: ``optimum`` or ``ovms``.
    :param name: the served model's name, for ``ovms``.
    :param precision: ``fp32`` by default, ``int8`` of a quantized model.
    :param input_names: :param output_names: as ``export_model`` takes them; ``optimum`` knows its own.
    :param options: see :class:`~nncf_compactprune.export.ExportOptions`.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: an unknown layout, a model that it cannot hold, or what ``export_model`` raises.
    """
    folder, options = Path(directory), options or ExportOptions()
    check_layout(model, layout, quantized=is_quantized(model))
    if layout == "optimum" and generates(model):
        if input_names or output_names:
            msg = "layout: optimum-intel names the inputs and outputs of networks that generate. Leave input_names and "
            msg += "output_names out."
            raise ExportError(msg)
        with whole_files(folder, [], stale=["openvino_*"]) as new:
            files = export_generative(model, example_inputs, new, folder, precision, options)
            _copy_preparing(model, new)
        return files
    target = folder / name / "1" / "model.xml"
    if layout == "optimum":
        target = folder / "openvino_model.xml"
        if not hasattr(model, "config"):  # what optimum calls the tensors of an image classifier
            input_names, output_names = input_names or ["pixel_values"], output_names or ["logits"]
    files = export_model(
        model,
        example_inputs,
        target,
        None,
        None if precision is None else [precision],
        input_names=input_names,
        output_names=output_names,
        options=options,
        plugins=plugins,
    )
    if layout == "optimum":
        with whole_files(folder, []) as new:
            _copy_preparing(model, new)
            for file, document in _documents(model, example_inputs, options, new).items():
                (new / file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return files


def check_layout(model: Any, layout: str, *, quantized: bool) -> None:
    """Refuses a layout that cannot hold a model, before the long work.

    :param model: it is only looked at.
    :param layout: ``optimum`` or ``ovms``.
    :param quantized: whether it is quantized, or will be.
    :raises ExportError: an unknown layout, or a model that it cannot hold.
    """
    if layout not in LAYOUTS[1:]:
        msg = f"layout: expected optimum or ovms, got '{layout}'.{nearest(layout, LAYOUTS)}"
        raise ExportError(msg)
    if layout == "optimum" and not _of_transformers(model) and "architecture" not in _timm_config(model):
        msg = (
            f"layout: optimum reads models of transformers and timm, got {type(model).__name__}. Use the layout plain "
            "or ovms."
        )
        raise ExportError(msg)
    if layout == "optimum" and generates(model):
        task_of(model, quantized=quantized)


def _copy_preparing(model: Any, folder: Path) -> None:
    """Copies tokenizers and processors that lie where a model of transformers was loaded from."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if source:
        for path in {path for pattern in _PREPARING for path in Path(source).glob(pattern) if path.is_file()}:
            shutil.copy2(path, folder)


def _of_transformers(model: Any) -> bool:
    return hasattr(model, "config") and hasattr(model.config, "to_dict")


def _timm_config(model: Any) -> Mapping[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def _documents(model: Any, example_inputs: Any, options: ExportOptions, folder: Path) -> dict[str, Mapping[str, Any]]:
    """``config.json`` and, for images, ``preprocessor_config.json``, where none says how they are prepared."""
    if _of_transformers(model):
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        config.pop(CONFIG_ATTRIBUTE, None)  # the file holds the network, whatever its widths
        config.pop("_name_or_path", None)  # a place on this machine
    else:
        config = {
            "model_type": "timm_wrapper",
            "architecture": _timm_config(model)["architecture"],
            "num_labels": model.num_classes,
        }
    if options.labels:
        config |= {
            "id2label": {str(at): label for at, label in enumerate(options.labels)},
            "label2id": {label: at for at, label in enumerate(options.labels)},
        }
    documents: dict[str, Mapping[str, Any]] = {CONFIG: config}
    images = [tensor for tensor in ModelInputs.of(model, example_inputs).tensors if tensor.dim() == 4]
    if images and (options.pixels is not None or not any(folder.glob("*processor_config.json"))):
        documents[PROCESSOR] = processor(options, images[0].shape[1:])
    return documents


def processor(options: ExportOptions, shape: Sequence[int]) -> dict[str, Any]:
    """A ``preprocessor_config.json``: how transformers prepares images.

    :param options: whose pixels say how they are normalised.
    :param shape: ``(c, h, w)``.
    """
    channels, height, width = shape
    pixels = options.pixels
    result = {
        "image_processor_type": _PLAIN_PROCESSOR,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": pixels is not None,
    }
    if pixels is not None:
        mean, std = (list(values) * (channels if len(values) == 1 else 1) for values in (pixels.mean, pixels.std))
        result |= {"image_mean": mean, "image_std": std}
    return result
