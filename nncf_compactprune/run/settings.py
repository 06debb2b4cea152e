"""The config of a run: the keys that belong to training and export, typed, beside those of the compression."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import nn

from nncf_compactprune.config import CompressionConfig, Section, load_config, load_section, read_document
from nncf_compactprune.config.reading import Document
from nncf_compactprune.errors import nearest
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.run.training import Autocast
from nncf_compactprune.storage.digests import file_digest

DEFAULT_MOMENTUM = 0.9
#: keys of files that a run writes
WRITTEN = ("cache", "save_ranking_coeffs_path")
ONNX = "onnx:"  # in front of the path of a file that holds network and weights


class OptimizerConfig(Section):
    """Which optimizer, with torch's own meaning of every value.

    :param type: ``"sgd"``, ``"adam"`` or ``"adamw"``.
    :param lr: learning rate at the start of the schedule.
    :param momentum: of ``sgd``; null means 0.9.
    :param weight_decay: as torch applies it.
    :param max_grad_norm: where the norm of all gradients together is longer, they are scaled down to it before a step;
        null: never. The first gradients after a deep cut are many times those of a trained network.
    """

    type: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _momentum_is_for_sgd(self) -> OptimizerConfig:
        if self.momentum is not None and self.type != "sgd":
            msg = f"'momentum' belongs to sgd, not to {self.type}. Leave it out."
            raise ValueError(msg)
        return self

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer over the model's parameters.

        Frozen ones have no gradients, so they stay as they are. They keep their places: a weight that factors stand for
        is frozen, and was not when its run began.
        """
        optimizer = self._of(list(model.parameters()))
        if self.max_grad_norm is not None:
            optimizer.register_step_pre_hook(partial(_clip, self.max_grad_norm))
        return optimizer

    def _of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.type == "sgd":
            momentum = DEFAULT_MOMENTUM if self.momentum is None else self.momentum
            return torch.optim.SGD(parameters, self.lr, momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.type == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)


