"""The runner of the benchmarks: a list that is true, runs that are recorded and resumed, reports."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import bench
import bench_tables
import choice_of_channels as choice
import features
import features_cells
import pytest
import recovery
import torch
from bench_list import BENCHMARKS, PEERS, Benchmark
from cifar_packs import normalised
from support.places import BENCHMARKS as FOLDER
from support.places import ROOT

NAMES = [one.name for one in BENCHMARKS]


@pytest.mark.parametrize("one", BENCHMARKS, ids=NAMES)
def test_commands_name_scripts_and_options_that_are_there(one: Benchmark) -> None:
    assert one.peer is None or one.peer in PEERS
    for command in one.commands:
        script, *words = shlex.split(command)
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--"):
                name = word.removeprefix("--")
                assert re.search(rf'"{word}"|\b{name.replace("-", "_")}: ', source), f"{script} has no {word}"
        for value in re.findall(r"\{(\w+)\}", command):
            assert value in {"data", "work", *PEERS}


def test_every_table_of_the_folder_belongs_to_a_benchmark() -> None:
    owned = {name for one in BENCHMARKS for name in one.results} | {"RESULTS.md"}
    assert {path.name for path in FOLDER.glob("*.md")} - owned == set()


def test_the_report_is_up_to_date() -> None:
    written = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert written == bench.report_text(), "run: python examples/benchmarks/bench.py report"


def figures(text: str) -> set[str]:
    """Numbers with decimals, and whole ones of three digits or more, without separators."""
    text = re.sub(r"(?:NNCF|Torch-Pruning|torch) \d[\d.]*", "", text)  # versions
    numbers = [one.replace(",", "") for one in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?!\w|[.,]\d)", text)]
    return {one for one in numbers if "." in one or len(one) >= 3}


def found(figure: str, held: set[str]) -> bool:
    """Whether a number, rounded as it is written, is among others."""
    digits = len(figure.partition(".")[2])
    return any(f"{float(one):.{digits}f}" == figure or f"{float(one) / 10:.{digits}f}" == figure for one in held)


def held_by(one: Benchmark) -> set[str]:
    return set().union(
        *(figures((FOLDER / name).read_text("utf-8")) for name in one.results if (FOLDER / name).is_file())
    )


@pytest.mark.parametrize("one", [one for one in BENCHMARKS if one.behind], ids=lambda one: one.name)
def test_figures_of_what_is_behind_are_in_the_benchmarks_files(one: Benchmark) -> None:
    missing = [figure for line in one.behind for figure in figures(line) if not found(figure, held_by(one))]
    assert missing == []


def results_of_the_readme() -> list[tuple[str, str]]:
    """Cells of the table of results, with the benchmark that its row names."""
    rows, name = [], ""
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        if line.startswith("| ") and line.count("|") == 5:
            *_, here, beside, command = bench_tables.cells(line)
            name = (re.findall(r"bench\.py run (\w+)", command) or [name])[0]
            if name:
                rows += [(name, here), (name, beside)]
    return rows


def test_figures_of_the_readme_are_in_the_benchmarks_files() -> None:
    rows = results_of_the_readme()
    assert len(rows) >= 16
    missing = [
        (name, cell) for name, cell in rows for one in figures(cell) if not found(one, held_by(bench.BY_NAME[name]))
    ]
    assert missing == []


def test_a_figure_that_is_not_there_is_found() -> None:
    assert found("76.7", {"76.68"})
    assert not found("76.8", {"76.68"})
    assert figures("1,098,252 bytes, 84.58 against NNCF 2.19's 12, version 3.4.0") == {"1098252", "84.58"}


SCRIPT = """
import sys
from pathlib import Path
rows = Path(sys.argv[1])
rows.write_text(rows.read_text() + "x" if rows.exists() else "x")
if rows.read_text() == "x":
    raise SystemExit(3)  # killed in the middle of its first run
