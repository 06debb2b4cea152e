"""``quantization``: ``nncf.quantize`` on the compact torch model, alone or behind other algorithms of the list.

The torch model is quantized, not its files: one network then trains, is measured, and becomes ONNX and OpenVINO alike.
From ``params.start_epoch`` on NNCF's quantizers take part in the training, ranges included, as in NNCF 2.x.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import nncf
from nncf.common.logging import nncf_logger
from torch import nn

from nncf_compactprune.algorithms.base import MASKED_WEIGHTS, Begins, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.batch_norm import adapt_batch_norm
from nncf_compactprune.algorithms.quantization.accuracy_control import Controlled, control, labelled_samples
from nncf_compactprune.algorithms.quantization.config import AccuracyControl, QuantizationConfig
from nncf_compactprune.algorithms.quantization.options import quantize_options
from nncf_compactprune.algorithms.quantization.parts import parts_of, quantize_parts
from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.decide.scopes import ScopeRules, operations_out_of_scope
from nncf_compactprune.errors import QuantizationError, first_line
from nncf_compactprune.host.calls import count_of, evaluating, rows_of
from nncf_compactprune.host.nncf_hooks import hooks, refuse_checkpointing, remove_hooks
from nncf_compactprune.host.nncf_progress import no_bars_in_pipes
from nncf_compactprune.host.nncf_quantization import (
    ends_of,
    is_quantizer,
    levels_of,
    quantize_in_place,
    quantizer_state,
    replace_quantizers,
    restore_quantizers,
)
from nncf_compactprune.host.nncf_sparsity import is_mask
from nncf_compactprune.host.optimizers import join_first
from nncf_compactprune.host.stored_quantizers import StoredQuantizer
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl


class Quantization(CompressionAlgorithm):
    """Quantizes to 8 bits with the training loader's samples."""

    name = "quantization"
    summary = "Quantization to INT8 by nncf.quantize, with calibration data, trained further where training goes on"
    Config: ClassVar[type[AlgorithmConfig]] = QuantizationConfig
    begins = Begins.LAST
    config: QuantizationConfig

    def __init__(self, config: QuantizationConfig, context: Context) -> None:
        super().__init__(config, context)
        self.quantizers = 0
        self._epoch: int | None = None
        self._begun = self._done = False
        self._controlled: Controlled | None = None

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        model = self.context.model
        if isinstance(model, nn.Sequential):
            msg = (
                f"'{self.name}': NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a "
                "layer). Put it inside a module of your own."
            )
            raise QuantizationError(msg)
        if self.context.train_loader is None:
            msg = (
                f"'{self.name}': no train_loader was given, whose samples ranges are measured on. Give one, or use the "
                'algorithm "data_free_quantization".'
            )
            raise QuantizationError(msg)
        # a wrong scope is told now, not after hours of training
        self._out_of_scope()
        parts_of(self.config, model, self.context.example_inputs)
        if state is not None and state.get("quantizers") is not None:
            restore_quantizers(model, state["quantizers"])
            self._begun = True
            self._tell_optimizer()
        elif state is not None:
            self._epoch = state.get("epoch")
        elif self.config.params.start_epoch == 0:
            self._begin()

    def epoch_step(self, epoch: int) -> None:
        self._epoch = 0 if self._epoch is None else self._epoch + 1
        start = self.config.params.start_epoch
        if start is not None and self._epoch >= start and not self._begun:
            self._begin()

    def attached(self) -> None:
        if self._begun:
            self._tell_optimizer()

    def strip(self) -> None:
        if self._done:
            return
        if not self._begun:
            self._begin()
        model = self.context.model
        with evaluating(model, changes=True):
            self.quantizers = replace_quantizers(model, self.context.example_inputs, stored)
        self._done = True

    def measure_again(self) -> None:
        """Other weights were loaded: where quantizers are in the model, their ranges are measured anew."""
        if self._begun and not self._done:
            remove_hooks(self.context.model, lambda module: not is_mask(module))
            self._begun = False
            self._begin()

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED if self._begun else CompressionStage.UNCOMPRESSED

    def get_state(self) -> dict[str, Any]:
        if not self._begun:
            return {"epoch": self._epoch}
        return {"quantizers": quantizer_state(self.context.model)}

    def statistics(self) -> Mapping[str, Any]:
        count = self.quantizers or sum(is_quantizer(hook.module) for hook in hooks(self.context.model))
        figures: dict[str, Any] = {"stage": self.stage().name.lower(), "bits": "W8A8", "quantizers": count}
        if self._controlled is not None:
            figures["layers in float"] = ", ".join(self._controlled.in_float) or "none"
        return figures

    def _out_of_scope(self) -> set[str]:
        """NNCF's names of the operations that are not quantized."""
        scopes = self.config.ignored_scopes, self.config.target_scopes
        rules = ScopeRules(validate=self.config.validate_scopes)
        return operations_out_of_scope(self.context.model, self.context.example_inputs, *scopes, rules)

    def _begin(self) -> None:
        """Measures ranges and puts the quantizers on.

        :raises QuantizationError: no samples, or NNCF cannot quantize the model; the model is untouched.
        """
        model, context = self.context.model, self.context
        own_masks = context.shared.get(MASKED_WEIGHTS, False)  # written at strip, before quantizers are replaced
        if any(not (own_masks and is_mask(hook.module)) for hook in hooks(model)):
            msg = f"'{self.name}': the model carries NNCF hooks that are not of this list. Call nncf.strip first."
            raise QuantizationError(msg)
        samples = calibration_samples(context, self.config.samples)
        out_of_scope = self._out_of_scope() | ends_of(model, context.example_inputs).in_float
        parts = parts_of(self.config, model, context.example_inputs)
        for part in parts:
            if not part.operations:
                nncf_logger.warning(f"{self.name}: {part.key} matches no operation, and is passed over.")

        def quantize(network: nn.Module, in_float: Collection[str]) -> None:
            def alike(network: nn.Module, config: QuantizationConfig) -> None:
                options = quantize_options(config, len(samples), out_of_scope | set(in_float))
                try:
                    with evaluating(network, changes=True):
                        quantize_in_place(network, nncf.Dataset(samples), **options)
                except Exception as error:
                    what = f"{type(error).__name__}: {first_line(error)}"
                    msg = f"'{self.name}': NNCF cannot quantize {type(model).__name__}: {what}"
                    raise QuantizationError(msg) from error

            quantize_parts(network, self.config, context.example_inputs, parts, alike)
            if not self.config.quantize_inputs:
                remove_hooks(network, behind_inputs(network).__contains__)

        with context.timed("quantization"), no_bars_in_pipes():
            if self.config.accuracy_control is not None:
                self._controlled = self._control(quantize, self.config.accuracy_control)
            quantize(model, () if self._controlled is None else self._controlled.in_float)
        if not any(is_quantizer(hook.module) for hook in hooks(model)):
            msg = f"'{self.name}': no operation is in scope. Widen target_scopes or ignored_scopes."
            raise QuantizationError(msg)
        self._begun = True
        adapt_batch_norm(context, self.config.initializer.batchnorm_adaptation.num_bn_adaptation_samples)
        self._tell_optimizer()

    def _control(self, quantize: Callable[[nn.Module, Collection[str]], None], asked: AccuracyControl) -> Controlled:
        context = self.context
        batches = labelled_samples(context, asked.num_samples)
        found = control(context.model, quantize, context.example_inputs, batches, asked.max_drop)
        samples = sum(len(labels) for _, labels in batches)
        nncf_logger.info(
            f"{self.name}: accuracy on {samples} training samples {found.accuracy:.2%} "
            f"({found.float_accuracy:.2%} in float) with {len(found.in_float)} layers in float"
            + "".join(f", {name}" for name in found.in_float)
        )
        return found

    def _tell_optimizer(self) -> None:
        """Ranges are trained like weights: they join the first group of parameters."""
        for hook in hooks(self.context.model):
            refuse_checkpointing(hook.module)
        if self.context.optimizer is not None:
            ranges = [p for hook in hooks(self.context.model) for p in hook.module.parameters() if p.requires_grad]
            join_first(self.context.optimizer, ranges)


