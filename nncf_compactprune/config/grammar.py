"""The configuration: NNCF's JSON grammar, typed, with every mistake found at once and told in plain words.

.. code-block:: json

    {
        "input_info": {"sample_size": [1, 3, 224, 224]},
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}
    }

The top level is open, as in NNCF: keys such as ``model`` or ``epochs`` belong to the training script. Everything below
``compression`` is closed: each entry is validated by the ``Config`` of the algorithm that it names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    PrivateAttr,
    SerializeAsAny,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema
from pydantic_core import core_schema

from nncf_compactprune.config.messages import validated
from nncf_compactprune.config.reading import Finding, JsonPath, config_error, one_of, plain_object, read, show
from nncf_compactprune.errors import ConfigError, PluginError, Problem, nearest
from nncf_compactprune.plugins import Plugins, default_plugins

_MAX_ELEMENTS = 2**31
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
_COST_PATTERN = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMG])")
_LATENCY_PATTERN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?ms")


class Section(BaseModel):
    """Base of every section of an entry: frozen, strict about types (no ``"8"`` for 8), closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _OneOrMany:
    """Lets one item stand for a list of one, as NNCF's grammar does."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: list(value) if isinstance(value, (list, tuple)) else [value], handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


Scopes = Annotated[list[str], _OneOrMany()]


class BatchNormAdaptation(Section):
    """How many samples re-estimate BatchNorm statistics after pruning; 0 leaves them as they are."""

    num_bn_adaptation_samples: int = Field(default=2000, ge=0)


class Initializer(Section):
    """What happens right after the model was compressed, before training."""

    batchnorm_adaptation: BatchNormAdaptation = BatchNormAdaptation()


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _check_cost(value: Any) -> Any:
    if value is None or _is_fraction(value) or (isinstance(value, int) and value > 1):
        return value
    if isinstance(value, str) and _absolute_cost(value) > 0:
        return value
    msg = f'expected a fraction kept in (0, 1], a whole number, or a string such as "300M", got {show(value)}.'
    raise ValueError(msg)


def _absolute_cost(text: str) -> int:
    match = _COST_PATTERN.fullmatch(text)
    return int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0


def _check_latency(value: Any) -> Any:
    if value is None or _is_fraction(value) or (isinstance(value, str) and _absolute_ms(value) > 0):
        return value
    msg = f'expected a fraction kept in (0, 1] or a string such as "4.5ms", got {show(value)}.'
    raise ValueError(msg)


def _absolute_ms(text: str) -> float:
    match = _LATENCY_PATTERN.fullmatch(text)
    return float(match[1]) if match else 0.0


_FRACTION_SCHEMA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
Cost = Annotated[
    int | float | str | None,
    PlainValidator(_check_cost),
    WithJsonSchema(
        {
            "anyOf": [
                {**_FRACTION_SCHEMA, "description": "fraction kept"},
                {"type": "integer", "minimum": 2},
                {"type": "string", "pattern": f"^{_COST_PATTERN.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]
LatencyBudget = Annotated[
    float | str | None,
    PlainValidator(_check_latency),
    WithJsonSchema(
        {
            "anyOf": [
                {**_FRACTION_SCHEMA, "description": "fraction kept"},
                {"type": "string", "pattern": f"^{_LATENCY_PATTERN.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]


class Budget(Section):
    """What the compressed model may cost. Every limit given must hold.

    :param macs: multiply-accumulates: the fraction kept in (0, 1], or an absolute number (``300000000``, ``"300M"``).
    :param params: parameters, in the same way.
    :param latency: measured latency: the fraction kept in (0, 1], or milliseconds (``"4.5ms"``).
    :param device: the OpenVINO device on which latency is measured.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [name]} for name in ("macs", "params", "latency")]}
    )

    macs: Cost = None
    params: Cost = None
    latency: LatencyBudget = None
    device: str = Field(default="CPU", min_length=1)

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.macs is None and self.params is None and self.latency is None:
            msg = 'expected at least one of "macs", "params", "latency", such as {"macs": 0.5}.'
            raise ValueError(msg)
        return self

    def resolve(self, kind: Literal["macs", "params"], dense: int) -> int:
        """
        :param kind: which limit.
        :param dense: the cost of the dense model.
        :return: the largest cost allowed; ``dense`` where this budget says nothing about it.
        """
        value = self.macs if kind == "macs" else self.params
        if value is None:
            return dense
        if isinstance(value, str):
            return _absolute_cost(value)
        # Decimal, since 0.29 * 100 is 28.999999999999996 in floats.
        return int(Decimal(str(value)) * dense) if value <= 1 else int(value)

    def resolve_latency(self, dense_ms: float) -> float:
        """
        :param dense_ms: the latency of the dense model.
        :return: the largest latency allowed, in ms; ``dense_ms`` where this budget says nothing about it.
        """
        if self.latency is None:
            return dense_ms
        return _absolute_ms(self.latency) if isinstance(self.latency, str) else self.latency * dense_ms


