"""NNCF's quantizers on a torch model: putting them there, and reading what they came to.

Where they sit (which activations share one) is NNCF's knowledge of what runtimes fuse.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nncf
import torch
import torch.ao.quantization.fx._decomposed  # makes the operations of PAIRS
from nncf.common.graph import NNCFGraph, NNCFNode
from nncf.common.quantization.structs import QuantizationScheme as QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.torch.function_hook import get_hook_storage, is_wrapped, wrap_model
from nncf.torch.model_graph_manager import get_const_node
from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
from nncf.torch.quantization.layers import BaseQuantizer as BaseQuantizer
from nncf.torch.quantization.layers import SQMultiply
from nncf.torch.quantization.reference import torch_executor
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase

from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import Hook, hooks, nncf_graph
from nncf_compactprune.host.nncf_sparsity import is_mask
from nncf_compactprune.host.tensors import NNCF_HOOKS, named_modules, own_tensors

#: torch's operations that take numbers to levels and back, as exported programs hold them
PAIRS = torch.ops.quantized_decomposed

#: NNCF's types of operations that sum products: what 8 bits are for
PRODUCTS = {f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3)} | {
    "linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "addmm", "baddbmm", "einsum", "bilinear",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
#: the input that must not become 0, by NNCF's types of operations
DIVISORS = dict.fromkeys(("div", "div_", "divide", "divide_", "true_divide", "true_divide_"), 1) | dict.fromkeys(
    ("__rdiv__", "reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "log", "log_", "log2", "log10"), 0
)
#: averages: what rounds their inputs does not make 0 of their result
AVERAGES = {
    "mean", "sum", "norm", "linalg_vector_norm", "var", "std", "var_mean", "amax", "softmax", "logsumexp",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
}  # fmt: skip


#: operations of hooks themselves, in NNCF's names
INSIDE_HOOK = re.compile(r"(^|/)(pre|post)_hook__")


@dataclass(frozen=True)
class Ends:
    """Where the products of a network begin and end, by NNCF's names of operations.

    :param first: the product that runs first; empty where there is none.
    :param last: products whose results no other product reads: a classifier's last layer, a detector's of every level.
    :param in_float: operations that 8 bits would spoil and not speed up: those that lead to no product, such as what
        makes boxes of distances, divisions by what the network computes, and what leads from sums to such a divisor.
    """

    first: str
    last: frozenset[str]
    in_float: frozenset[str]


@dataclass(frozen=True)
class Met:
    """The quantizers that an operation meets, by their keys as hooks.

    :param weights: of its constant inputs.
    :param activations: those that its other inputs last met.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]


@dataclass(frozen=True)
class Levels:
    """What an 8-bit quantizer of NNCF rounds to.

    :param signed: -128 ... 127, else 0 ... 255.
    :param scale: step sizes, ``[channels]`` or ``[1]``.
    :param zero_point: the levels that mean 0, of the same size.
    :param axis: the dimension of the channels.
    """

    signed: bool
    scale: Tensor
    zero_point: Tensor
    axis: int


def belongs_into_files(module: nn.Module) -> bool:
    """Whether a hook of NNCF is part of what a quantized network computes, other than its quantizers: SmoothQuant's
    factors before a layer, whose weight holds their inverse."""
    return isinstance(module, SQMultiply)


def smooth_quant_factors(shape: Sequence[int]) -> nn.Module:
    """SmoothQuant's factors before a layer, without values yet.

    :param shape: of the factors.
    """
    module: nn.Module = SQMultiply(tuple(shape))
    return module


def is_quantizer(module: nn.Module) -> bool:
    """Whether a hook is one of NNCF's quantizers."""
    return isinstance(module, BaseQuantizer)


def quantize_in_place(model: nn.Module, dataset: nncf.Dataset, **options: Any) -> None:
    """``nncf.quantize``, which returns a copy, on the model itself: parameters and hooks keep their identity.

    :param model: carries no hooks but masks of single weights, in front of which no quantizer comes; as it was when
        NNCF fails.
    :param dataset: for NNCF's statistics.
    :param options: of ``nncf.quantize``.
    """
    with quiet(), not_compiled():
        quantized = nncf.quantize(model, dataset, **options)
    theirs = dict(named_modules(quantized))
    with torch.no_grad():
        for name, module in named_modules(model):
            new = own_tensors(theirs[name])
            for key, tensor in own_tensors(module).items():
                tensor.copy_(new[key])  # biases are corrected, weights may be smoothed
    if not is_wrapped(model):
        wrap_model(model)
    masks = list(hooks(model))
    storage = get_hook_storage(quantized)
    for mask in masks:  # learned ones are parameters, which an optimizer holds
        storage.set_submodule(mask.key, mask.module)
    model._modules[NNCF_HOOKS] = storage


