"""A family of pruned networks and its unpruned siblings, as a table and as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from rich.markup import escape
from rich.table import Column, Table

from nncf_compactprune.report.comparison import in_words

FAMILY_FILE = "family"
FAMILY_VERSION = 1
Cost = Literal["macs", "params", "latency_ms"]


@dataclass(frozen=True)
class Point:
    """One network.

    :param name: of the network.
    :param kind: ``"dense"``: what was pruned; ``"member"``; ``"sibling"``: another, unpruned network.
    :param accuracy: test top-1 in [0, 1].
    :param macs: of one example.
    :param params: number of parameters.
    :param latency_ms: median time of one request; None where it was not measured.
    :param cpu_hours: spent on it, of all threads; of the first member with the dense training, if there was one.
    :param gpu_hours: by the clock, where a GPU was in use.
    """

    name: str
    kind: Literal["dense", "member", "sibling"]
    accuracy: float
    macs: int
    params: int
    latency_ms: float | None = None
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Results:
    """A family.

    :param model: name of the dense network.
    :param dataset: that accuracies are measured on.
    :param start: what each member was pruned from: ``"previous"`` or ``"dense"``.
    :param points: the dense network, the members from the largest to the smallest, the siblings.
    :param runtime: what latencies were measured in; None where they were not.
    """

    model: str
    dataset: str
    start: str
    points: tuple[Point, ...]
    runtime: str | None = None

    @property
    def front(self) -> list[Point]:
        """The dense network and the members."""
        return [point for point in self.points if point.kind != "sibling"]

    @property
    def siblings(self) -> list[Point]:
        """The others."""
        return [point for point in self.points if point.kind == "sibling"]

    def at_cost(self, kind: Cost, cost: float) -> float | None:
        """The family's accuracy at a cost, on straight lines between its networks; None beyond them.

        :param kind: which cost.
        :param cost: a number of MACs or parameters, or milliseconds.
        """
        pairs = sorted((value, p.accuracy) for p in self.front if (value := getattr(p, kind)) is not None)
        if not pairs or not pairs[0][0] <= cost <= pairs[-1][0]:
            return None
        costs, accuracies = zip(*pairs, strict=True)
        return float(np.interp(cost, costs, accuracies))


_HEADINGS = ("Network", "Accuracy", "MACs", "left", "Parameters", "left", "Latency", "CPU hours", "GPU hours")


def family_rows(results: Results) -> list[tuple[str, ...]]:
    """The table's cells, a row a network; hours of GPUs only where there were any."""
    dense = results.front[0]
    rows = []
    for point in results.points:
        time = "-" if point.latency_ms is None else f"{point.latency_ms:.3g} ms"
        cells = (
            f"{point.name} (unpruned)" if point.kind == "sibling" else point.name,
            f"{100 * point.accuracy:.2f} %",
            in_words(point.macs),
            f"{100 * point.macs / dense.macs:.1f} %",
            in_words(point.params),
            f"{100 * point.params / dense.params:.1f} %",
            time,
            f"{point.cpu_hours:.3f}" if point.kind != "dense" else "-",
            f"{point.gpu_hours:.3f}" if point.kind != "dense" else "-",
        )
        rows.append(cells[: _columns(results)])
    return rows


def _columns(results: Results) -> int:
    return len(_HEADINGS) if any(point.gpu_hours for point in results.points) else len(_HEADINGS) - 1


def family_table(results: Results) -> Table:
    """The family for the terminal.

    :param results: what was measured.
    """
    headings = _HEADINGS[: _columns(results)]
    table = Table(Column(headings[0], overflow="fold"), *(Column(one, justify="right") for one in headings[1:]))
    for row in family_rows(results):
        table.add_row(*(escape(cell) for cell in row))
    return table


def beside_siblings(results: Results) -> list[str]:
    """One sentence for each sibling: what the family has at its cost."""
    words: list[tuple[Cost, str]] = [("macs", "MACs"), ("params", "parameters"), ("latency_ms", "latency")]
    lines = []
    for sibling in results.siblings:
        said = []
        for kind, word in words:
            cost = getattr(sibling, kind)
            ours = None if cost is None else results.at_cost(kind, cost)
            if ours is not None:
                said.append(f"{100 * (ours - sibling.accuracy):+.2f} points at its {word}")
        found = ", ".join(said) if said else "its costs are outside the family's"
        lines.append(f"{sibling.name}, {100 * sibling.accuracy:.2f} %: the family, between its members, has {found}.")
    return lines


def family_markdown(results: Results, pictures: Sequence[str]) -> str:
    """The family as a Markdown page.

    :param results: what was measured.
    :param pictures: files to show.
    """
    total = sum(point.cpu_hours for point in results.points)
    hours = f"{total:.3f} CPU hours in all"
    if gpu := sum(point.gpu_hours for point in results.points):
        hours += f", {gpu:.3f} GPU hours"
    start = "the next larger one" if results.start == "previous" else "the dense network"
    timed = "" if results.runtime is None else f" Latency: median of single requests in {results.runtime}, in turn."
    lines = [
        f"# A family of {results.model}",
        "",
        f"Test accuracy on `{results.dataset}`. Each member was pruned from {start}. {hours}.{timed}",
        "",
        *(f"![Accuracy against MACs, parameters and latency]({name})" for name in pictures),
        *([""] if pictures else []),
    ]
    headings = _HEADINGS[: _columns(results)]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in (headings, rule, *family_rows(results))]
    beside = beside_siblings(results)
    return "\n".join([*lines, *([""] if beside else []), *beside]) + "\n"


def family_json(results: Results) -> str:
    """The family as JSON, for programs."""
    document = {"family_version": FAMILY_VERSION, **asdict(results)}
    return json.dumps(document, indent=2) + "\n"
