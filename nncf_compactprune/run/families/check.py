"""What can be found wrong with a family before anything is trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nncf_compactprune.algorithms import ChannelPruning, ChannelPruningConfig, Context
from nncf_compactprune.channels import trace
from nncf_compactprune.config import Budget
from nncf_compactprune.config.budget import KINDS, Kind
from nncf_compactprune.errors import BudgetError, ConfigError, Problem
from nncf_compactprune.plan import Cost
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import ResolvedDataset, resolve_dataset
from nncf_compactprune.run.families.settings import SIBLINGS, Family, Member, Sibling
from nncf_compactprune.run.models import ExampleInputs, ResolvedModel, resolve_model
from nncf_compactprune.run.prepare import check_classes, normalised_for, real_example
from nncf_compactprune.run.warm_start import absolute
from nncf_compactprune.serving.meter import MeterOptions

_UNITS = {"macs": "MACs", "params": "parameters", "latency": "nanoseconds"}


@dataclass(frozen=True)
class Network:
    """An unpruned network that runs on the dataset.

    :param resolved: the model.
    :param example: a test image.
    :param dataset: normalised as the model wants it.
    :param cost: of the model.
    """

    resolved: ResolvedModel
    example: ExampleInputs
    dataset: ResolvedDataset
    cost: Cost


@dataclass(frozen=True)
class Checked:
    """What a family is made of.

    :param dense: the network that is pruned.
    :param siblings: by name.
    """

    dense: Network
    siblings: Mapping[str, tuple[Sibling, Network]]


def check(family: Family, plugins: Plugins) -> Checked:
    """Resolves all networks and the dataset, and tries every budget on the dense network.

    :param family: as the config says.
    :param plugins: where names are looked up.
    :raises CompactPruneError: something is missing or does not fit; budgets that do not fall, or cannot be reached.
    """
    run = family.run
    dataset = resolve_dataset(str(run.dataset), run.dataset_options, plugins)
    if not dataset.labelled:
        message = f"'{dataset.name}' has no labels. A family is compared by accuracy."
        raise ConfigError(family.source, [Problem("dataset", message)])
    dense = _network(run.model, run.model_options, run.weights, dataset, plugins)
    _falling(family, dense.cost)
    for at, member in enumerate(family.members):
        _reachable(family, at, member, dense, plugins)
    siblings: dict[str, tuple[Sibling, Network]] = {}
    for at, sibling in enumerate(family.config.siblings):
        name = sibling.name or sibling.model.rpartition(":")[2]
        if name in siblings:
            message = f"'{name}' is there twice. Give each a name of its own."
            raise ConfigError(family.source, [Problem(f"{SIBLINGS}[{at}].name", message)])
        found = _network(sibling.model, sibling.model_options, sibling.weights, dataset, plugins)
        siblings[name] = (sibling, found)
    return Checked(dense, siblings)


def _network(
    name: str, options: Mapping[str, object], weights: str | None, dataset: ResolvedDataset, plugins: Plugins
) -> Network:
    shape = (1, *dataset.input_shape)
    resolved = resolve_model(name, sample_size=shape, options=options, weights=weights, plugins=plugins)
    dataset = normalised_for(resolved, dataset)
    example = real_example(resolved, dataset)
    check_classes(resolved, example, dataset)
    graph = trace(resolved.model, example, plugins=plugins)
    return Network(resolved, example, dataset, Cost(graph.macs, graph.params))


def _falling(family: Family, dense: Cost) -> None:
    """
    :raises ConfigError: a member may keep as much as the one before it, or more, in all that bounds it.
    """
    limits = [_limits(absolute(member.budget, dense)) for member in family.members]
    for at, (before, after) in enumerate(itertools.pairwise(limits), 1):
        compared = [(kind, before.get((kind, meter)), new) for (kind, meter), new in after.items()]
        if any(old is None or new is None or new < old for _, old, new in compared):
            continue
        kind, old, new = compared[0]
        message = (
            f"'{family.members[at].name}' may keep {new:,} {_UNITS[kind]}, and '{family.members[at - 1].name}' "
            f"before it {old:,}. Order the members from the largest to the smallest."
        )
        raise ConfigError(family.source, [Problem(f"family[{at}]", message)])


def _limits(budget: Budget) -> dict[tuple[Kind, object], int | None]:
    """The limits, by kind and what measures them, in nanoseconds where they are times. None: a share of the time, which
    takes a measurement to compare."""
    given = {kind: getattr(budget, kind) for kind in KINDS if getattr(budget, kind) is not None}
    return {
        (kind, (budget.runtime, MeterOptions.of(budget)) if kind == "latency" else None): (
            None if kind == "latency" and not isinstance(value, str) else budget.resolve(kind, 0)
        )
        for kind, value in given.items()
    }


def _reachable(family: Family, at: int, member: Member, dense: Network, plugins: Plugins) -> None:
    """
    :raises ConfigError: the member's budget cannot be reached on the dense network.
    """
    for entry in _pruning_entries(member):
        kind: Any = plugins.get_algorithm(entry.algorithm)
        algorithm = kind(entry, Context(copy.deepcopy(dense.resolved.model), dense.example, plugins))
        if isinstance(algorithm, ChannelPruning):
            try:
                algorithm.check_budget()
            except BudgetError as error:
                raise ConfigError(family.source, [Problem(f"family[{at}]", str(error))]) from error


def _pruning_entries(member: Member) -> Sequence[ChannelPruningConfig]:
    entries = member.settings.compression.compression
    return [entry for entry in entries if isinstance(entry, ChannelPruningConfig)][:1]  # others see a smaller network
