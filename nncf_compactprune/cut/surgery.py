"""Cuts a model to a plan, in place, whole or not at all, and proves the result.

Parameters keep their identity (``p.data`` is replaced), so optimizers, EMA copies and tied names hold on; optimizer
state of a parameter's shape is cut by the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nncf_compactprune.channels.branches import Branch, NoBranchError, shortcut
from nncf_compactprune.channels.facts import facts_for
from nncf_compactprune.channels.terms import width_of
from nncf_compactprune.cut.optimizers import cut_optimizers
from nncf_compactprune.cut.transaction import Transaction, transaction
from nncf_compactprune.errors import FixedAttributeError, PlanError
from nncf_compactprune.host.distributed import retire_wrappers
from nncf_compactprune.host.marks import memos
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.host.tensors import children, copy_in, model_tensors, named_modules, own_tensors, select
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins, default_plugins

PLAN_ATTRIBUTE = "compactprune_plan"


CONFIG_ATTRIBUTE = "compactprune"  # of a Hugging Face config: what it said of the dense model


CLASS_COUNTS = ("num_classes", "num_labels")  # as timm's and Hugging Face's models call them


# as timm's models and their heads call the width that the classifier reads; ``reset_classifier`` builds the next by it
HEAD_INPUTS = ("num_features", "head_hidden_size", "in_features", "hidden_size", "embed_dim")


Update = tuple[str, object, dict[str, Any]]  # where, what, and what is set of it


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that made a model what it is, from its dense form on (several prunings composed), or None."""
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    return plan if isinstance(plan, PruningPlan) else None


def apply_plan(
    model: nn.Module,
    plan: PruningPlan,
    *,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
) -> None:
    """Cuts a dense model to the plan, in place.

    Gradients are cut alike. Outside references to the parameters stay valid.

    :param model: any module of the architecture that the plan was made for.
    :param plan: what stays.
    :param optimizer: one or several, whose per-parameter state (momentum, moments) is cut alike; state of another
        shape starts anew.
    :param ema: a module with the same parameter names, or a holder with a ``module`` attribute; cut alike.
    :param plugins: where facts of modules come from; the installed plugins by default.
    :raises PlanError: the plan does not fit; the model is as before.
    :raises FixedAttributeError: a module does not let an attribute be set; the model is as before.
    """
    plan.validate(model)
    plan.validate_consistency(model)
    retire_wrappers(model)
    with transaction() as log:
        cut(log, model, plan, optimizer=optimizer, ema=ema, plugins=plugins)


def cut(
    log: Transaction,
    model: nn.Module,
    plan: PruningPlan,
    *,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
) -> None:
    """The same as :func:`apply_plan` inside a running transaction, for a plan that was validated.

    :param log: notes every change.
    :param model: dense, cut in place.
    :param plan: what stays; it fits the model.
    :param optimizer: see :func:`apply_plan`.
    :param ema: see :func:`apply_plan`.
    :param plugins: see :func:`apply_plan`.
    :raises FixedAttributeError: a module does not let an attribute be set; the transaction undoes what was done.
    :raises PlanError: a block does not add the branch that goes to a shortcut; undone likewise.
    """
    shadow = None if ema is None else copy_in(ema, model)
    if shadow is not None:
        plan.validate(shadow)
    if optimizer is not None:
        cut_optimizers(log, model_tensors(model).parameters, plan, optimizer)
    for module in (model, *(() if shadow is None else (shadow,))):
        _cut_module(log, module, plan, plugins or default_plugins())
        earlier = plan_of(module)
        log.set_attribute(module, PLAN_ATTRIBUTE, plan if earlier is None else earlier.then(plan))


def _cut_module(log: Transaction, model: nn.Module, plan: PruningPlan, plugins: Plugins) -> None:
    tensors = model_tensors(model).all()
    dims = {id(tensors[name]): kept for name, kept in plan.kept.items()}
    updates = _head_inputs(model, dims)
    if plan.output_classes:
        updates += _class_counts(model, plan, tensors)
    for name, module in named_modules(model):
        shapes = _own_shapes(module, dims)
        facts = facts_for(module, plugins.module_facts) if shapes else None
        if facts is not None:
            updates.append((name, module, facts(module, shapes)))
    for live, key in memos(model):
        log.delete_item(live, key)
    for name in plan.kept:
        tensor, positions = tensors[name], plan.selection(name)
        grad = tensor.grad  # batches may be accumulating across the cut
        log.set_data(tensor, select(tensor.data, positions), None if grad is None else select(grad, positions))
    for name, attributes in plan.attributes.items():
        module = model.get_submodule(name)
        values = {key: _as_kept(getattr(module, key), value) for key, value in attributes.items()}
        updates.append((name, module, values))
    for name, target, values in updates:
        for attribute, value in values.items():
            _set_attribute(log, name, target, attribute, value)
    for branch in plan.removed:
        _remove(log, model, branch)