def ends_of(model: nn.Module, example_inputs: Any) -> Ends:
    """Finds where products begin and end, and what stays in float. With 8 bits for a coordinate, boxes of a 640-pixel
    picture would round to whole steps of 2.5. A small divisor would round to 0: linear attention divides by sums.

    :param model: without hooks, no bare ``nn.Sequential``.
    :param example_inputs: a tensor, a tuple or a dict.
    """
    with not_compiled(), evaluating(model):
        graph = nncf_graph(model, example_inputs)
    leads: dict[int, bool] = {}  # whether a product comes later
    divides: dict[int, bool] = {}  # whether its result becomes a divisor
    products: list[Any] = []
    in_float: set[str] = set()
    for node in reversed(graph.topological_sort()):
        later = [n for n in graph.get_next_nodes(node) if leads[n.node_id] or n.node_type in PRODUCTS]
        leads[node.node_id] = bool(later)
        sums = node.node_type in PRODUCTS or node.node_type in AVERAGES
        divides[node.node_id] = not sums and any(
            divides[edge.to_node.node_id] or DIVISORS.get(edge.to_node.node_type) == edge.input_port_id
            for edge in graph.get_output_edges(node)
        )
        if node.node_type in PRODUCTS:
            products.append(node)
        elif "/" in node.node_name and (not later or divides[node.node_id] or _divides_by_result(graph, node)):
            in_float.add(node.node_name)
    last = frozenset(node.node_name for node in products if not leads[node.node_id])
    first = min(products, key=lambda node: node.node_id).node_name if products else ""
    return Ends(first, last, frozenset(in_float))


def _divides_by_result(graph: NNCFGraph, node: NNCFNode) -> bool:
    """Whether an operation divides by something that is no constant."""
    port = DIVISORS.get(node.node_type)
    return any(edge.input_port_id == port and "/" in edge.from_node.node_name for edge in graph.get_input_edges(node))


def quantizer_state(model: nn.Module) -> dict[str, Any]:
    """The hooks of a model but its masks as plain data, without NNCF's classes: for :func:`restore_quantizers`."""
    masks = {hook.key for hook in hooks(model) if is_mask(hook.module)}
    state: dict[str, Any] = nncf.torch.get_config(model)
    others = {
        key: [command for command in commands if masks.isdisjoint(command["hook_names_in_model"])]
        for key, commands in state.items()
    }
    plain: dict[str, Any] = json.loads(json.dumps(others))  # files that hold it are read without running code
    return plain


def restore_quantizers(model: nn.Module, state: dict[str, Any]) -> None:
    """Puts quantizers where they were; their ranges come with the weights.

    :param model: without hooks but masks, changed in place.
    :param state: what :func:`quantizer_state` gave.
    """
    nncf.torch.load_from_config(model, state)


def quantizers_by_operation(model: nn.Module, example_inputs: Any) -> dict[str, Met]:
    """What operations are quantized by, those that meet a quantizer.

    :param model: with quantizers, in evaluation mode.
    :param example_inputs: what NNCF's graph is built with.
    :return: by NNCF's name of the operation, in the order of execution.
    """
    own: dict[str, list[Hook]] = {}
    behind: dict[str, list[str]] = {}
    for hook in hooks(model, shared=True):
        if is_quantizer(hook.module) and hook.before:
            own.setdefault(hook.operation, []).append(hook)
        elif is_quantizer(hook.module):
            behind.setdefault(hook.operation, []).append(hook.key)
    with not_compiled():
        graph = nncf_graph(model, example_inputs)
    found = {}
    for node in graph.topological_sort():
        if INSIDE_HOOK.search(node.node_name):
            continue
        before = own.get(node.node_name, [])
        weights = [hook.key for hook in before if get_const_node(node, hook.port, graph) is not None]
        keys = [hook.key for hook in before if hook.key not in weights]
        waiting, seen = [node], set()
        while waiting:
            for giver in graph.get_previous_nodes(waiting.pop()):
                if giver.node_name in behind:
                    keys += behind[giver.node_name]
                elif giver.node_id not in seen and giver.node_type not in PRODUCTS:
                    seen.add(giver.node_id)
                    waiting.append(giver)
        if weights or keys:
            found[node.node_name] = Met(tuple(weights), tuple(dict.fromkeys(keys)))
    return found


def replace_hooks(model: nn.Module, keys: Collection[str], other: nn.Module) -> None:
    """Takes hooks of another model in the place of a model's own.

    :param model: with hooks, changed in place.
    :param keys: of the hooks, as :class:`~.nncf_hooks.Hook` names them; those that ``other`` lacks stay.
    :param other: a copy of the model with other hooks.
    """
    storage = get_hook_storage(model)
    for hook in hooks(other, shared=True):
        if hook.key in keys:
            storage.set_submodule(hook.key, hook.module)


