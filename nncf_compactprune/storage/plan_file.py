"""The plan beside the weights: the one that a model is saved with, its digest, and the one that a file asks for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from nncf_compactprune.channels.groups import fingerprint
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import CompactPruneError, PlanError
from nncf_compactprune.host.tensors import model_tensors, named_modules
from nncf_compactprune.plan import Cost, PruningPlan

PLAN_FILE = "plan.json"
# Where the plan waits while the weights are put in place.
NEXT_PLAN_FILE = "plan.json.next"


def plan_digest(text: bytes) -> str:
    """SHA-256 of a plan's text without white space: line ends and indentation may change on the way."""
    return hashlib.sha256(b"".join(text.split())).hexdigest()


def plan_to_save(model: nn.Module) -> PruningPlan:
    tensors = model_tensors(model)
    for name, module in named_modules(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            msg = f"save_pruned: {type(module).__name__} '{name}' has extra state, which only a pickle could hold."
            raise CompactPruneError(msg)
        if name and plan_of(module) is not None:
            msg = (
                f"save_pruned: '{name}' was pruned on its own, not as a part of {type(model).__name__}. Save that "
                "module, or replay its plan on it before loading (apply_plan)."
            )
            raise CompactPruneError(msg)
    plan = plan_of(model)
    if plan is None:
        count = sum(parameter.numel() for parameter in tensors.parameters.values())
        return PruningPlan({}, fingerprint(tensors.lasting_shapes()), before=Cost(0, count), after=Cost(0, count))
    now = tensors.shapes()
    for name, dims in plan.kept.items():
        for dim, positions in dims.items():
            if name not in now or dim >= len(now[name]) or now[name][dim] != len(positions):
                msg = (
                    f"save_pruned: '{name}' of shape {now.get(name)} is not what the pruning left, {len(positions)} "
                    f"channels in dimension {dim}. A model that was rebuilt since cannot be replayed from its plan."
                )
                raise CompactPruneError(msg)
    return plan


def plan_for_weights(folder: Path, model: nn.Module, digest: str | None) -> PruningPlan:
    """The plan that belongs to the weights, checked against the model.

    Weights name their plan by its digest; without one (weights that were written otherwise) ``plan.json`` is taken.

    :param folder: where plan and weights are.
    :param model: dense.
    :param digest: what the weights name, see :func:`plan_digest`, or None.
    :raises PlanError: there is no such plan, or it does not fit the model.
    """
    path = folder / PLAN_FILE
    text = None
    for candidate in (path, folder / NEXT_PLAN_FILE) if digest is not None else (path,):
        content = _bounded(candidate, model)
        if content is not None and digest in (None, plan_digest(content)):
            path, text = candidate, content
            break
    if text is None:
        found = "is not the one that the weights were saved with" if path.is_file() else "no such file"
        msg = f"{path}: {found}. Copy {PLAN_FILE} and the weights from the same save."
        raise PlanError(msg)
    try:
        plan = PruningPlan.from_json(text)
        plan.validate(model)
        plan.validate_consistency(model)
    except PlanError as error:
        msg = f"{path}: {error}"
        raise PlanError(msg) from error
    return plan


def _bounded(path: Path, model: nn.Module) -> bytes | None:
    """A file's content, if it is not far longer than any plan for this model can be; None where there is none."""
    limit = 2**20 + sum(
        4096 + 16 * len(name) + 32 * sum(shape) for name, shape in model_tensors(model).shapes().items()
    )
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        msg = f"{path}: cannot be read ({error})."
        raise PlanError(msg) from error
    if len(content) > limit:
        msg = f"{path}: expected at most {limit} bytes for {type(model).__name__}, got more. This is no plan for it."
        raise PlanError(msg)
    return content