def _remove(log: Transaction, model: nn.Module, branch: Branch) -> None:
    """Puts a block without the branch in the block's place."""
    block = model.get_submodule(branch.block)
    try:
        rest = shortcut(block, branch.layers)
    except NoBranchError as error:
        msg = f"plan: removed: '{branch.block}': {error}. The model was restored. Use the plan's own model."
        raise PlanError(msg) from error
    for _, module in named_modules(model):
        for name, child in children(module).items():
            if child is block:
                log.set_item(children(module), name, rest)


def _set_attribute(log: Transaction, name: str, target: object, attribute: str, value: Any) -> None:
    try:
        log.set_attribute(target, attribute, value)
    except Exception as error:
        msg = (
            f"surgery: '{attribute}' of {type(target).__name__} '{name}' cannot be set to {value}: {error}. The model "
            f"was restored. Make '{attribute}' an attribute that can be set, or leave the layer out by ignored_scopes."
        )
        raise FixedAttributeError(name, attribute, msg) from error


def _as_kept(old: Any, value: Any) -> Any:
    """A plan's value as the module keeps it: a list stays a list."""
    return list(value) if isinstance(old, list) else value


def _class_counts(model: nn.Module, plan: PruningPlan, tensors: Mapping[str, Tensor]) -> list[Update]:
    """What modules and a Hugging Face config say of the classes: its own loss goes by it."""
    classes = plan.output_classes
    before = {tensors[name].shape[0] for name, dims in plan.kept.items() if dims.get(0) == classes}
    updates: list[Update] = [
        (name, module, {count: len(classes)})
        for name, module in named_modules(model)
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
        updates.append(
            ("config", config, {"id2label": names, "label2id": left, CONFIG_ATTRIBUTE: {**said, "dense": dense}})
        )
    return updates


def _head_inputs(model: nn.Module, dims: Mapping[int, Mapping[int, tuple[int, ...]]]) -> list[Update]:
    """What timm's models, and the heads inside them, say of the width that a classifier reads, or the convolution that
    MobileNetV3 has before it; where both widths are the same number, it is the classifier's."""
    updates: list[Update] = []
    for prefix, network in named_modules(model):
        ask = getattr(network, "get_classifier", None)
        if ask is None or not hasattr(network, "reset_classifier"):
            continue
        try:
            classifier = ask()
        except AttributeError:  # an encoder whose head was deleted
            continue
        ends = classifier if isinstance(classifier, tuple) else (classifier,)  # a distilled network has two
        names = {id(layer): name for name, layer in named_modules(network)}
        inside = (layer for end in ends if isinstance(end, nn.Module) for layer in end.modules())
        for layer in (getattr(network, "conv_head", None), *inside):
            weight = getattr(layer, "weight", None)
            kept = dims.get(id(weight), {}).get(1)
            if weight is None or kept is None:
                continue
            steps = names[id(layer)].split(".")
            for around in (".".join(steps[:depth]) for depth in range(len(steps))):
                owner = network.get_submodule(around)
                said = [one for one in HEAD_INPUTS if width_of(owner, one) == weight.shape[1]]
                updates.append((".".join(filter(None, (prefix, around))), owner, dict.fromkeys(said, len(kept))))
    return updates


def _own_shapes(module: nn.Module, dims: Mapping[int, Mapping[int, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """New shapes of a module's own tensors, tied and parametrized ones too; empty where none of them is cut."""
    own: dict[str, tuple[Any, Mapping[int, tuple[int, ...]]]] = {
        name: (tensor.shape, dims.get(id(tensor), {})) for name, tensor in own_tensors(module).items()
    }
    for name, parametrization in getattr(module, "parametrizations", {}).items():
        cut_dims: dict[int, tuple[int, ...]] = {}
        for original in own_tensors(parametrization).values():
            cut_dims.update(dims.get(id(original), {}))
        own[name] = (getattr(module, name).shape, cut_dims)
    for name, made in vars(module).items():  # by old weight_norm and spectral_norm, and torch.nn.utils.prune
        parts = [part for key, part in own.items() if key.startswith(f"{name}_")]
        if isinstance(made, Tensor) and parts:
            alike = [kept for shape, kept in parts if len(shape) == made.dim()]
            own[name] = (made.shape, {dim: positions for kept in alike for dim, positions in kept.items()})
    if not any(kept for _, kept in own.values()):
        return {}
    return {
        name: tuple(len(kept[d]) if d in kept else n for d, n in enumerate(shape))
        for name, (shape, kept) in own.items()
    }