Path(sys.argv[2]).write_text("## Figures\\n\\n| net | accuracy |\\n|---|---|\\n| a | 91.7 |\\n")
"""


def test_a_run_that_was_killed_goes_on_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"{tmp_path / 'script.py'} {{work}}_rows.txt {tmp_path / 'small.md'}"
    small = Benchmark("small", "A small one", (command,), 1, ("small.md",), seeds="0")
    monkeypatch.chdir(tmp_path)
    for name, value in {"HERE": tmp_path, "ROOT": tmp_path, "RESULTS": tmp_path / "results.jsonl"}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "REPORT", tmp_path / "RESULTS.md")
    monkeypatch.setattr(bench, "BENCHMARKS", (small,))
    monkeypatch.setattr(bench, "BY_NAME", {"small": small})
    monkeypatch.setattr(bench.run_one, "__defaults__", (tmp_path / "results.jsonl",))
    monkeypatch.setattr(bench.records, "__defaults__", (tmp_path / "results.jsonl",))
    with pytest.raises(subprocess.CalledProcessError):
        bench.run_command(["small"], tmp_path, tmp_path)
    bench.resume_command()
    (record,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert record["rows"] == [{"table": "Figures", "row": {"net": "a", "accuracy": "91.7"}}]
    assert record["machine"]["cores"] >= 1
    assert {"torch", "nncf_compactprune"} <= record["versions"].keys()
    assert record["seeds"] == "0"
    assert "commit" in record
    report = (tmp_path / "RESULTS.md").read_text()
    assert "| a | 91.7 |" in report
    assert record["machine"]["cpu"] in report
    assert not bench.PLAN.exists()


def test_peers_environments_name_their_versions() -> None:
    assert all("==" in words[-1] for words in PEERS.values())
    assert Path(bench.environment(None)) == Path(sys.executable)


# -- features ----------------------------------------------------------------------------------------------------------


def test_the_table_of_features_holds_every_cell_with_what_shows_it() -> None:
    rows = [json.loads(line) for line in (FOLDER / "features.jsonl").read_text("utf-8").splitlines()]
    assert features.table(rows) == (FOLDER / "features.md").read_text("utf-8")
    assert {(row["package"], row["feature"]) for row in rows} == {
        (package, feature) for package in features_cells.PACKAGES for feature in features_cells.FEATURES
    }
    assert all(row["evidence"] and row["answer"] in features.SIGNS and row["versions"]["torch"] for row in rows)


def test_a_cell_that_is_not_so_ends_the_run() -> None:
    with pytest.raises(AssertionError, match="does not hold"):
        features_cells.says("yes", "nncf_compactprune", "errors.py", "float8 kernels")()
    with pytest.raises(AssertionError, match="speaks of"):
        features_cells.silent("nncf_compactprune", "SelfCheckError", "errors.py")()


@pytest.mark.parametrize("feature", ["shrinks", "joins", "reasons", "survives", "macs", "optimizer", "schedule"])
def test_what_this_package_says_of_itself_is_so(feature: str) -> None:
    assert features_cells.PACKAGES["nncf_compactprune"].cells[feature]().answer == "yes"


# -- the choice of channels --------------------------------------------------------------------------------------------


class Few(recovery.Data):
    """Noise in the place of CIFAR-10, and a ResNet-20 that is not trained."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(600) % 10
        self.validation, self.validation_labels = normalised(self.images[:100]), self.labels[:100]

    @property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return self.validation, self.validation_labels

    def dense(self, depth: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return recovery.BUILDERS[depth]().eval()


def test_a_seed_has_images_of_its_own_and_labels_of_the_classes() -> None:
    whole, setting = Few(), dataclasses.replace(choice.SETTINGS["two"], images=30, imbalance=2.0)
    parts = [choice.Part(whole, setting, seed) for seed in (0, 1)]
    assert setting.counts == [20, 10]
    assert [part.labels.bincount().tolist() for part in parts] == [[20, 10], [20, 10]]
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not seen[0] & seen[1]
    assert parts[0].test[1].bincount().tolist() == [10, 10]
    assert {int(label) for _, labels in parts[0].few(0) for label in labels} == {3, 5}  # those of the whole network


def test_criteria_have_the_same_widths_and_classes() -> None:
    setting = dataclasses.replace(choice.SETTINGS["two"], images=40)
    part = choice.Part(Few(), setting, 0)
    models = [recovery.pruned_network(part, setting.trial(criterion, 0)) for criterion in ("catro", "taylor")]
    shapes = [[tuple(parameter.shape) for parameter in model.parameters()] for model in models]
    assert shapes[0] == shapes[1]
    assert shapes[0][-1] == (2,)
    assert recovery.macs(models[0]) <= 0.2 * recovery.macs(part.dense(20))


def test_the_verdict_counts_seeds_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {(name, criterion, seed): key for key, name, criterion, seed in choice.queue()}

    def rows(places: dict[tuple[str, int], float], macs: int = 1) -> dict[str, dict[str, object]]:
        return {
            keys["two", criterion, seed]: {"test": test, "macs": macs} for (criterion, seed), test in places.items()
        }

    measured = rows({("catro", 0): 80, ("catro", 1): 82, ("l2", 0): 79, ("l2", 1): 81.2, ("taylor", 0): 81})
    found = choice.found_by_setting(measured)
    assert choice.lead(found["two"]) == ("l2", pytest.approx(0.9), pytest.approx(0.1), 2)
    assert choice.verdicts(found)[0].endswith("5 epochs of 2,000 images (+0.90 to L2).")
    one_seed = choice.found_by_setting(rows({("catro", 0): 80, ("l2", 0): 70}))
    assert choice.verdicts(one_seed)[0] == "- **ahead**: nowhere."
    assert "one seed**: ResNet-20" in choice.verdicts(one_seed)[3]
    with pytest.raises(ValueError, match="equal widths"):
        choice.found_by_setting(measured | rows({("geometric_median", 0): 60}, macs=2))


def test_the_table_is_written_from_the_rows(tmp_path: Path) -> None:
    choice.table(choice.ROWS, tmp_path)
    assert (tmp_path / "choice_of_channels.md").read_text("utf-8") == (FOLDER / "choice_of_channels.md").read_text(
        "utf-8"
    )
