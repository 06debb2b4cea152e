"""The ``quantization`` entry, in NNCF 2.x's grammar where ``nncf.quantize`` can do what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nncf_compactprune.config import Section
from nncf_compactprune.config.nncf2 import Nncf2Entry, Spelling
from nncf_compactprune.config.reading import show
from nncf_compactprune.config.sections import BatchNormAdaptation, NotYet, Scopes

_BITS = (
    "NNCF 3 quantizes to 8 bits. For 4 to 7 bits, use the algorithm data_free_quantization with params.weight_bits and "
    "params.activation_bits."
)
_LOGARITHM = "scales are stored as they are. Leave it out."
_UNIFIED = "NNCF 3 knows which operations share a quantizer. Leave it out."
_PRECISION = "mixed precision is not supported: no runtime here executes it. Leave it out for 8 bits everywhere."
_MULTIPLIER = "one learning rate serves weights and ranges. Set it in the optimizer."
_STAGED = "weights and activations are quantized in the same epoch. Use params.start_epoch."
_HALVES = (
    'NNCF 3 halves ranges of "symmetric" weights only, and these are "asymmetric". Write "disable", or leave it out.'
)
_SCHEDULE = "it belonged to NNCF 2.x's training in stages, and the training script's learning rate schedule counts"
_SCHEDULE_KEYS = (
    "batch_multiplier", "base_lr", "base_wd", "lr_poly_drop_start_epoch", "lr_poly_drop_duration_epochs",
    "disable_wd_start_epoch",
)  # fmt: skip
_PATTERNS = "NNCF 3 knows which operations are computed in one"
_STEPS = "counted batches in NNCF 1.x. Write num_init_samples: that number times the batch size."
_RANGES = (
    "NNCF 3 finds the ranges of all activations in one way: expected one object, or a list with one entry for "
    "activations and no scopes. Write the entry that most layers have."
)


class RangeParams(Section):
    """Percentiles of ``"percentile"`` and ``"mean_percentile"``, in percent.

    :param min_percentile: of the smallest values.
    :param max_percentile: of the largest.
    """

    min_percentile: float = Field(default=0.1, ge=0, lt=50)
    max_percentile: float = Field(default=99.9, gt=50, le=100)


def _none_for_zero(value: Any) -> Any:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return None if type(value) is int and value == 0 else value


def _overflow_fix(saturation_fix_off: Any) -> Any:
    """``overflow_fix`` for ``disable_saturation_fix``; what is no boolean is told as a mistake."""
    if not isinstance(saturation_fix_off, bool):
        return saturation_fix_off
    return "disable" if saturation_fix_off else "enable"


class RangeInitializer(Section):
    """How ranges of activations are found.

    :param num_init_samples: how many samples; the same as ``params.subset_size``. 0, which left ranges unmeasured in
        NNCF 2.x, counts as null.
    :param type: the estimator: ``"min_max"``, ``"mean_min_max"``, ``"percentile"``, ``"mean_percentile"``,
        ``"mixed_min_max"``; null: NNCF's own choice.
    """

    num_init_samples: Annotated[int | None, BeforeValidator(_none_for_zero)] = Field(default=None, ge=1)
    type: Literal["mixed_min_max", "min_max", "mean_min_max", "percentile", "mean_percentile"] | None = None
    params: RangeParams = RangeParams()
    num_init_steps: Annotated[None, NotYet(_STEPS)] = None


class QuantizationInitializer(Section):
    """What happens when the quantizers come.

    :param batchnorm_adaptation: re-estimates BatchNorm statistics with the quantizers on; 0 samples by default, as NNCF
        corrects biases.
    """

    range: RangeInitializer = RangeInitializer()
    batchnorm_adaptation: BatchNormAdaptation = BatchNormAdaptation(num_bn_adaptation_samples=0)
    precision: Annotated[None, NotYet(_PRECISION)] = None

    @field_validator("precision", mode="before")
    @classmethod
    def _of_one_precision(cls, value: Any) -> Any:
        """Bits to choose among that are no choice."""
        return None if value == {"bits": [8]} else value

    @field_validator("range", mode="before")
    @classmethod
    def _one_way(cls, value: Any) -> Any:
        """NNCF 2.x also took a list: entries for weights and for activations, of parts of the network."""
        if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
            return value
        of_activations = [entry for entry in value if entry.get("target_quantizer_group") != "weights"]
        if len(of_activations) != 1 or any(key.endswith("_scopes") for key in of_activations[0]):
            raise ValueError(_RANGES)
        return {key: one for key, one in of_activations[0].items() if key != "target_quantizer_group"}


class Quantizer(Section):
    """How a quantizer rounds; null is the preset's choice.

    :param mode: ``"symmetric"``: ranges around zero; ``"asymmetric"``: anywhere.
    :param bits: 8. For fewer, see ``data_free_quantization``.
    :param signed: levels on both sides of zero, or only above.
    :param per_channel: a range for every channel.
    """

    mode: Literal["symmetric", "asymmetric"] | None = None
    bits: Literal[8] = Field(default=8, description=_BITS)

    @field_validator("bits", mode="before")
    @classmethod
    def _of_eight_bits(cls, value: Any) -> Any:
        if value != 8:
            msg = f"expected 8, got {show(value)}. {_BITS}"
            raise ValueError(msg)
        return value

    signed: bool | None = None
    per_channel: bool | None = None


class Quantized(Quantizer):
    """How all weights or activations are quantized, and which are not.

    :param ignored_scopes: operations whose weights, or whose inputs, stay in float.
    :param target_scopes: operations whose weights, or whose inputs, are quantized; null: all.
    """

    ignored_scopes: Scopes = Field(default_factory=list)
    target_scopes: Scopes | None = None
    logarithm_scale: Annotated[None, NotYet(_LOGARITHM)] = None


class QuantizedActivations(Quantized):
    """The same of activations.

    :param per_channel: a range for every channel of what depthwise convolutions read; null is NNCF's choice, which
        does so, and which ONNX Runtime computes in float.
    """

    per_channel: bool | None = False
    unified_scale_ops: Annotated[None, NotYet(_UNIFIED)] = None
    linked_quantizer_scopes: Annotated[None, NotYet(_UNIFIED)] = None


class ScopeOverrides(Section):
    """Operations whose quantizers differ, by scope. Scopes that match nothing are told, and passed over.

    :param weights: of an operation's weight.
    :param activations: of its inputs.
    """

    weights: dict[str, Quantizer] = Field(default_factory=dict)
    activations: dict[str, Quantizer] = Field(default_factory=dict)


_START_EPOCHS = ("activations_quant_start_epoch", "weights_quant_start_epoch")


class QuantizationParams(Section):
    """How ``nncf.quantize`` is called, and when.

    :param subset_size: samples of the training loader that ranges and biases are measured on.
    :param target_device: what the files will run on: NNCF places quantizers for it.
    :param model_type: ``"transformer"`` for networks with attention; null for others.
    :param start_epoch: the epoch, counted from 0 when the entry begins, from which quantizers are in the network and
        are trained with it; null: the trained network is quantized at the end.
    """

    subset_size: int = Field(default=300, ge=1)
    target_device: Literal["ANY", "CPU", "GPU", "NPU"] = "ANY"
    model_type: Literal["transformer"] | None = None
    start_epoch: int | None = Field(default=0, ge=0)
    activations_quant_start_epoch: Annotated[None, NotYet(_STAGED)] = None
    weights_quant_start_epoch: Annotated[None, NotYet(_STAGED)] = None

    @model_validator(mode="before")
    @classmethod
    def _in_one_stage(cls, value: Any) -> Any:
        """Both start epochs of NNCF 2.x's training in stages, where they are the same."""
        epochs = [value[key] for key in _START_EPOCHS if key in value] if isinstance(value, Mapping) else []
        if len(epochs) != len(_START_EPOCHS) or epochs[0] != epochs[1] or "start_epoch" in value:
            return value
        return {key: one for key, one in value.items() if key not in _START_EPOCHS} | {"start_epoch": epochs[0]}


