"""The config of a family: what is added to a run's, and the run that it means for each member."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from nncf_compactprune.config import Budget, Section, load_section, read_document
from nncf_compactprune.config.reading import Document
from nncf_compactprune.errors import ConfigError, Problem
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.run.settings import RunConfig, Settings, settings_of
from nncf_compactprune.run.state import DENSE_FILE

SIBLINGS = "siblings"
OWN_KEYS = ("family", "start", SIBLINGS)


class Sibling(Section):
    """An unpruned network to compare with.

    :param name: what to call it; default: its model's.
    :param model: as a run's.
    :param model_options: as a run's.
    :param weights: safetensors file of the trained network.
    :param epochs: fine-tuning epochs, with the run's optimizer.
    """

    model_config = ConfigDict(protected_namespaces=())

    name: str | None = None
    model: str
    model_options: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    epochs: int = Field(default=0, ge=0)


class FamilyConfig(Section):
    """The top-level keys of a family.

    :param family: what each member keeps, from the largest to the smallest: shares of the MACs
        (``[0.75, 0.5, 0.35]``), or budgets (``{"params": "1M"}``, ``{"macs": 0.4, "params": 0.5}``,
        ``{"latency": "2ms"}``).
    :param start: each member is pruned from the next larger one (``"previous"``), or from the ``"dense"`` network.
    :param siblings: unpruned networks to compare with.
    """

    model_config = ConfigDict(extra="ignore")

    family: list[Annotated[float, Field(gt=0, lt=1)] | Budget] = Field(min_length=1)
    start: Literal["previous", "dense"] = "previous"
    siblings: tuple[Sibling, ...] = Field(default=(), strict=False)


@dataclass(frozen=True)
class Member:
    """One network of a family.

    :param name: of its budget, and of its directory.
    :param budget: what may be left.
    :param settings: the run that makes it.
    """

    name: str
    budget: Budget
    settings: Settings

    @property
    def directory(self) -> Path:
        """Where its results go."""
        return Path(self.settings.run.output_dir)


@dataclass(frozen=True)
class Family:
    """A config, as the family of it is made.

    :param source: its name, for messages.
    :param document: the config as plain JSON data.
    :param config: the family's own keys.
    :param run: those of the training script.
    :param members: from the largest to the smallest.
    """

    source: str
    document: Mapping[str, Any]
    config: FamilyConfig
    run: RunConfig
    members: Sequence[Member]

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        return Path(self.run.output_dir)


def read_family(
    source: str | PathLike[str], overrides: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> Family:
    """Reads and validates a config with a family.

    :param source: the file.
    :param overrides: values by dotted path.
    :param plugins: where algorithms are looked up; the installed plugins by default.
    :raises ConfigError: something is wrong in it.
    """
    document = read_document(source, overrides)
    if "family" not in document.data:
        message = 'missing. Give the shares of the MACs that the members keep, such as "family": [0.75, 0.5, 0.35].'
        raise ConfigError(document.name, [Problem("family", message)])
    config, run = load_section(document, FamilyConfig), load_section(document, RunConfig)
    _refuse(document, run, config, plugins or default_plugins())
    budgets = [one if isinstance(one, Budget) else Budget(macs=one) for one in config.family]
    names = [_name(budget) for budget in budgets]
    members = []
    for at, (name, budget) in enumerate(zip(names, budgets, strict=True)):
        folder = Path(run.output_dir)
        data = _member_data(document, budget) | {"output_dir": str(folder / name)}
        if at and run.weights is None:
            data["weights"] = str(folder / names[0] / DENSE_FILE)
        if at and config.start == "previous":
            data["warm_start"] = str(folder / names[at - 1])
        members.append(Member(name, budget, settings_of(Document(document.name, data), plugins)))
    return Family(document.name, document.data, config, run, members)


def family_schema() -> dict[str, Any]:
    """The JSON schema's ``properties`` and ``$defs`` of :class:`FamilyConfig`, for a config's schema."""
    schema = FamilyConfig.model_json_schema(ref_template="#/$defs/family.{model}")
    definitions = {f"family.{name}": definition for name, definition in schema["$defs"].items()}
    return {"properties": schema["properties"], "$defs": definitions}


def _refuse(document: Document, run: RunConfig, config: FamilyConfig, plugins: Plugins) -> None:
    problems = []
    if run.dataset is None:
        problems.append(Problem("dataset", "missing. A family is compared by accuracy."))
    if run.warm_start is not None:
        problems.append(Problem("warm_start", 'belongs to one run. Use "start".'))
    if document.data.get("accuracy_aware_training") is not None:
        message = "a search chooses one network's size, and a family's sizes are given. Leave one of them out."
        problems.append(Problem("accuracy_aware_training", message))
    entries = _budget_entries(document.data)
    if not entries:
        problems.append(Problem("compression", "has no entry of a pruning algorithm, which the budgets could go to."))
    elif not _takes_budget(entries[0], plugins):
        message = (
            f"the budgets go to the first entry of \"compression\", and '{entries[0]['algorithm']}' takes none. Put an "
            'algorithm there that does, such as "fbnet_pruning".'
        )
        problems.append(Problem("family", message))
    for at, one in enumerate(config.family[1:], 1):
        if config.start == "previous" and isinstance(one, Budget) and isinstance(one.latency, (int, float)):
            message = (
                "a share of the time would be a share of the larger member's, which this one starts from. Give a time, "
                'such as "4.5ms", or "start": "dense".'
            )
            problems.append(Problem(f"family[{at}].latency", message))
    for at, sibling in enumerate(config.siblings):
        if sibling.weights is None and not sibling.model_options.get("pretrained"):
            message = "missing. An untrained network says nothing: name a safetensors file."
            problems.append(Problem(f"{SIBLINGS}[{at}].weights", message))
        elif sibling.weights is not None and not Path(sibling.weights).is_file():
            problems.append(Problem(f"{SIBLINGS}[{at}].weights", f"no such file: {sibling.weights}"))
    if problems:
        raise ConfigError(document.name, problems)


def _budget_entries(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries that the budgets go to: those with a budget, or else the first."""
    entries = data.get("compression", [])
    entries = [entries] if isinstance(entries, dict) else entries
    objects = [entry for entry in entries if isinstance(entry, dict)]
    return [entry for entry in objects if "budget" in entry] or objects[:1]


def _takes_budget(entry: Mapping[str, Any], plugins: Plugins) -> bool:
    """Whether an entry may have a budget; where it has one, or is none of an algorithm, reading it tells."""
    kind = plugins.algorithms.get(str(entry.get("algorithm")))
    return "budget" in entry or kind is None or "budget" in kind.Config.model_fields


def _member_data(document: Document, budget: Budget) -> dict[str, Any]:
    data = {key: copy.deepcopy(value) for key, value in document.data.items() if key not in OWN_KEYS}
    for entry in _budget_entries(data):
        entry["budget"] = _said(budget)
    return data


def _said(budget: Budget) -> dict[str, Any]:
    return budget.model_dump(mode="json", exclude_none=True, exclude_unset=True)


def _name(budget: Budget) -> str:
    """Of a directory: ``macs_0.5``."""
    return "_".join(f"{kind}_{value}" for kind, value in _said(budget).items()).replace(" ", "").replace("/", "_")
