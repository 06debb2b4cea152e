"""What could be pruned in a model, what it would save, and why the rest stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from nncf_compactprune.algorithms import ChannelPruningConfig
from nncf_compactprune.channels import Branch, ChannelGraph, ChannelGroup
from nncf_compactprune.config import CompressionConfig, load_config
from nncf_compactprune.cut.depth import with_branches
from nncf_compactprune.cut.diagnosis import analyse
from nncf_compactprune.decide.scopes import prunable_groups
from nncf_compactprune.errors import ResolveError
from nncf_compactprune.host.torch_internals import tree_leaves
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.run.models import ResolvedModel, resolve_model


@dataclass(frozen=True)
class InspectedGroup:
    """One prunable group.

    :param group: its channels.
    :param macs_saved: share of the model's MACs that halving it alone saves, in [0, 1].
    :param params_saved: the same of its parameters.
    :param in_scope: whether the config's scopes leave it to prune.
    :param branch: the residual branch that it may go with (``"min_channels": 0``), None where there is none.
    :param keeps_one: why there is none.
    """

    group: ChannelGroup
    macs_saved: float
    params_saved: float
    in_scope: bool
    branch: Branch | None
    keeps_one: str

    @property
    def producers(self) -> tuple[str, ...]:
        """Modules that write these channels; more than one where a sum or the like couples them."""
        owners = (member.parameter.rpartition(".")[0] for member in self.group.with_role("producer"))
        return tuple(dict.fromkeys(owners))


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    :param name: the model's name.
    :param input_shapes: shapes of the example inputs.
    :param graph: groups, pinned channels and costs.
    :param groups: the prunable groups with what halving them saves.
    """

    name: str
    input_shapes: tuple[tuple[int, ...], ...]
    graph: ChannelGraph
    groups: tuple[InspectedGroup, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON data."""
        return {
            "model": self.name,
            "input_shapes": [list(shape) for shape in self.input_shapes],
            "macs": self.graph.macs,
            "params": self.graph.params,
            "groups": [
                {
                    "name": one.group.name,
                    "channels": one.group.size,
                    "producers": list(one.producers),
                    "macs_saved_by_halving": one.macs_saved,
                    "params_saved_by_halving": one.params_saved,
                    "in_scope": one.in_scope,
                    "approximate": one.group.approximate,
                    "goes_with": None if one.branch is None else one.branch.block,
                    "keeps_one": one.keeps_one,
                    "slices": [
                        {"parameter": member.parameter, "dim": member.dim, "role": member.role}
                        for member in one.group.members
                    ],
                }
                for one in self.groups
            ],
            "pinned": [vars(pinned) for pinned in self.graph.pinned],
            "unsupported_ops": dict(self.graph.unsupported_ops),
        }


def inspect_model(
    name: str | None = None,
    *,
    config: str | PathLike[str] | None = None,
    sample_size: Sequence[int] | None = None,
    plugins: Plugins | None = None,
) -> Inspection:
    """Builds a model and says what could be pruned in it.

    :param name: as for :func:`~nncf_compactprune.run.models.resolve_model`; the config's model by default.
    :param config: a config file, for the model, its options, the input's shape and the scopes.
    :param sample_size: shape of the example input, batch included.
    :param plugins: where models and rules come from; the installed plugins by default.
    :raises CompactPruneError: if the name or the config is wrong, or the model does not run.
    """
    plugins = plugins or default_plugins()
    settings = None if config is None else load_config(config, plugins)
    resolved = _resolve(name, settings, sample_size, plugins)
    entries = [] if settings is None else settings.compression
    approximate = any(isinstance(entry, ChannelPruningConfig) and entry.params.allow_approximate for entry in entries)
    graph = analyse(resolved.model, resolved.example_inputs, plugins=plugins, allow_approximate=approximate)
    graph = with_branches(resolved.model, graph, resolved.example_inputs, plugins)
    in_scope = [True] * len(graph.groups)
    for entry in entries:
        allowed = prunable_groups(
            resolved.model, resolved.example_inputs, graph, entry.ignored_scopes, entry.target_scopes
        )
        in_scope = [a and b for a, b in zip(in_scope, allowed, strict=True)]
    return Inspection(
        resolved.name,
        tuple(tuple(leaf.shape) for leaf in tree_leaves(resolved.example_inputs)),
        graph,
        tuple(_halved(graph, index, scoped) for index, scoped in enumerate(in_scope)),
    )


def _resolve(
    name: str | None, config: CompressionConfig | None, sample_size: Sequence[int] | None, plugins: Plugins
) -> ResolvedModel:
    extra = {} if config is None else config.model_extra or {}
    configured = extra.get("model")
    if name is None and not isinstance(configured, str):
        msg = "no model to inspect: name one, such as timm:fbnetv3_b, or give a config with the key 'model'."
        raise ResolveError(msg)
    # The options belong to the config's model; another one may not take them.
    options = extra.get("model_options") if name in (None, configured) else None
    if options is not None and not isinstance(options, dict):
        msg = f"model_options: expected an object, got {type(options).__name__}."
        raise ResolveError(msg)
    if sample_size is None and config is not None and len(config.input_info) == 1:
        sample_size = config.input_info[0].sample_size
    return resolve_model(name or str(configured), sample_size=sample_size, options=options, plugins=plugins)


def _halved(graph: ChannelGraph, index: int, in_scope: bool) -> InspectedGroup:
    group = graph.groups[index]
    sizes = graph.sizes.astype(float)
    macs, params = (
        graph.cost[kind].saved(sizes, index, group.size // 2) / max(dense, 1)
        for kind, dense in (("macs", graph.macs), ("params", graph.params))
    )
    branch = next((branch for branch, groups in graph.branches.items() if index in groups), None)
    return InspectedGroup(group, macs, params, in_scope, branch, graph.keep_one.get(index, ""))