def _clip(norm: float, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before a step: parameters that joined later are seen, too."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)


class ExportConfig(Section):
    """What ``run`` writes of the dense and the pruned model; see :class:`~nncf_compactprune.export.ExportOptions`.

    :param formats: ``"onnx"``, ``"openvino"``, ``"pt2"``, ``"executorch"``, or a plugin's.
    :param precisions: ``"fp32"``, ``"fp16"``; each format writes those that it has. A quantized network has only INT8
        files.
    :param batch: a fixed batch size; null leaves it open.
    :param dynamic_size: height and width are open, too.
    :param opset: of ONNX; null: the exporter's.
    :param external_data: ONNX weights go into a file of their own.
    :param embed_preprocessing: scaling and normalising of pixels goes into the files.
    :param input_names: of the files' inputs, in order; null: the exporter's.
    :param output_names: of the outputs.
    :param layout: ``"optimum"`` or ``"ovms"``: the pruned network is also written into a directory of this name, as
        optimum-intel or OpenVINO Model Server reads it, INT8 where it is quantized; ``"plain"``: it is not.
    """

    formats: tuple[str, ...] = Field(default=("onnx", "openvino"), min_length=1, strict=False)
    precisions: tuple[Literal["fp32", "fp16"], ...] = Field(default=("fp32", "fp16"), min_length=1, strict=False)
    batch: int | None = Field(default=None, ge=1)
    dynamic_size: bool = False
    opset: int | None = Field(default=None, ge=13)
    external_data: bool = False
    embed_preprocessing: bool = False
    input_names: list[str] | None = None
    output_names: list[str] | None = None
    layout: Literal["plain", "optimum", "ovms"] = "plain"

    @field_validator("formats")
    @classmethod
    def _installed(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        known = default_plugins().export_formats
        for name in formats:
            if name not in known:
                msg = f"expected formats among {', '.join(sorted(known))}, got '{name}'.{nearest(name, known)}"
                raise ValueError(msg)
        return formats


class RunConfig(Section):
    """The top-level keys that belong to the training script, as in NNCF's samples.

    :param model: ``timm:NAME``, ``hf:MODEL_TYPE`` or ``hf:FOLDER``, ``torchvision:NAME``, ``python:module:function``,
        ``python:file.py:function``, ``onnx:FILE``, or a plugin's.
    :param model_options: keyword arguments of what builds the model.
    :param weights: safetensors file of the dense model; an ONNX file has its own.
    :param dataset: ``digits``, ``cifar10:PATH``, ``imagefolder:DIR``, ``python:module:function``, or a plugin's;
        ``pictures:DIR``, pictures without labels, needs ``weights`` and no epochs: nothing is trained and no accuracy
        measured; null needs ``input_info``, too.
    :param dataset_options: the dataset's own options: ``mean`` and ``std`` of ``cifar10``, ``imagefolder`` and
        ``pictures``, ``train_samples`` and ``test_samples`` of ``cifar10``, ``image_size`` of ``imagefolder`` and
        ``pictures``, ``smallest_crop`` of ``imagefolder``, ``samples`` of ``pictures``.
    :param batch_size: images a step.
    :param epochs: fine-tuning epochs, while and after pruning.
    :param warm_start: directory of a finished run of the same dense network, whose pruned network is pruned further;
        budgets stay shares of the dense one.
    :param pretrain_epochs: epochs of dense training first; ignored where weights are given.
    :param lr_schedule: how the learning rate falls, by epoch: ``"cosine"`` or ``"constant"``.
    :param autocast: ``"bfloat16"`` trains in mixed precision, on channels-last images, about twice as fast where the
        device has instructions for it; ``"auto"`` does so only there; null trains in float32.
    :param device: where the network trains: ``"auto"`` is a GPU of CUDA where there is one, other values are names of
        PyTorch's, such as ``"cpu"`` and ``"cuda:1"``. Files are written, checked and timed on the CPU.
    :param seed: of weights, batches and augmentation.
    :param output_dir: where everything is written.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str
    model_options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    warm_start: str | None = None
    dataset: str | None = None
    dataset_options: dict[str, Any] = Field(default_factory=dict)
    batch_size: int = Field(default=64, ge=1)
    epochs: int = Field(default=10, ge=0)
    pretrain_epochs: int = Field(default=0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    autocast: Autocast | None = None
    device: str = "auto"
    seed: int = Field(default=0, ge=0)
    export: ExportConfig = ExportConfig()
    output_dir: str = "runs/compactprune"

    @property
    def has_weights(self) -> bool:
        """Whether the dense network comes trained: from a file of weights, or from an ONNX file."""
        return self.weights is not None or self.model.startswith(ONNX)


@dataclass(frozen=True)
class Settings:
    """A config as a run reads it.

    :param source: its name, for messages.
    :param document: the config as plain JSON data, overrides included.
    :param compression: its part for the algorithms.
    :param run: its part for the training script.
    """

    source: str
    document: Mapping[str, Any]
    compression: CompressionConfig
    run: RunConfig

    def file_digests(self) -> dict[str, str]:
        """SHA-256 of every file that the config names (trained weights, a ranking): its content decides the result, and
        may change under the same name. What the run writes there itself is left out."""
        texts = [(key, text.removeprefix(ONNX)) for key, text in _texts(self.document)]
        names = {text for _, text in texts} - {text for key, text in texts if key in WRITTEN}
        return {name: file_digest(Path(name)) for name in sorted(names) if isfile(name)}


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of a document, each with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts(one, name)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one, key)


def read_settings(
    source: str | PathLike[str], overrides: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> Settings:
    """Reads and validates a config file.

    :param source: the file.
    :param overrides: values by dotted path, such as ``{"epochs": 3, "compression.budget.macs": 0.4}``.
    :param plugins: where algorithms are looked up; the installed plugins by default.
    :raises ConfigError: with all problems of the compression part, or all of the training part.
    """
    return settings_of(read_document(source, overrides), plugins)


def settings_of(document: Document, plugins: Plugins | None = None) -> Settings:
    """Validates a config that was read.

    :param document: the config.
    :param plugins: where algorithms are looked up; the installed plugins by default.
    :raises ConfigError: with all problems of the compression part, or all of the training part.
    """
    compression = load_config(document, plugins)
    return Settings(document.name, document.data, compression, load_section(document, RunConfig))


def run_schema() -> dict[str, Any]:
    """Returns the JSON schema's ``properties`` and ``$defs`` of :class:`RunConfig`, for a config's schema."""
    # The prefix keeps these definitions apart from an algorithm's of the same name.
    schema = RunConfig.model_json_schema(ref_template="#/$defs/run.{model}")
    definitions = {f"run.{name}": definition for name, definition in schema["$defs"].items()}
    return {"properties": schema["properties"], "$defs": definitions}


def unread_key_warnings(keys: Iterable[str]) -> list[str]:
    """Returns one sentence per top-level key that nobody reads but that is close to one that somebody does.

    Other unread keys are the user's own business: a config may serve several scripts.
    """
    known = {*RunConfig.model_fields, *CompressionConfig.model_fields}
    warnings = []
    for key in keys:
        close = [] if key in known else difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
        warnings += [f"'{key}' is not read. Did you mean '{close[0]}'?" for _ in close]
    return warnings
