"""Which layers of a model can be expanded, and whether expanding them left its outputs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.overparameterization.factors import LAYERS
from nncf_compactprune.decide.scopes import parameters_in_scope
from nncf_compactprune.errors import ScopeError, SelfCheckError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import named_modules, own_tensors

START_TOLERANCE = 1e-4  # of whole networks, where rounding adds up; one layer keeps 1e-6


def expandable_layers(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Every convolution and linear layer that runs and whose weight is a trainable parameter of its own.

    :param model: it is run once, in eval mode.
    :param example_inputs: as the model is called.
    :return: weight name to module name, in the order of execution; a shared weight once.
    """
    names = {id(module): name for name, module in named_modules(model)}
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    order: dict[str, str] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        weight = own_tensors(module).get("weight")
        if weight is not None and weight.requires_grad and weight.is_floating_point():
            order.setdefault(first_name[id(weight)], names[id(module)])

    layers = [module for _, module in named_modules(model) if isinstance(module, LAYERS)]
    _run_once(model, example_inputs, [(module, note) for module in layers])
    return order


def _run_once(model: nn.Module, example_inputs: Any, hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> None:
    """Runs a model in eval mode with forward hooks on modules; not where there are none.

    :param model: it is only run.
    :param example_inputs: as the model is called.
    :param hooks: modules, each with its hook.
    """
    if not hooks:
        return
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        with evaluating(model):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()


def select_layers(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[str],
    target: Sequence[str] | None,
    skip_first: bool,
    skip_last: bool,
) -> tuple[dict[str, str], int]:
    """The layers to expand and to distil.

    :param model: it is run once, in eval mode.
    :param example_inputs: as the model is called.
    :param ignored: scopes that are left out.
    :param target: scopes that are meant, or None for all.
    :param skip_first: leave the first layer out.
    :param skip_last: leave the last layer out.
    :return: weight name to module name in the order of execution; and how many layers there were to choose from.
    :raises ScopeError: a scope matches nothing, or nothing is left.
    """
    candidates = expandable_layers(model, example_inputs)
    inner = list(candidates)[1 if skip_first else 0 : len(candidates) - 1 if skip_last else len(candidates)]
    allowed = parameters_in_scope(model, example_inputs, inner, ignored, target)
    layers = {weight: candidates[weight] for weight in inner if weight in allowed}
    if not layers:
        msg = (
            f"no layer to expand in {type(model).__name__}: {len(candidates)} trainable convolution and linear layers "
            f"run, {len(inner)} without the first and last (skip_first={skip_first}, skip_last={skip_last}), 0 in "
            "scope. Widen target_scopes or ignored_scopes."
        )
        raise ScopeError(msg)
    return layers, len(candidates)


def last_of_each_resolution(model: nn.Module, example_inputs: Any, names: Sequence[str]) -> list[str]:
    """Of some layers those whose output is the last of its resolution: the ends of a network's stages.

    :param model: it is run once.
    :param example_inputs: what it is called with.
    :param names: layers, in the order of execution.
    :return: their names, in the same order.
    """
    resolutions: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            resolutions[name] = tuple(output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:])

        return hook

    _run_once(model, example_inputs, [(model.get_submodule(name), note(name)) for name in names])
    ends = {resolutions[name]: name for name in names if name in resolutions}  # a later one takes the place
    return [name for name in names if name in ends.values()]


def written_over(model: nn.Module, example_inputs: Any, names: Sequence[str]) -> set[str]:
    """Of some layers those whose output an activation behind them changes in place.

    :param model: it is run once.
    :param example_inputs: what it is called with.
    :param names: layers.
    :return: their names.
    """
    seen: list[tuple[str, Tensor, int]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, output, output._version))

    _run_once(model, example_inputs, [(model.get_submodule(name), note(name)) for name in names])
    return {name for name, output, version in seen if output._version != version}


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Checks that expanding the layers changed nothing but rounding.

    :param before: outputs of the model as it was.
    :param after: outputs of the expanded model, same shapes.
    :raises SelfCheckError: an output changed by more than rounding.
    """
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point():
            continue
        precision = torch.finfo(old.dtype)
        tolerance = START_TOLERANCE if precision.eps < 1e-6 else math.sqrt(precision.eps)
        error = float((new - old).abs().max() / old.abs().max().clamp_min(precision.tiny))
        if not error <= tolerance:
            msg = (
                f"self-check: expanding the layers changed the output by {error:.1e} of its largest value, expected at "
                f"most {tolerance:.0e}. The model was restored. Please report the architecture."
            )
            raise SelfCheckError(msg)