class AlgorithmConfig(Section):
    """One entry of ``"compression"``. An algorithm's ``Config`` derives from it and adds its own sections.

    :param algorithm: the algorithm's name.
    :param ignored_scopes: NNCF scopes that are not compressed.
    :param target_scopes: NNCF scopes that are; all, where None.
    """

    algorithm: str
    ignored_scopes: Scopes = Field(default_factory=list)
    target_scopes: Scopes | None = None
    initializer: Initializer = Initializer()


class InputInfo(Section):
    """One model input, in NNCF's grammar.

    :param sample_size: the shape, batch first.
    :param filler: ``"random"`` draws floats from [0, 1) and integers from {0, 1}.
    :param keyword: the argument of ``forward`` it goes to; positional where None.
    """

    sample_size: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    type: Literal["float", "long"] = "float"
    filler: Literal["ones", "zeros", "random"] = "ones"
    keyword: str | None = None

    @field_validator("sample_size")
    @classmethod
    def _fits_memory(cls, value: list[int]) -> list[int]:
        if math.prod(value) > _MAX_ELEMENTS:
            msg = f"expected at most {_MAX_ELEMENTS} elements, got {math.prod(value)}."
            raise ValueError(msg)
        return value

    def tensor(self, generator: torch.Generator) -> torch.Tensor:
        """
        :param generator: a CPU generator, for ``"random"``.
        :return: a tensor on the CPU, ``[*sample_size]``.
        """
        dtype = torch.float32 if self.type == "float" else torch.long
        if self.filler != "random":
            return torch.full(self.sample_size, float(self.filler == "ones"), dtype=dtype)
        if dtype.is_floating_point:
            return torch.rand(self.sample_size, generator=generator, dtype=dtype)
        return torch.randint(0, 2, self.sample_size, generator=generator, dtype=dtype)


class EarlyExitParams(Section):
    """Stop as soon as the accuracy is good enough.

    :param maximal_relative_accuracy_degradation: in percent of the original accuracy.
    :param maximal_absolute_accuracy_degradation: in units of the metric. Exactly one of the two is given.
    """

    maximal_relative_accuracy_degradation: float | None = None
    maximal_absolute_accuracy_degradation: float | None = None
    maximal_total_epochs: int = Field(default=10000, gt=0)

    @model_validator(mode="after")
    def _one_criterion(self) -> EarlyExitParams:
        if (self.maximal_relative_accuracy_degradation is None) == (self.maximal_absolute_accuracy_degradation is None):
            names = '"maximal_relative_accuracy_degradation" and "maximal_absolute_accuracy_degradation"'
            msg = f"expected exactly one of {names}."
            raise ValueError(msg)
        return self


class AdaptiveParams(EarlyExitParams):
    """Search for the highest compression rate that is accurate enough. Defaults are those of NNCF 2.x."""

    initial_training_phase_epochs: int = Field(default=5, ge=0)
    patience_epochs: int = Field(default=3, gt=0)
    initial_compression_rate_step: float = Field(default=0.1, gt=0, lt=1)
    compression_rate_step_reduction_factor: float = Field(default=0.5, gt=0, lt=1)
    lr_reduction_factor: float = Field(default=0.5, gt=0, le=1)
    minimal_compression_rate_step: float = Field(default=0.025, gt=0, lt=1)


class EarlyExit(Section):
    """``"accuracy_aware_training"`` that trains until the accuracy is back."""

    mode: Literal["early_exit"]
    params: EarlyExitParams


class AdaptiveCompressionLevel(Section):
    """``"accuracy_aware_training"`` that also moves the compression rate."""

    mode: Literal["adaptive_compression_level"]
    params: AdaptiveParams