def calibration_samples(context: Context, count: int) -> list[Any]:
    """The first samples of the training loader, one by one: statistics of NNCF are those of single samples.

    :param context: with a training loader.
    :param count: how many, at most.
    :raises QuantizationError: the loader gives no tensor.
    """
    samples: list[Any] = []
    for batch in context.batches():
        wanted = min(count_of(batch), count - len(samples))
        samples += [rows_of(batch, at, at + 1) for at in range(wanted)]
        if len(samples) >= count:
            return samples
    if not samples:
        msg = "'quantization': the train_loader holds no sample. Ranges are measured on its samples."
        raise QuantizationError(msg)
    return samples


def behind_inputs(model: nn.Module) -> set[nn.Module]:
    """The quantizers of a model's inputs.

    :param model: with quantizers.
    """
    own = {name for name, _ in model_tensors(model).named()}
    found = (hook for hook in hooks(model) if not hook.before and "/" not in hook.operation)
    return {hook.module for hook in found if hook.operation not in own and is_quantizer(hook.module)}


def stored(quantizer: nn.Module) -> StoredQuantizer:
    """What files hold of one of NNCF's quantizers.

    :param quantizer: NNCF's, with 8 bits.
    """
    levels = levels_of(quantizer)
    result = StoredQuantizer(signed=levels.signed, size=levels.scale.numel(), axis=levels.axis)
    result.set(levels.scale, levels.zero_point)
    return result.to(levels.scale.device)


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`Quantization`."""
    return [Quantization]
