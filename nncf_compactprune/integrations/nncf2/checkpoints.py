"""Checkpoints that NNCF 2.x wrote: the masks that its wrappers keep beside the weights, and its compression state.

Its ``filter_pruning`` keeps a mask of a layer's filters, its sparsity algorithms one of a layer's weights, both
under the layer's ``pre_ops``. The weights beside them are those before masking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.algorithms import ChannelPruning, CompressionAlgorithm, CompressionStage
from nncf_compactprune.algorithms.sparsity.base import MaskedWeights
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.nncf_quantization import QuantizationScheme
from nncf_compactprune.host.torch_internals import TransposedConvolution

#: what NNCF 2.x's own wrappers and hooks keep beside the weights
_OF_NNCF2 = re.compile(r"(^|\.)((_nncf|external_quantizers|external_op|pre_ops|post_ops)\.|nncf_padding_value$)")
_MASK = re.compile(r"(?P<module>.+)\.pre_ops\.\d+\.op\._?(?P<kind>binary_filter_pruning_mask|binary_mask|mask)")
QUANTIZATION = "quantization"

# torch.load reads checkpoints of NNCF 2.x: the one enum in them has no module in NNCF 3, so ours takes its place.
if find_spec("nncf.api") is None:
    stage = (CompressionStage, "nncf.api.compression.CompressionStage")
    torch.serialization.add_safe_globals([stage, QuantizationScheme])


@dataclass(frozen=True)
class Nncf2Masks:
    """The masks in a state dict of NNCF 2.x.

    :param filters: by module, which filters stay: booleans, ``[filters]``.
    :param weights: by parameter, which weights stay: booleans of its shape.
    :param learned: by parameter, the logits behind the masks that ``rb_sparsity`` learned.
    """

    filters: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.filters or self.weights)

    def kept(self, graph: ChannelGraph) -> list[Any]:
        """Which channels stay, for every group ``[group.size]``: all but those that no layer gives any more.

        :param graph: the model's channels.
        """
        stays = {graph.tied.get(f"{name}.weight", f"{name}.weight"): mask for name, mask in self.filters.items()}
        result = []
        for group in graph.groups:
            gone = np.ones(group.size, bool)
            makers = [member for member in group.with_role("producer") if not member.parameter.endswith(".bias")]
            for member in makers:
                mask = stays.get(member.parameter)
                if mask is None or len(mask) != graph.parameters[member.parameter][member.dim]:
                    gone[:] = False
                else:
                    gone &= ~mask.numpy()[member.indices].any(axis=1)
            gone[0] &= not gone.all()  # a layer keeps one filter, be it of zeros
            result.append(~gone if makers else np.ones(group.size, bool))
        return result

    def written(
        self, model: nn.Module, weights: Mapping[str, Tensor], algorithms: Sequence[CompressionAlgorithm]
    ) -> dict[str, Tensor]:
        """The weights with zeros where they are masked there, and no algorithm here masks them.

        :param model: whose weights these are.
        :param weights: by name.
        :param algorithms: at work on the model.
        """
        result = dict(weights)
        held = {name for one in algorithms if isinstance(one, MaskedWeights) for name in one.masked_weights}
        for name, stays in self.weights.items():
            if name in result and name not in held and result[name].shape == stays.shape:
                result[name] = result[name] * stays.to(result[name])
        plans = [one.plan for one in algorithms if isinstance(one, ChannelPruning) and one.plan is not None]
        for module, stays in self.filters.items():
            for name in (f"{module}.weight", f"{module}.bias"):
                if name in result:
                    dim = _dim(model, name)
                    masked = [plan.masked_dims(name).get(dim) for plan in plans]
                    result[name] = _without(result[name], dim, stays, [kept for kept in masked if kept is not None])
        return result


def _dim(model: nn.Module, name: str) -> int:
    """The dimension of a parameter that counts filters."""
    module, _, leaf = name.rpartition(".")
    return int(leaf == "weight" and isinstance(model.get_submodule(module), TransposedConvolution))


def _without(parameter: Tensor, dim: int, stays: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The parameter with zeros for the filters that go, but for those that are masked anyway."""
    if parameter.shape[dim] != len(stays):
        return parameter
    factor = stays.clone()
    for positions in kept:
        masked = torch.ones(len(stays), dtype=torch.bool)
        masked[positions.cpu()] = False
        factor |= masked
    view = [1] * parameter.dim()
    view[dim] = -1
    return parameter * factor.view(view).to(parameter)


def split(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Nncf2Masks, list[str]]:
    """Takes a state dict apart.

    :param weights: a state dict, without prefixes of wrappers.
    :return: what belongs to the network, NNCF 2.x's masks, and the names of what else is NNCF 2.x's own.
    """
    own, rest = {}, []
    filters: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    learned: dict[str, Tensor] = {}
    for name, value in weights.items():
        found = _MASK.fullmatch(name)
        if found is not None:
            by_filter = found["kind"] == "binary_filter_pruning_mask"
            kind = filters if by_filter else learned if found["kind"] == "mask" else fixed
            parameter = found["module"] if by_filter else f"{found['module']}.weight"
            kind[parameter] = value.detach().cpu() if kind is learned else value.detach().cpu() > 0.5
        elif not _OF_NNCF2.search(name):
            own[name] = value
        elif not name.endswith((".nncf_padding_value", ".op.uniform")):  # of which nothing is lost
            rest.append(name)
    fixed |= {name: logits.sigmoid() > 0.5 for name, logits in learned.items()}
    return own, Nncf2Masks(filters, fixed, learned), rest


def is_nncf2(state: Mapping[str, Any]) -> bool:
    """Whether a compression state is NNCF 2.x's.

    :param state: what ``get_compression_state()`` gave, there or here.
    """
    return "builder_state" in state or "ctrl_state" in state


@dataclass(frozen=True)
class Nncf2State:
    """What a compression state of NNCF 2.x says of where a run was.

    :param epoch: the last that was begun.
    :param step: the last that was begun.
    :param complete: whether the algorithms with a schedule had arrived, by name.
    """

    epoch: int
    step: int
    complete: Mapping[str, bool]

    @classmethod
    def read(cls, state: Mapping[str, Any], expected: Sequence[str]) -> Nncf2State:
        """Reads it.

        :param state: NNCF 2.x's.
        :param expected: the algorithms of the configuration.
        :raises CompactPruneError: it is of other algorithms.
        """
        parts = state.get("ctrl_state") or {}
        made_by = sorted({*parts, *(state.get("builder_state") or {})})
        if made_by != sorted(set(expected)):
            msg = (
                f"compression_state: NNCF 2.x made it by {made_by}, but the configuration has {sorted(set(expected))}. "
                "Use the configuration of that run."
            )
            raise CompactPruneError(msg)
        if QUANTIZATION in made_by:
            nncf_logger.warning(
                "compression_state: NNCF 2.x's quantizers are tied to its graph and are not taken over. Their ranges "
                "are measured anew on the registered loader, when the weights are loaded or when channels are cut."
            )
        schedules = [part.get("scheduler_state") or {} for name, part in parts.items() if name != QUANTIZATION]
        full = CompressionStage.FULLY_COMPRESSED
        return cls(
            max((int(one.get("current_epoch", -1)) for one in schedules), default=-1),
            max((int(one.get("current_step", -1)) for one in schedules), default=-1),
            {name: _number(part.get("compression_stage", 0)) == full for name, part in parts.items()},
        )


def _number(stage: Any) -> int:
    return int(getattr(stage, "value", stage))
