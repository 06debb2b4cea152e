"""``data_free_quantization``: quantization of the same paper (arXiv 2011.09058), 8 down to 4 bits, with no data.

Quantizers sit where NNCF would put them. Then, in one pass in network order, on what the quantized prefix delivers:
ranges of activations are searched, weights are re-fitted to what the float layer gives, scaled and rounded column by
column (``rounding.py``), and biases and BatchNorm statistics follow. Ours, as only the paper's abstract was
at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from nncf_compactprune.algorithms.base import CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.data_free import Reconstruction, Refits
from nncf_compactprune.algorithms.data_free.gram import Moments
from nncf_compactprune.algorithms.data_free.inputs import FOLLOWS, GenerationConfig, check_generation, inputs_for
from nncf_compactprune.algorithms.data_free.network import check_weights
from nncf_compactprune.algorithms.data_free.preconditioning import precondition
from nncf_compactprune.algorithms.data_free.quantizers import GridQuantizer, install
from nncf_compactprune.algorithms.data_free.reconstruction import LayerStep, solve, whole_or_nothing
from nncf_compactprune.algorithms.data_free.rounding import round_in_turn, search_scales
from nncf_compactprune.config import AlgorithmConfig, Section
from nncf_compactprune.decide.scopes import layers_by_operation, operations_out_of_scope
from nncf_compactprune.errors import DataFreeError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_quantization import ends_of
from nncf_compactprune.host.tensors import carries_hooks, named_modules
from nncf_compactprune.host.torch_internals import TransposedConvolution
from nncf_compactprune.plugins.hookspecs import Algorithm, hookimpl

#: of a weight and an activation together: two products fit into 16 bits, in which x86 without VNNI adds them
PAIR_BITS = 15
QUANTIZED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, TransposedConvolution)
ROUNDING_RIDGE = 0.01


class QuantizationParams(Section):
    """How a network is quantized.

    :param weight_bits: 4 to 8.
    :param activation_bits: 4 to 8.
    :param edge_bits: of the model's input, of the first layer's weights, and of the last layers', where lower bits
        cost most.
    :param per_channel: a scale for each output channel of a weight.
    :param equalise: fold BatchNorms, equalise channels over layers and absorb biases first. For weights with one scale
        in networks with very unlike channels (depthwise ones); activations pay for it, so it is off by default.
    :param ridge: how strongly re-fitted weights are held to the float ones, relative to the inputs' variance.
    :param target_device: where the network is to run; NNCF places its quantizers as this device fuses operations.
    """

    weight_bits: int = Field(default=8, ge=4, le=8)
    activation_bits: int = Field(default=8, ge=4, le=8)
    edge_bits: int = Field(default=8, ge=4, le=8)
    per_channel: bool = True
    equalise: bool = False
    ridge: float = Field(default=0.03, gt=0)
    target_device: Literal["ANY", "CPU", "GPU", "NPU"] = "CPU"


class DataFreeQuantizationConfig(AlgorithmConfig):
    """A ``data_free_quantization`` entry.

    :param overflow_fix: ``"enable"``, ``"first_layer_only"``, ``"disable"``: weights of 8 bits get 7 where activations
        have 8, for processors with AVX2 or AVX-512 and no VNNI.
    """

    unread: ClassVar[Mapping[str, str]] = {"initializer": FOLLOWS}
    overflow_fix: Literal["enable", "disable", "first_layer_only"] = "first_layer_only"
    params: QuantizationParams = QuantizationParams()
    generation: GenerationConfig = GenerationConfig()


class DataFreeQuantization(CompressionAlgorithm):
    """Quantizes when the run ends, after pruning and fine-tuning."""

    name = "data_free_quantization"
    summary = "Quantization to 8...4 bits with no data, exported as INT8 (arXiv 2011.09058)"
    Config: ClassVar[type[AlgorithmConfig]] = DataFreeQuantizationConfig
    config: DataFreeQuantizationConfig

    def __init__(self, config: DataFreeQuantizationConfig, context: Context) -> None:
        super().__init__(config, context)
        self.refits = Refits()
        self.quantizers = 0
        self._done = False

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        check_generation(self.context, self.config.generation)
        if isinstance(self.context.model, nn.Sequential):
            msg = (
                f"'{self.name}': NNCF's hooks do not work on a bare nn.Sequential (it would run the hook storage as a "
                "layer). Put it inside a module of your own."
            )
            raise DataFreeError(msg)
        self._out_of_scope()  # a wrong scope is told now, not after hours of training

    def _out_of_scope(self) -> set[str]:
        """NNCF's names of the operations that are not quantized."""
        scopes = self.config.ignored_scopes, self.config.target_scopes
        return operations_out_of_scope(self.context.model, self.context.example_inputs, *scopes)

    def strip(self) -> None:
        if self._done:
            return
        model, context = self.context.model, self.context
        check_weights(model)  # training may have gone wrong since
        if carries_hooks(model):
            msg = f"'{self.name}': the model still carries NNCF hooks. List this algorithm last."
            raise DataFreeError(msg)
        inputs = inputs_for(context, self.config.generation)
        params = self.config.params
        layers = [n for n, m in named_modules(model) if isinstance(m, QUANTIZED)]
        if not layers:
            msg = f"'{self.name}': {type(model).__name__} has no convolution and no linear layer."
            raise DataFreeError(msg)
        ends = ends_of(model, context.example_inputs)
        owners = layers_by_operation(model, context.example_inputs)
        bits = self._weight_bits(layers, owners.get(ends.first), {owners.get(operation) for operation in ends.last})
        ignored = self._out_of_scope() | ends.in_float
        with context.timed("quantization"), evaluating(model, changes=True), whole_or_nothing(model) as log:
            if params.equalise:
                precondition(log, model, context.example_inputs)
            dense = copy.deepcopy(model)  # what the layers are compared with, scaled alike
            weights, activations = install(
                model,
                inputs,
                weight_bits=bits,
                activation_bits=params.activation_bits,
                edge_activations=params.edge_bits,
                owners=owners,
                last=ends.last,
                per_channel=params.per_channel,
                target_device=params.target_device,
                ignored=ignored,
            )

            if not weights:
                msg = f"'{self.name}': no layer is in scope. Widen target_scopes or ignored_scopes."
                raise DataFreeError(msg)

            def used(name: str, weight: Tensor) -> Tensor:
                quantized: Tensor = weights[name](weight) if name in weights else weight
                return quantized

            step = rounding_step(weights, params.ridge, per_channel=params.per_channel)
            run = Reconstruction(dense, model, inputs, step=step, used=used)
            self.refits = Refits(run.run(progress="Quantizing layers"), run.left)
        self.quantizers = len(weights) + len(activations)
        self._done = True

    def _weight_bits(self, layers: Iterable[str], first: str | None, last: Collection[str | None]) -> dict[str, int]:
        """By layer, a bit less where a processor's sums of 16 bits would overflow."""
        params, fix = self.config.params, self.config.overflow_fix
        bits = {}
        for layer in layers:
            edge = layer == first or layer in last
            weight, activation = (params.edge_bits,) * 2 if edge else (params.weight_bits, params.activation_bits)
            halved = fix == "enable" or (fix == "first_layer_only" and layer == first)
            bits[layer] = min(weight, PAIR_BITS - activation) if halved else weight
        return bits

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED if self._done else CompressionStage.UNCOMPRESSED

    def get_state(self) -> dict[str, Any]:
        return {"done": self._done}

    def statistics(self) -> Mapping[str, Any]:
        params = self.config.params
        layers, left = self.refits.layers, self.refits.left
        error = sum(layer.after for layer in layers) / max(len(layers), 1)
        return {
            "stage": self.stage().name.lower(),
            "bits": f"W{params.weight_bits}A{params.activation_bits}, edges {params.edge_bits}",
            "quantizers": self.quantizers,
            "mean layer error": f"{error:.4f}",
            **({"layers left": ", ".join(left)} if left else {}),
        }


def rounding_step(weights: Mapping[str, GridQuantizer], ridge: float, *, per_channel: bool) -> LayerStep:
    """The step that re-fits a layer, chooses its scales and puts its weights on the grid.

    :param weights: quantizers by layer; a layer without one is re-fitted only.
    :param ridge: how strongly re-fitted weights are held to the float ones, relative to the inputs' variance.
    :param per_channel: a scale for each output channel; else one for each weight.
    """

    def step(name: str, rows: Tensor, found: Moments) -> Tensor:
        refitted = solve(rows, found, ridge)
        quantizer = weights.get(name)
        if quantizer is None:
            return refitted
        trusted = found.trusted  # computed at every look
        scale = search_scales(refitted, trusted, quantizer.high, per_channel=per_channel)
        quantizer.set(scale if per_channel else scale.flatten()[:1])
        return round_in_turn(refitted, scale, trusted, quantizer.high, ROUNDING_RIDGE)

    return step


@hookimpl
def compactprune_algorithms() -> Iterable[type[Algorithm]]:
    """Offers :class:`DataFreeQuantization`."""
    return [DataFreeQuantization]