class AccuracyControl(Section):
    """Leaves the layers in float that cost most accuracy, as few as hold a drop.

    :param max_drop: allowed loss of top-1 accuracy, in [0, 1): 0.01 is one point.
    :param num_samples: labelled samples of the training loader that it is measured on.
    """

    max_drop: float = Field(default=0.01, ge=0, lt=1)
    num_samples: int = Field(default=1000, ge=1)


class QuantizationConfig(Nncf2Entry):
    """A ``quantization`` entry.

    :param preset: ``"performance"``: ranges around zero everywhere; ``"mixed"``: activations anywhere, which is more
        accurate behind other activations than ReLU.
    :param quantize_inputs: quantizers behind the network's inputs; without them its first layers compute in float.
    :param quantize_outputs: quantizers in front of the network's outputs too.
    :param overflow_fix: ``"enable"``, ``"first_layer_only"``, ``"disable"``: weights in half the range, for processors
        with AVX2 or AVX-512 and no VNNI.
    :param accuracy_control: what costs most accuracy stays in float; null: everything in scope is quantized.
    :param scope_overrides: quantizers of some operations that differ from all others.
    :param export_to_onnx_standard_ops: ONNX files hold standard operations whatever it says.
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {"disable_saturation_fix": Spelling("overflow_fix", _overflow_fix)}
    leftovers: ClassVar[Mapping[str, str]] = {
        "quantizable_subgraph_patterns": _PATTERNS,
        "quantize_patterns": _PATTERNS,
        **{f"params.{key}": _SCHEDULE for key in _SCHEDULE_KEYS},
    }

    initializer: QuantizationInitializer = QuantizationInitializer()  # type: ignore[assignment]
    preset: Literal["performance", "mixed"] | None = None
    quantize_inputs: bool = True
    quantize_outputs: bool = False
    overflow_fix: Literal["enable", "disable", "first_layer_only"] | None = None
    accuracy_control: AccuracyControl | None = None
    weights: Quantized = Quantized()
    activations: QuantizedActivations = QuantizedActivations()
    scope_overrides: ScopeOverrides = ScopeOverrides()
    export_to_onnx_standard_ops: bool = True
    compression_lr_multiplier: Annotated[None, NotYet(_MULTIPLIER)] = None
    params: QuantizationParams = QuantizationParams()

    @property
    def needs_labels(self) -> str:
        return "" if self.accuracy_control is None else "accuracy_control"

    @field_validator("compression_lr_multiplier", mode="before")
    @classmethod
    def _that_changes_nothing(cls, value: Any) -> Any:
        return None if value == 1 else value

    @model_validator(mode="after")
    def _half_ranges_are_symmetric(self) -> QuantizationConfig:
        if self.weights.mode == "asymmetric" and self.overflow_fix in ("enable", "first_layer_only"):
            msg = f"'overflow_fix' is \"{self.overflow_fix}\": {_HALVES}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _one_number_of_samples(self) -> QuantizationConfig:
        asked = self.initializer.range.num_init_samples
        if asked is not None and "subset_size" in self.params.model_fields_set and asked != self.params.subset_size:
            msg = (
                f"initializer.range.num_init_samples is {asked}, params.subset_size is {self.params.subset_size}. "
                "Both say how many samples ranges are measured on: leave one of them out."
            )
            raise ValueError(msg)
        return self

    @property
    def samples(self) -> int:
        """How many samples ranges are measured on."""
        asked = self.initializer.range.num_init_samples
        return self.params.subset_size if asked is None else asked
