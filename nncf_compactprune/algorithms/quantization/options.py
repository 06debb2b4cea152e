"""From the entry's grammar to the arguments of ``nncf.quantize``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import nncf
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationMode,
    QuantizationParameters,
)
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    RangeEstimatorParametersSet,
    StatisticsCollectorParameters,
    StatisticsType,
)

from nncf_compactprune.algorithms.quantization.config import QuantizationConfig, Quantizer, RangeInitializer


def quantize_options(config: QuantizationConfig, samples: int, ignored: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of ``nncf.quantize``, but for the model and its data.

    :param config: the entry.
    :param samples: how many there are.
    :param ignored: NNCF's names of operations that are not quantized.
    """
    # NNCF's own choice for some devices halves ranges, and does so for symmetric weights only
    fix = "disable" if config.weights.mode == "asymmetric" else config.overflow_fix
    advanced = AdvancedQuantizationParameters(
        quantize_outputs=config.quantize_outputs,
        overflow_fix=None if fix is None else OverflowFix(fix),
        weights_quantization_params=_parameters(config.weights),
        activations_quantization_params=_parameters(config.activations),
        activations_range_estimator_params=_estimator(config.initializer.range),
    )
    return {
        "preset": None if config.preset is None else nncf.QuantizationPreset(config.preset),
        "target_device": nncf.TargetDevice[config.params.target_device],
        "model_type": None if config.params.model_type is None else nncf.ModelType(config.params.model_type),
        "subset_size": samples,
        "ignored_scope": nncf.IgnoredScope(names=sorted(ignored), validate=False),
        "advanced_parameters": advanced,
    }


def _parameters(part: Quantizer) -> QuantizationParameters:
    mode = None if part.mode is None else QuantizationMode(part.mode)
    return QuantizationParameters(mode=mode, signedness_to_force=part.signed, per_channel=part.per_channel)


def _estimator(asked: RangeInitializer) -> RangeEstimatorParameters:
    """NNCF 2.x's names of estimators in NNCF 3's."""
    kinds = {
        None: RangeEstimatorParameters(),
        "mixed_min_max": RangeEstimatorParameters(),
        "min_max": RangeEstimatorParametersSet.MINMAX,
        "mean_min_max": RangeEstimatorParametersSet.MEAN_MINMAX,
    }
    if asked.type in kinds:
        return kinds[asked.type]
    aggregator = AggregatorType.MEAN if asked.type == "mean_percentile" else None
    low, high = asked.params.min_percentile / 100, 1 - asked.params.max_percentile / 100

    def quantile(outside: float, extreme: AggregatorType) -> StatisticsCollectorParameters:
        return StatisticsCollectorParameters(StatisticsType.QUANTILE, aggregator or extreme, None, outside)

    return RangeEstimatorParameters(quantile(low, AggregatorType.MIN), quantile(high, AggregatorType.MAX))