class CompressionConfig(BaseModel):
    """A whole configuration, as :func:`load_config` returns it. Keys unknown here are kept in ``model_extra``.

    :param compression: one configuration per algorithm, in the order in which they are applied. Scopes given at the top
        level are merged in, as in NNCF 2.x.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    input_info: Annotated[list[InputInfo], _OneOrMany()] = Field(default_factory=list)
    target_device: Literal["ANY", "CPU", "GPU", "NPU", "CPU_SPR", "TRIAL"] = "CPU"
    compression: list[SerializeAsAny[AlgorithmConfig]]
    accuracy_aware_training: Annotated[EarlyExit | AdaptiveCompressionLevel, Field(discriminator="mode")] | None = None
    log_dir: str | None = None
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


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], plugins: Plugins | None = None
) -> CompressionConfig:
    """Reads and validates a configuration.

    Files may hold ``//`` and ``/* */`` comments and trailing commas, as NNCF 2.x allows.

    :param source: a path, or the configuration as a mapping.
    :param plugins: where algorithms are looked up; everything installed by default.
    :raises ConfigError: with all problems, each with its JSON path, in document order.
    """
    if isinstance(source, Mapping):
        name, raw = "config", source
    else:
        name, raw = read(source)
    document = plain_object(name, raw)
    plugins = plugins if plugins is not None else default_plugins()
    findings: list[Finding] = []
    top_level = {key: value for key, value in document.items() if key != "compression"}
    entries = _entries(document, plugins, findings)
    config = validated(CompressionConfig, {**top_level, "compression": entries}, (), findings, as_json=False)
    if config is None or findings:
        raise config_error(name, findings, document)
    merged = [_with_scopes(entry, config) for entry in config.compression]
    config = config.model_copy(update={"compression": merged})
    config._source = name
    return config


def load_algorithm(
    entry: Mapping[str, Any], plugins: Plugins | None = None, source: str = "arguments"
) -> AlgorithmConfig:
    """Validates one entry of ``"compression"`` on its own, for callers that take it as arguments.

    :param entry: such as ``{"algorithm": "catro", "budget": {"macs": 0.5}}``.
    :param plugins: where algorithms come from; the installed plugins by default.
    :param source: what to call it in messages.
    :raises ConfigError: as :func:`load_config`, with paths inside the entry.
    """
    document = plain_object(source, entry)
    findings: list[Finding] = []
    config = _entry(document, (), plugins if plugins is not None else default_plugins(), findings)
    if config is None:
        raise config_error(source, findings, document)
    return config


def json_schema(plugins: Plugins | None = None) -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of a configuration with the algorithms of ``plugins``."""
    algorithms = (plugins if plugins is not None else default_plugins()).algorithms
    models: list[type[BaseModel]] = [CompressionConfig, *dict.fromkeys(cls.Config for cls in algorithms.values())]
    references, generated = models_json_schema([(model, "validation") for model in models])
    definitions = generated["$defs"]
    # An algorithm's class may be called CompressionConfig too, hence by reference and not by name.
    top_level = definitions.pop(references[CompressionConfig, "validation"]["$ref"].removeprefix("#/$defs/"))
    entries = [
        {
            **references[cls.Config, "validation"],
            "title": name,
            "description": cls.summary,
            "properties": {"algorithm": {"const": name}},
        }
        for name, cls in sorted(algorithms.items())
    ]
    entry = {"type": "object", "required": ["algorithm"], **({"oneOf": entries} if entries else {})}
    top_level["properties"]["compression"] = {"anyOf": [entry, {"type": "array", "items": entry, "minItems": 1}]}
    top_level["properties"]["$schema"] = {"type": "string"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top_level, "$defs": definitions}


def _with_scopes(entry: AlgorithmConfig, top: CompressionConfig) -> AlgorithmConfig:
    targets = entry.target_scopes if entry.target_scopes is not None else top.target_scopes
    ignored = list(dict.fromkeys([*entry.ignored_scopes, *top.ignored_scopes]))
    return entry.model_copy(update={"ignored_scopes": ignored, "target_scopes": targets})


def _entries(document: dict[str, Any], plugins: Plugins, findings: list[Finding]) -> list[AlgorithmConfig]:
    wanted = 'Expected an object with "algorithm", or a list of such objects.'
    if "compression" not in document:
        close = [key for key in document if nearest(key, ["compression"])]
        hint = f" Did you mean that where you wrote {show(close[0])}?" if close else ""
        findings.append((("compression",), f"missing. {wanted}{hint}"))
        return []
    section = document["compression"]
    if section == []:
        findings.append((("compression",), f"empty. {wanted}"))
    if not isinstance(section, list):
        entry = _entry(section, ("compression",), plugins, findings)
        return [entry] if entry is not None else []
    entries = [_entry(item, ("compression", index), plugins, findings) for index, item in enumerate(section)]
    return [entry for entry in entries if entry is not None]


def _entry(entry: Any, path: JsonPath, plugins: Plugins, findings: list[Finding]) -> AlgorithmConfig | None:
    """Validates one entry with the class of the algorithm that it names."""
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
            findings.append((at, str(error)))
        else:
            return validated(algorithm.Config, entry, path, findings, as_json=True)
    return None
