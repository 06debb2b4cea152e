"""Plans across versions of transformers, which rename layers and keep the names in their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from nncf_compactprune.channels.groups import fingerprint
from nncf_compactprune.channels.terms import HEAD_COUNTS, HEAD_PRODUCTS
from nncf_compactprune.host.huggingface import names_in_files
from nncf_compactprune.host.tensors import model_tensors, named_modules
from nncf_compactprune.plan import PruningPlan


def names_to_save(model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    """What else a file calls the parameters that a plan cuts, for :func:`as_named_here`.

    :param model: the pruned network.
    :param plan: its plan.
    """
    names = names_in_files(model)
    return {name: names[name] for name in plan.kept if name in names}


def as_named_here(plan: PruningPlan, names: Mapping[str, str], model: nn.Module) -> PruningPlan:
    """The plan in the names of this version's network.

    Numbers that modules keep (``num_attention_heads``) go to the module that keeps them here: the nearest one around
    the same parameters. Products of them (``all_head_size``), which one version keeps and another does not, follow.

    :param plan: in the names of the version that saved it.
    :param names: what that version's files call its parameters, where it is something else.
    :param model: the dense network.
    :return: the same plan where all its names are there; or where some are not to be found, so that it is refused.
    """
    tensors = model_tensors(model)
    shapes = tensors.shapes()
    if plan.removed or all(name in shapes for name in plan.kept):
        return plan
    here = {file: name for name, file in names_in_files(model).items()}

    def found(name: str) -> str:
        file = names.get(name, name)
        return here.get(file, file)

    kept = {found(name): dims for name, dims in plan.kept.items()}
    if not all(name in shapes for name in kept):
        return plan
    attributes = _attributes_here(plan, found, model)
    return dataclasses.replace(
        plan, kept=kept, attributes=attributes, fingerprint=fingerprint(tensors.lasting_shapes())
    )


def _attributes_here(
    plan: PruningPlan, found: Callable[[str], str], model: nn.Module
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    modules = dict(named_modules(model))
    result: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for owner, values in plan.attributes.items():
        below = [found(name) for name in plan.kept if name.startswith(f"{owner}.")]
        around = (
            next((m for m in _around(name) if any(hasattr(modules[m], v) for v in values)), None) for name in below
        )
        for target in dict.fromkeys(name for name in around if name is not None):
            module = modules[target]
            new = {key: value for key, value in values.items() if hasattr(module, key)}
            count = next((key for key in HEAD_COUNTS if key in new), None)
            for product in HEAD_PRODUCTS if count is not None else ():
                if isinstance(whole := getattr(module, product, None), int):
                    new[product] = whole * int(new[count]) // int(getattr(module, count))  # type: ignore[index,arg-type]
            result[target] = new
    return result


def _around(name: str) -> Iterator[str]:
    """Modules around a parameter, the nearest first."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:end])
