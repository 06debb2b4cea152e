"""Making a family: one run for each member, what is finished left as it is, everything measured side by side.

A family writes into one directory::

    macs_0.75/, ...     one run for each member, as ``run`` writes it
    siblings/NAME/      what was measured of each sibling, with its exported files
    family.md, family.json, family.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.export import measure_latency
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.report.families import FAMILY_FILE, Point, Results, family_json, family_markdown
from nncf_compactprune.report.family_charts import fronts
from nncf_compactprune.report.summary import Figures, Summary, read_summary
from nncf_compactprune.run.families.check import Checked, check
from nncf_compactprune.run.families.settings import SIBLINGS, Family, Member, read_family
from nncf_compactprune.run.families.siblings import sibling_point
from nncf_compactprune.run.families.spent import Meter, spent_in
from nncf_compactprune.run.pipeline import run_settings
from nncf_compactprune.run.state import SNAPSHOTS, Say
from nncf_compactprune.storage.writing import write_whole

PICTURE = f"{FAMILY_FILE}.png"
_TIMED = (".xml", ".onnx")  # whose latency is compared, the first that is there


@dataclass(frozen=True)
class FamilyOutcome:
    """What a family came to.

    :param results: every network.
    :param directory: where the artefacts are.
    """

    results: Results
    directory: Path


def make_family(
    source: str | PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    say: Say = print,
    plugins: Plugins | None = None,
) -> FamilyOutcome:
    """Prunes one network to several budgets, and puts what comes out beside unpruned siblings.

    Interrupted, it goes on from the last epoch when it is called again: finished members are not run anew.

    :param source: a config file with ``"family"``.
    :param overrides: values by dotted path.
    :param say: is given one line for every step.
    :param plugins: where names are looked up; the installed plugins by default.
    :raises CompactPruneError: as soon as anything is found wrong; what can be checked is checked before any training.
    """
    plugins = plugins or default_plugins()
    family = read_family(source, overrides, plugins)
    checked = check(family, plugins)
    summaries: list[Summary] = []
    for at, member in enumerate(family.members):
        say(f"Member {at + 1} of {len(family.members)}: {member.name}")
        summaries.append(_member(member, summaries[-1] if summaries else None, say, plugins))
    siblings = [
        sibling_point(family, name, sibling, network, family.directory / SIBLINGS / name, say, plugins)
        for name, (sibling, network) in checked.siblings.items()
    ]
    say("Measuring latency of all networks in turn")
    results = _timed(family, checked, _results(family, summaries, siblings))
    _write(family, results, say)
    return FamilyOutcome(results, family.directory)


def _member(member: Member, before: Summary | None, say: Say, plugins: Plugins) -> Summary:
    finished = _finished(member, before)
    if finished is not None:
        say("  finished already")
        return finished
    interrupted = any((member.directory / SNAPSHOTS).glob("*.safetensors"))
    meter = Meter(member.directory, anew=not interrupted)

    def told(line: str) -> None:
        say(f"  {line}")
        meter.keep()

    run_settings(member.settings, say=told, plugins=plugins)
    meter.keep()
    return read_summary(member.directory)


def _finished(member: Member, before: Summary | None) -> Summary | None:
    """The summary of an earlier run with the same config and files, not older than the one it starts from."""
    try:
        summary = read_summary(member.directory)
    except CompactPruneError:
        return None
    settings = member.settings
    same = _asked(summary.config) == _asked(settings.document) and summary.files == settings.file_digests()
    return summary if same and (before is None or summary.created >= before.created) else None


def _asked(document: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result; the input's shape is the dataset's."""
    return {key: value for key, value in document.items() if key not in ("output_dir", "input_info")}


def _results(family: Family, summaries: Sequence[Summary], siblings: Sequence[Point]) -> Results:
    first = summaries[0].dense
    dense = Point("dense", "dense", first.accuracy or 0.0, first.macs, first.params)
    members = [_point(member, summary.pruned) for member, summary in zip(family.members, summaries, strict=True)]
    return Results(family.run.model, str(family.run.dataset), family.config.start, (dense, *members, *siblings))


def _point(member: Member, figures: Figures) -> Point:
    spent = spent_in(member.directory)
    return Point(
        member.name, "member", figures.accuracy or 0.0, figures.macs, figures.params, None,
        spent.cpu_seconds / 3600, spent.gpu_seconds / 3600,
    )  # fmt: skip


def _timed(family: Family, checked: Checked, results: Results) -> Results:
    """Single requests of the exported files, all networks in turn."""
    folders = {"dense": family.members[0].directory / "dense"}
    folders |= {member.name: member.directory / "pruned" for member in family.members}
    folders |= {name: family.directory / SIBLINGS / name / "dense" for name in checked.siblings}
    for suffix in _TIMED:
        files = {name: _file(folder, suffix) for name, folder in folders.items()}
        if all(files.values()):
            timed = measure_latency({name: file for name, file in files.items() if file}, checked.dense.example)
            points = (replace(point, latency_ms=timed[point.name].median_ms) for point in results.points)
            return replace(results, points=tuple(points), runtime={".xml": "OpenVINO", ".onnx": "ONNX Runtime"}[suffix])
    return results


def _file(folder: Path, suffix: str) -> Path | None:
    """The file of the first precision: FP32, or the only one."""
    found = sorted(folder.glob(f"model*{suffix}"), key=lambda path: len(path.name))
    return found[0] if found else None


def _write(family: Family, results: Results, say: Say) -> None:
    pictures = []
    if find_spec("matplotlib"):
        write_whole(family.directory / PICTURE, fronts(results, "png"))
        pictures.append(PICTURE)
    else:
        say(f"No {PICTURE}: matplotlib is not installed (pip install 'nncf-compactprune[report]')")
    write_whole(family.directory / f"{FAMILY_FILE}.json", family_json(results).encode())
    write_whole(family.directory / f"{FAMILY_FILE}.md", family_markdown(results, pictures).encode())
