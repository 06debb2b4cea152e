"""Reading a configuration: dict or file, one validation, a frozen model.

.. code-block:: json

    {
        "input_info": {"sample_size": [1, 3, 224, 224]},
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}
    }

The top level is open, as in NNCF: keys such as ``model`` or ``epochs`` belong to the training script. Everything below
``compression`` is closed: each entry is validated by the ``Config`` of the algorithm that it names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from nncf.common.logging import nncf_logger
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny, field_validator

from nncf_compactprune.config.accuracy_aware import AccuracyAwareTraining
from nncf_compactprune.config.inputs import InputInfo
from nncf_compactprune.config.messages import validated
from nncf_compactprune.config.nncf2 import GONE, modernised
from nncf_compactprune.config.nncf2_top_level import modern_top_level
from nncf_compactprune.config.reading import (
    Document,
    Finding,
    JsonPath,
    config_error,
    one_of,
    plain_object,
    read_document,
    render,
    show,
)
from nncf_compactprune.config.sections import AlgorithmConfig, OneOrMany, Scopes
from nncf_compactprune.errors import ConfigError, PluginError, Problem, nearest
from nncf_compactprune.plugins import Plugins, default_plugins

ModelT = TypeVar("ModelT", bound=BaseModel)
TargetDevice = Literal["ANY", "CPU", "GPU", "NPU", "CPU_SPR"]
Source = Document | str | os.PathLike[str] | Mapping[str, Any]


class CompressionConfig(BaseModel):
    """A whole configuration, as :func:`load_config` returns it. Keys unknown here are kept in ``model_extra``.

    :param input_info: what the model is called with; one object, or a list with one for each input.
    :param compression: one configuration per algorithm, in the order in which they are applied. Scopes given at the top
        level are merged in, as in NNCF 2.x.
    :param ignored_scopes: for all entries, beside their own.
    :param target_scopes: for all entries that name none.
    :param target_device: where the compressed model will run; algorithms that quantize read it.
    :param accuracy_aware_training: how much accuracy may be lost, for training loops that watch it.
    :param compression_lr_multiplier: factor of the gradients of parameters that an algorithm trains beside the
        network's own; entries that have such parameters read it where they name none.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    input_info: Annotated[list[InputInfo], OneOrMany()] = Field(default_factory=list)
    target_device: TargetDevice | None = None
    compression_lr_multiplier: float | None = Field(default=None, ge=0)
    compression: list[SerializeAsAny[AlgorithmConfig]]
    accuracy_aware_training: AccuracyAwareTraining | None = None
    ignored_scopes: Scopes = Field(default_factory=list)
    target_scopes: Scopes | None = None
    _source: str = PrivateAttr("config")

    @field_validator("input_info")
    @classmethod
    def _keywords(cls, value: list[InputInfo]) -> list[InputInfo]:
        keywords = [info.keyword for info in value if info.keyword is not None]
        if len(keywords) not in (0, len(value)):
            msg = 'expected a "keyword" in every input or in none.'
            raise ValueError(msg)
        if len(set(keywords)) < len(keywords):
            msg = f"expected different keywords, got {show(keywords)}."
            raise ValueError(msg)
        return value

    def example_inputs(
        self, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
        """
        :param device: where the tensors go.
        :param seed: of the ``"random"`` filler; the same on every device.
        :return: one tensor per ``input_info``: by keyword where keywords are given, positional otherwise.
        :raises ConfigError: if the configuration has no ``input_info``.
        """
        if not self.input_info:
            message = 'missing. Expected an object such as {"sample_size": [1, 3, 224, 224]}.'
            raise ConfigError(self._source, [Problem("input_info", message)])
        generator = torch.Generator().manual_seed(seed)
        named = [(info.keyword, info.tensor(generator).to(device)) for info in self.input_info]
        by_keyword = {keyword: tensor for keyword, tensor in named if keyword is not None}
        return by_keyword or tuple(tensor for _, tensor in named)


def load_config(source: Source, plugins: Plugins | None = None, *, warn: bool = True) -> CompressionConfig:
    """Reads and validates a configuration.

    Files may hold ``//`` and ``/* */`` comments and trailing commas, as NNCF 2.x allows.

    :param source: a path, the configuration as a mapping, or what
        :func:`~nncf_compactprune.config.reading.read_document` gave.
    :param plugins: where algorithms are looked up; everything installed by default.
    :param warn: tell of older spellings; False where that was done when the file was read.
    :raises ConfigError: with all problems, each with its JSON path, in document order.
    """
    document = read_document(source)
    plugins = plugins if plugins is not None else default_plugins()
    findings: list[Finding] = []
    warnings: list[Finding] = []
    data = modern_top_level(document.data, warnings, findings)
    entries = _entries(data, plugins, findings, warnings)
    config = validated(CompressionConfig, {**data, "compression": entries}, (), findings)
    if config is None or findings:
        raise config_error(document.name, findings, document.data)
    for path, message in warnings if warn else ():
        nncf_logger.warning(f"{document.name}: {render(path)}: {message}")
    config = config.model_copy(update={"compression": [_with_top_level(entry, config) for entry in config.compression]})
    config._source = document.name
    return config


def load_section(document: Document, model: type[ModelT]) -> ModelT:
    """Validates the top-level keys of a document that belong to the training script.

    :param document: what :func:`~nncf_compactprune.config.reading.read_document` gave.
    :param model: names these keys; it ignores all others (``extra="ignore"``).
    :raises ConfigError: with all problems, each with its JSON path, in document order.
    """
    findings: list[Finding] = []
    section = validated(model, document.data, (), findings)
    if section is None:
        raise config_error(document.name, findings, document.data)
    return section


def load_algorithm(
    entry: Mapping[str, Any], plugins: Plugins | None = None, source: str = "arguments"
) -> AlgorithmConfig:
    """Validates one entry of ``"compression"`` on its own, for callers that take it as arguments.

    :param entry: such as ``{"algorithm": "catro", "budget": {"macs": 0.5}}``.
    :param plugins: where algorithms come from; the installed plugins by default.
    :param source: what to call it in messages.
    :raises ConfigError: as :func:`load_config`, with paths inside the entry.
    """
    document = plain_object(source, entry, callables_under="")
    findings: list[Finding] = []
    warnings: list[Finding] = []
    config = _entry(document, (), plugins if plugins is not None else default_plugins(), findings, warnings)
    if config is None or findings:
        raise config_error(source, findings, document)
    for path, message in warnings:
        nncf_logger.warning(f"{source}: {render(path)}: {message}")
    return config


def _with_top_level(entry: AlgorithmConfig, top: CompressionConfig) -> AlgorithmConfig:
    """The entry with what the top level says for all entries: scopes, and the device where the entry names none."""
    targets = entry.target_scopes if entry.target_scopes is not None else top.target_scopes
    ignored = list(dict.fromkeys([*entry.ignored_scopes, *top.ignored_scopes]))
    scopes = {"ignored_scopes": ignored, "target_scopes": targets}
    update: dict[str, Any] = {key: value for key, value in scopes.items() if key not in entry.unread}
    multiplier = top.compression_lr_multiplier
    if multiplier is not None and getattr(entry, "compression_lr_multiplier", multiplier) is None:
        update["compression_lr_multiplier"] = multiplier
    params = getattr(entry, "params", None)
    if (
        top.target_device is not None
        and isinstance(params, BaseModel)
        and "target_device" in type(params).model_fields
        and "target_device" not in params.model_fields_set
    ):
        update["params"] = params.model_copy(update={"target_device": top.target_device})
    return entry.model_copy(update=update)


def _entries(
    document: dict[str, Any], plugins: Plugins, findings: list[Finding], warnings: list[Finding]
) -> list[AlgorithmConfig]:
    wanted = 'Expected an object with "algorithm", or a list of such objects.'
    if "compression" not in document:
        close = [key for key in document if nearest(key, ["compression"])]
        hint = f' Rename {show(close[0])} to "compression".' if close else inside_a_part(document)
        findings.append((("compression",), f"missing. {wanted}{hint}"))
        return []
    section = document["compression"]
    if section == []:
        findings.append((("compression",), f"empty. {wanted}{inside_a_part(document)}"))
    if not isinstance(section, list):
        entry = _entry(section, ("compression",), plugins, findings, warnings)
        return [entry] if entry is not None else []
    entries = [_entry(item, ("compression", at), plugins, findings, warnings) for at, item in enumerate(section)]
    return [entry for entry in entries if entry is not None]


def inside_a_part(document: dict[str, Any]) -> str:
    """Where the configuration is in a file of several, as OpenVINO Training Extensions has them, for a message.

    :param document: the top level.
    :return: a sentence; empty where it holds no such part.
    """
    whole = document.get("nncf_config")
    if isinstance(whole, dict) and whole.get("compression"):
        return ' This file has it in "nncf_config": give that object.'
    parts = [
        key
        for key, part in document.items()
        if isinstance(part, dict) and isinstance(inner := part.get("nncf_config"), dict) and inner.get("compression")
    ]
    return f' This file has it in {one_of(parts)}, below "nncf_config": give that object.' if parts else ""


def _entry(
    entry: Any, path: JsonPath, plugins: Plugins, findings: list[Finding], warnings: list[Finding]
) -> AlgorithmConfig | None:
    """Validates one entry, brought into today's spelling, with the class of the algorithm that it names."""
    if not isinstance(entry, dict):
        findings.append((path, f'expected an object with "algorithm", got {show(entry)}.'))
        return None
    at = (*path, "algorithm")
    known = one_of(sorted(plugins.algorithms))
    if "algorithm" not in entry:
        findings.append((at, f"missing. Expected {known}."))
    elif not isinstance(entry["algorithm"], str):
        findings.append((at, f"expected {known}, got {show(entry['algorithm'])}."))
    else:
        try:
            algorithm = plugins.get_algorithm(entry["algorithm"])
        except PluginError as error:
            gone = GONE.get(entry["algorithm"])
            findings.append((at, f"{show(entry['algorithm'])} is not supported: {gone}" if gone else str(error)))
        else:
            modern = modernised(entry, algorithm.Config)
            own: list[Finding] = list(modern.findings)
            config = validated(algorithm.Config, modern.entry, (), own, {"plugins": plugins})
            findings.extend(((*path, *modern.as_written(where)), message) for where, message in own)
            warnings.extend(((*path, *where), message) for where, message in modern.warnings)
            return config
    return None
