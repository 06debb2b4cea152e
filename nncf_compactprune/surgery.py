"""Cuts a model to a plan, in place, whole or not at all, and proves the result.

Parameters keep their identity (``p.data`` is replaced), so optimizers, EMA copies and tied names hold on; optimizer
state of a parameter's shape is cut by the same plan.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nncf_compactprune.channels.facts import facts_for
from nncf_compactprune.channels.tensors import model_tensors, named_modules
from nncf_compactprune.channels.trace import call_model, evaluating
from nncf_compactprune.errors import SelfCheckError
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins, default_plugins

logger = logging.getLogger("nncf")

SELF_CHECK_TOLERANCE = 1e-5
PLAN_ATTRIBUTE = "compactprune_plan"
CONFIG_ATTRIBUTE = "compactprune"  # of a Hugging Face config: what it said of the dense model
CLASS_COUNTS = ("num_classes", "num_labels")  # as timm's and Hugging Face's models call them


Change = Callable[[], object]


class Transaction:
    """Records every change so that all can be undone, in reverse order, and done again.

    Tensors are kept by reference: both ways are exact to the bit and cost no copy.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Change, Change]] = []
        self._undone: list[tuple[Change, Change]] = []

    def _do(self, change: Change, undo: Change) -> None:
        self._changes.append((change, undo))
        change()

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Replaces a tensor's data, keeping its identity; its gradient is dropped."""
        old_data, old_grad = tensor.data, tensor.grad

        def change() -> None:
            tensor.grad = None
            _replace_data(tensor, data)

        def undo() -> None:
            _replace_data(tensor, old_data)
            tensor.grad = old_grad

        self._do(change, undo)

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """Sets an attribute."""
        if hasattr(target, name):
            old = getattr(target, name)
            self._do(lambda: setattr(target, name, value), lambda: setattr(target, name, old))
        else:
            self._do(lambda: setattr(target, name, value), lambda: delattr(target, name))

    def set_item(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Sets a dictionary entry that exists."""
        old = target[key]
        self._do(lambda: target.__setitem__(key, value), lambda: target.__setitem__(key, old))

    def delete_item(self, target: dict[Any, Any], key: Any) -> None:
        """Deletes a dictionary entry."""
        old = target[key]
        self._do(lambda: target.__delitem__(key), lambda: target.__setitem__(key, old))

    def rollback(self) -> None:
        """Undoes everything."""
        self._undone = self._changes
        self._changes = []
        for _, undo in reversed(self._undone):
            undo()

    def replay(self) -> None:
        """Does again what :meth:`rollback` undid."""
        self._changes, self._undone = self._undone, []
        for change, _ in self._changes:
            change()


def _replace_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data``, with no memory of the old shape.

    While an old graph is alive (a loss that is still in scope), autograd keeps the parameter's gradient accumulator,
    which expects the old shape. It is renewed only when dtype or device change, so the dtype changes for a moment.
    """
    torch.clear_autocast_cache()  # or a surrounding autocast goes on with its copy of the old data
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


@contextmanager
def transaction() -> Iterator[Transaction]:
    """All or nothing: an exception inside undoes every recorded change."""
    log = Transaction()
    try:
        yield log
    except BaseException:
        log.rollback()
        raise


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that made a model what it is, from its dense form on (several prunings composed), or None."""
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    return plan if isinstance(plan, PruningPlan) else None


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Cuts a dense model to the plan, in place.

    Gradients of cut parameters are dropped. Outside references to the parameters stay valid.

    :param optimizer: its per-parameter state (momentum, moments) is cut alike; state of another shape is reset.
    :param ema: a module with the same parameter names, or a holder with a ``module`` attribute; cut alike.
    :raises PlanError: the plan does not fit; the model is untouched.
    """
    plan.validate(model)
    plan.validate_consistency(model)
    with transaction() as log:
        cut(log, model, plan, optimizer=optimizer, ema=ema, plugins=plugins)


def cut(
    log: Transaction,
    model: nn.Module,
    plan: PruningPlan,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    plugins: Plugins | None = None,
) -> None:
    """The same inside a running transaction, for a plan that was validated."""
    shadow = None if ema is None else _matching_module(ema, plan)
    if optimizer is not None:
        _cut_optimizer(log, model, plan, optimizer)
    for module in (model, *(() if shadow is None else (shadow,))):
        _cut_module(log, module, plan, plugins or default_plugins())
        earlier = plan_of(module)
        log.set_attribute(module, PLAN_ATTRIBUTE, plan if earlier is None else earlier.then(plan))


def _matching_module(ema: nn.Module, plan: PruningPlan) -> nn.Module:
    module = getattr(ema, "module", ema)
    plan.validate(module)
    return module


def _cut_module(log: Transaction, model: nn.Module, plan: PruningPlan, plugins: Plugins) -> None:
    tensors = model_tensors(model).all()
    dims = {id(tensors[name]): kept for name, kept in plan.kept.items()}
    updates: list[tuple[object, dict[str, Any]]] = _class_counts(model, plan, tensors) if plan.output_classes else []
    for _, module in named_modules(model):
        shapes = _own_shapes(module, dims)
        facts = facts_for(module, plugins.module_facts) if shapes else None
        if facts is not None:
            updates.append((module, facts(module, shapes)))
    for name in plan.kept:
        log.set_data(tensors[name], select(tensors[name].data, plan.selection(name)))
    for name, attributes in plan.attributes.items():
        updates.append((model.get_submodule(name), dict(attributes)))
    for target, attributes in updates:
        for attribute, value in attributes.items():
            log.set_attribute(target, attribute, value)


def _class_counts(
    model: nn.Module, plan: PruningPlan, tensors: Mapping[str, Tensor]
) -> list[tuple[object, dict[str, Any]]]:
    """What modules and a Hugging Face config say of the classes: its own loss goes by it."""
    classes = plan.output_classes
    before = {tensors[name].shape[0] for name, dims in plan.kept.items() if dims.get(0) == classes}
    updates: list[tuple[object, dict[str, Any]]] = [
        (module, {count: len(classes)})
        for _, module in named_modules(model)
        for count in CLASS_COUNTS
        if getattr(module, count, None) in before
    ]
    config = getattr(model, "config", None)
    labels = getattr(config, "id2label", None)
    if isinstance(labels, Mapping) and len(labels) in before:
        said = getattr(config, CONFIG_ATTRIBUTE, None) or {}
        dense = {**said.get("dense", {}), "id2label": dict(labels), "label2id": getattr(config, "label2id", None)}
        names = {at: labels[c] for at, c in enumerate(classes)}
        left = {name: at for at, name in names.items()}
        updates.append((config, {"id2label": names, "label2id": left, CONFIG_ATTRIBUTE: {**said, "dense": dense}}))
    return updates


def _own_shapes(module: nn.Module, dims: Mapping[int, Mapping[int, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """New shapes of a module's own tensors, tied and parametrized ones too; empty where none of them is cut."""
    own: dict[str, tuple[Any, Mapping[int, tuple[int, ...]]]] = {
        name: (tensor.shape, dims.get(id(tensor), {}))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    for name, parametrization in getattr(module, "parametrizations", {}).items():
        cut_dims: dict[int, tuple[int, ...]] = {}
        for original in parametrization._parameters.values():
            cut_dims.update(dims.get(id(original), {}))
        own[name] = (getattr(module, name).shape, cut_dims)
    if not any(kept for _, kept in own.values()):
        return {}
    return {
        name: tuple(len(kept[d]) if d in kept else n for d, n in enumerate(shape))
        for name, (shape, kept) in own.items()
    }


def select(data: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """The kept part of a tensor, in the same memory format."""
    channels_last = (
        data.dim() == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last)
    )
    for dim, positions in dims.items():
        data = data.index_select(dim, positions.to(data.device))
    return data.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _cut_optimizer(log: Transaction, model: nn.Module, plan: PruningPlan, optimizer: Optimizer) -> None:
    for name, parameter in model_tensors(model).parameters.items():
        if name not in plan.kept or parameter not in optimizer.state:
            continue
        state = optimizer.state[parameter]
        for key, value in list(state.items()):
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape == parameter.shape:
                log.set_item(state, key, select(value, plan.selection(name)))
            else:
                logger.warning("Optimizer state '%s' of '%s' has a shape of its own; it starts anew.", key, name)
                log.delete_item(optimizer.state, parameter)
                break


@dataclass(frozen=True)
class SelfCheck:
    """Result of comparing the compact with the masked model.

    :param error: largest absolute difference over all outputs, relative to the largest absolute value of that output.
    :param dtype: the precision it was compared in.
    :param seconds: wall time of the extra forward passes.
    """

    error: float
    dtype: str
    seconds: float


def prune_in_place(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    plugins: Plugins | None = None,
    self_check: bool = True,
    dry_run: bool = False,
) -> SelfCheck | None:
    """Cuts a model to a plan and proves that it computes what the masked model computed.

    The masked model is the dense one with every removed slice set to zero, consumers included (a BatchNorm shift would
    turn a zero channel into a constant otherwise). Where a LayerNorm over channels was cut by consent, the masked
    model takes its statistics over the kept channels.

    :param example_inputs: what both are run on, in eval mode: its first example, at half the resolution where that is
        large and the model takes it (see :func:`check_inputs`).
    :param dry_run: put everything back after the check.
    :return: the comparison, or None without ``self_check``.
    :raises PlanError: the plan does not fit.
    :raises SelfCheckError: the cut model does not run or computes something else. The model, optimizer and EMA copy are
        bit for bit what they were.
    """
    plan.validate(model)
    with transaction() as log:
        cut(log, model, plan, optimizer=optimizer, ema=ema, plugins=plugins)
        if not self_check:
            return None
        started = time.perf_counter()
        inputs, compact, expected = _compared(log, model, plan, example_inputs)
        error = _difference(expected, compact, plan.output_classes)
        dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
        if error > SELF_CHECK_TOLERANCE and dtype != "float64":
            # rounding of many float32 layers, or a wrong cut? float64 tells them apart
            compact = _run_in_double(model, inputs, "after the cut")
            log.rollback()
            with masked(model, plan):
                expected = _run_in_double(model, inputs, "with masks")
            log.replay()
            error, dtype = _difference(expected, compact, plan.output_classes), "float64"
        if not error <= SELF_CHECK_TOLERANCE:
            msg = (
                f"self-check: the pruned {type(model).__name__} differs from the masked one by {error:.1e} (largest "
                f"difference over largest output, {dtype}), expected at most {SELF_CHECK_TOLERANCE:.0e}. "
                "The model was restored. Please report the architecture; ignored_scopes can leave the layer out."
            )
            raise SelfCheckError(msg)
        if dry_run:
            log.rollback()
        return SelfCheck(error, dtype, time.perf_counter() - started)


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """The dense model with everything that goes set to zero; its own weights are back afterwards, bit for bit."""
    parameters = model_tensors(model).parameters
    log = Transaction()
    try:
        for name in plan.kept:
            if name in parameters:
                log.set_data(parameters[name], zero_removed(parameters[name].data, plan.masked_dims(name)))
        with NormOverKept(model, plan):
            yield
    finally:
        log.rollback()


LARGE_IMAGE = 128


def check_inputs(example_inputs: Any) -> list[Any]:
    """What a comparison may run on, cheapest first, the example input itself last.

    One example tells as much about channels as many, and every other pixel of a large image as much as all: what
    differs between a masked and a wrongly cut model are channels, at every position. Not every model runs on these, so
    the next one is for when the masked model does not.
    """
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors:
        return [example_inputs]
    candidates = [example_inputs]
    batch = len(tensors[0])
    if batch > 1 and all(len(leaf) == batch for leaf in tensors):
        candidates.append(_on_tensors(lambda leaf: leaf[:1], example_inputs, 1))
    images = [leaf for leaf in tensors if leaf.dim() > 2]
    if len(images) == 1 and images[0].dim() == 4 and min(images[0].shape[2:]) >= LARGE_IMAGE:
        candidates.append(_on_tensors(lambda leaf: leaf[..., ::2, ::2], candidates[-1], 4))
    return candidates[::-1]


def _on_tensors(change: Callable[[Tensor], Tensor], inputs: Any, least_dims: int) -> Any:
    return tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, Tensor) and leaf.dim() >= least_dims else leaf, inputs
    )


def _compared(
    log: Transaction, model: nn.Module, plan: PruningPlan, example_inputs: Any
) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The first of the check inputs that both models run on, with the outputs of the compact and of the masked one.

    The compact model comes first: where its code does not let it shrink, it fails early, and the dense one need not
    run at all.
    """
    failure: SelfCheckError | None = None
    for inputs in check_inputs(example_inputs):
        try:
            compact = _run(model, inputs, "after the cut")
            log.rollback()
            try:
                with masked(model, plan):
                    return inputs, compact, _run(model, inputs, "with masks")
            finally:
                log.replay()
        except SelfCheckError as error:
            failure = error
    assert failure is not None
    raise failure


def zero_removed(data: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A copy with every removed position set to zero."""
    data = data.clone()
    for dim, positions in dims.items():
        removed = torch.ones(data.shape[dim], dtype=torch.bool, device=data.device)
        removed[positions.to(data.device)] = False
        data.index_fill_(dim, removed.nonzero().ravel(), 0)
    return data


def _run(model: nn.Module, example_inputs: Any, when: str) -> list[Tensor]:
    try:
        with evaluating(model):
            output = call_model(model, example_inputs)
    except Exception as error:
        first = str(error).strip().splitlines()
        msg = (
            f"self-check: {type(model).__name__} does not run {when}: {type(error).__name__}: "
            f"{first[0] if first else ''}. The model was restored."
        )
        raise SelfCheckError(msg) from error
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """The model in double precision; its own tensors are back afterwards, bit for bit."""
    log = Transaction()
    try:
        for _, tensor in model_tensors(model).named():
            if tensor.is_floating_point():
                log.set_data(tensor, tensor.data.double())
        yield
    finally:
        log.rollback()


def to_double(leaf: Any) -> Any:
    """A floating tensor in double precision; anything else as it is."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _run_in_double(model: nn.Module, example_inputs: Any, when: str) -> list[Tensor]:
    with in_double(model):
        return _run(model, tree_map(to_double, example_inputs), when)


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor], classes: Sequence[int]) -> float:
    """Largest difference over all outputs, each relative to its largest absolute value; inf where shapes differ.

    :param classes: what a cut classifier still tells apart: those of the expected scores are compared.
    """
    worst = 0.0
    if len(expected) != len(actual):
        return math.inf
    for a, b in zip(expected, actual, strict=True):
        if classes and a.shape != b.shape and a.dim() > 1 and a.shape[1] > max(classes):
            a = a[:, list(classes)]
        if a.shape != b.shape:
            return math.inf
        if a.numel() == 0:
            continue
        if not torch.isfinite(a).all():
            msg = "self-check: the model's outputs are not finite on the example input, so nothing can be compared."
            raise SelfCheckError(msg)
        scale = float(a.abs().max()) or 1.0
        error = float((a.double() - b.double()).abs().max()) / scale
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst


class NormOverKept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Masked LayerNorm, one-group GroupNorm and weight standardisation take their statistics over the kept channels, as
    the compact ones do."""

    def __init__(self, model: nn.Module, plan: PruningPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = {}
        self._kept_inputs = {}
        if plan.approximate:
            for name, parameter in model_tensors(model).parameters.items():
                dims = plan.kept.get(name, {})
                if parameter.dim() == 1 and 0 in dims:
                    self._kept[id(parameter)] = plan.indices(name, 0).to(parameter.device)
                elif parameter.dim() > 2 and 1 in dims:
                    self._kept_inputs[id(parameter)] = plan.indices(name, 1).to(parameter.device)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_layer_norm.default and id(args[2]) in self._kept:
            x, _, weight, bias, eps = args
            kept = self._kept[id(weight)]
            out, mean, rstd = func(
                x.index_select(-1, kept), [len(kept)], weight[kept], None if bias is None else bias[kept], eps
            )
            return x.new_zeros(x.shape).index_copy_(-1, kept, out), mean, rstd
        if func is torch.ops.aten.native_group_norm.default and args[6] == 1 and id(args[1]) in self._kept:
            x, weight, bias, n, _, positions, groups, eps = args
            kept = self._kept[id(weight)]
            out, mean, rstd = func(
                x.index_select(1, kept).contiguous(), weight[kept], None if bias is None else bias[kept],
                n, len(kept), positions, groups, eps,
            )  # fmt: skip
            return x.new_zeros(x.shape).index_copy_(1, kept, out), mean, rstd
        if func in _BATCH_NORMS and id(args[0]._base) in self._kept_inputs:
            x, parameter = args[0], args[0]._base
            taps = parameter[0, 0].numel()
            kept = self._kept_inputs[id(parameter)]
            kept = (kept[:, None] * taps + torch.arange(taps, device=kept.device)).reshape(-1)
            out, *statistics = func(x.index_select(2, kept).contiguous(), *args[1:], **kwargs)
            return x.new_zeros(x.shape).index_copy_(2, kept, out), *statistics
        return func(*args, **kwargs)


_BATCH_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten._native_batch_norm_legit.no_stats)