@contextmanager
def without(model: nn.Module, keys: Collection[str]) -> Iterator[None]:
    """Some hooks pass through what they see, for as long as the body runs.

    :param model: with hooks.
    :param keys: of hooks, as :class:`~.nncf_hooks.Hook` names them.
    """
    storage = get_hook_storage(model)
    taken = {key: storage.get_submodule(key) for key in keys}
    try:
        for key in taken:
            storage.set_submodule(key, nn.Identity())
        yield
    finally:
        for key, module in taken.items():
            storage.set_submodule(key, module)


def levels_of(quantizer: nn.Module) -> Levels:
    """What a quantizer of NNCF rounds to when the model is deployed. Half the range means the same step.

    :param quantizer: one of NNCF's, with 8 bits.
    """
    if not isinstance(quantizer, BaseQuantizer):
        msg = f"expected a quantizer of NNCF, got {type(quantizer).__name__}"
        raise TypeError(msg)
    low, _, scale, zero_point = quantizer.get_parameters_for_torch_fq()
    shape = list(quantizer.scale_shape)
    return Levels(low < 0, scale.detach(), zero_point.detach(), shape.index(max(shape)))


def replace_quantizers(model: nn.Module, example_inputs: Any, replace: Any) -> int:
    """Exchanges every quantizer of NNCF for another hook, in place. Weights take their rounded values: what a narrow or
    a half range leaves out cannot come back.

    :param model: in evaluation mode.
    :param example_inputs: what NNCF's graph is built with.
    :param replace: makes the new hook from a quantizer.
    :return: how many quantizers there were.
    """
    storage = get_hook_storage(model)
    with not_compiled():
        graph = nncf_graph(model, example_inputs)
    new: dict[int, nn.Module] = {}
    for hook in hooks(model, shared=True):
        if not isinstance(hook.module, BaseQuantizer):
            continue
        parameter = _weight(model, graph, hook)
        if parameter is not None:
            with torch.no_grad(), not_compiled():
                parameter.copy_(hook.module.quantize(parameter))
        if id(hook.module) not in new:
            new[id(hook.module)] = replace(hook.module)
        storage.set_submodule(hook.key, new[id(hook.module)])
    return len(new)


def _weight(model: nn.Module, graph: Any, hook: Hook) -> nn.Parameter | None:
    """The parameter that a quantizer sees, None for activations."""
    name = hook.operation
    if hook.before:
        try:
            constant = get_const_node(graph.get_node_by_name(hook.operation), hook.port, graph)
        except nncf.InternalError:  # an activation, as the inputs of attention's products are
            return None
        if constant is None:
            return None
        name = constant.layer_attributes.name
    return dict(model.named_parameters()).get(name)


#: the parameters of NNCF's quantizers that have its scales' shape
SCALES = ("_scale_param_storage", "_input_range_param_storage", "input_low")


def carries_quantizers(model: nn.Module) -> bool:
    """Whether a model has quantizers of ``nncf.quantize``, or torch's own, which ``nncf.strip`` puts in their place."""
    return any(isinstance(hook.module, (BaseQuantizer, FakeQuantizeBase)) for hook in hooks(model))


def quantizer_places(
    model: nn.Module, batches: Sequence[Any], *, target_device: str, ignored: Collection[str] = ()
) -> list[Hook]:
    """The quantizers that ``nncf.quantize`` puts on a copy of a model.

    :param model: stays as it is.
    :param batches: a few of its inputs. NNCF wants them; what it measures on them is not used.
    :param target_device: a name of ``nncf.TargetDevice``.
    :param ignored: NNCF's names of operations that are not quantized.
    :return: one hook of the copy for each quantizer.
    """
    with quiet():
        quantized = nncf.quantize(
            copy.deepcopy(model),
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice[target_device],
            subset_size=len(batches),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=sorted(ignored), validate=False),
            advanced_parameters=AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    return [hook for hook in hooks(quantized) if is_quantizer(hook.module)]


class _Eager:
    """NNCF's quantization as torch operations, one after the other."""

    Quantize_forward = torch_executor.forward
    Quantize_backward = torch_executor.backward


@contextmanager
def not_compiled() -> Iterator[None]:
    """NNCF's quantizers run as plain torch operations. At their first call on a CPU NNCF otherwise compiles an
    extension, which takes a minute and needs a compiler, and pays off in training only."""
    before = QuantizedFunctionsCPU._loaded_namespace
    QuantizedFunctionsCPU._loaded_namespace = before or _Eager
    try:
        yield
    finally:
        QuantizedFunctionsCPU._loaded_namespace = before


@contextmanager
def quiet() -> Iterator[None]:
    """NNCF warns of few samples."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
