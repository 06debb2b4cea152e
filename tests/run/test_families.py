"""A family: members from the next larger one, interrupted anywhere, beside siblings; mistakes before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.user_files import NET_SOURCE

from nncf_compactprune import create_compressed_model
from nncf_compactprune.cli import main
from nncf_compactprune.errors import CompactPruneError, ConfigError
from nncf_compactprune.plan import Cost, PruningPlan
from nncf_compactprune.report.families import Point, Results, beside_siblings, family_markdown
from nncf_compactprune.report.family_charts import fronts
from nncf_compactprune.report.summary import read_summary
from nncf_compactprune.run import compress
from nncf_compactprune.run.families import check, members
from nncf_compactprune.run.families.members import FamilyOutcome, make_family
from nncf_compactprune.run.families.settings import read_family
from nncf_compactprune.run.models import resolve_model
from nncf_compactprune.run.pipeline import load_run, run, run_settings
from nncf_compactprune.run.settings import read_settings
from nncf_compactprune.run.warm_start import check_warm_start

Say = Callable[[str], None]


def write_config(folder: Path, output: str = "out", **changes: Any) -> Path:
    (folder / "net.py").write_text(NET_SOURCE)
    model = f"python:{folder / 'net.py'}:build"
    weights = folder / "sibling.safetensors"
    if not weights.is_file():
        save_file(resolve_model(model, sample_size=(1, 1, 16, 16)).model.state_dict(), weights)
    config = {
        "model": model,
        "dataset": "digits",
        "pretrain_epochs": 1,
        "epochs": 2,
        "batch_size": 128,
        "compression": {
            "algorithm": "fbnet_pruning",
            "params": {"schedule": "exponential", "pruning_steps": 1, "round_to": 1},
        },
        "family": [0.7, {"macs": 0.5, "params": 0.6}],
        "siblings": [{"name": "other", "model": model, "weights": str(weights), "epochs": 1}],
        "export": {"formats": ["openvino"], "precisions": ["fp32"]},
        "output_dir": str(folder / output),
        **changes,
    }
    path = folder / f"{output}.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FamilyOutcome:
    return make_family(write_config(tmp_path_factory.mktemp("family")), say=quiet)


def never(*args: Any, **kwargs: Any) -> None:
    pytest.fail("something was trained")


def test_members_fall_and_speak_of_the_dense_network(made: FamilyOutcome) -> None:
    dense, first, second, other = made.results.points
    assert [point.kind for point in made.results.points] == ["dense", "member", "member", "sibling"]
    assert dense.macs > first.macs > second.macs
    assert first.macs <= 0.7 * dense.macs
    assert second.macs <= 0.5 * dense.macs
    assert second.params <= 0.6 * dense.params
    assert other.macs == dense.macs
    assert all(point.latency_ms for point in made.results.points)
    assert all(point.cpu_hours > 0 for point in (first, second, other))
    plans = [
        PruningPlan.from_json((made.directory / point.name / "plan.json").read_bytes()) for point in (first, second)
    ]
    assert [plan.before.macs for plan in plans] == [dense.macs, dense.macs]
    for name, dims in plans[0].kept.items():  # pruned from the larger one: what that lost is lost here
        assert all(set(plans[1].kept[name][dim]) <= set(kept) for dim, kept in dims.items())
    summaries = [read_summary(made.directory / point.name) for point in (first, second)]
    assert summaries[0].dense.accuracy == summaries[1].dense.accuracy == dense.accuracy
    assert load_run(made.directory / second.name).model is not None
    assert {"family.md", "family.json"} <= {path.name for path in made.directory.iterdir()}
    document = json.loads((made.directory / "family.json").read_text())
    assert [point["name"] for point in document["points"]] == ["dense", first.name, second.name, "other"]


def test_a_warm_start_is_taught_by_the_dense_network(
    made: FamilyOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = []

    def create(*args: Any, teacher: Any = None, **kwargs: Any) -> Any:
        teachers.append(teacher)
        return create_compressed_model(*args, teacher=teacher, **kwargs)

    monkeypatch.setattr(compress, "create_compressed_model", create)
    first = made.results.points[1]
    document = json.loads((made.directory / first.name / "config.json").read_text())
    path = tmp_path / "further.json"
    changes = {"warm_start": str(made.directory / first.name), "epochs": 1, "output_dir": str(tmp_path / "out")}
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.4}, "params": {"schedule": "one_shot"}}
    path.write_text(json.dumps({**document, **changes, "compression": [entry, {"algorithm": "recovery"}]}))
    run(path, say=quiet)
    (teacher,) = teachers
    assert sum(p.numel() for p in teacher.parameters()) == made.results.points[0].params


def test_what_is_finished_is_not_run_again(
    made: FamilyOutcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(members, "run_settings", never)
    monkeypatch.setattr("nncf_compactprune.run.families.siblings.fit", never)
    monkeypatch.setenv("COLUMNS", "160")
    main_quietly(["family", str(made.directory.with_suffix(".json"))])
    printed = capsys.readouterr().out
    assert printed.count("finished already") == 3
    assert "other (unpruned)" in printed
    assert "Written to" in printed


def main_quietly(arguments: list[str]) -> None:
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code  # noqa: PT017


def test_interrupted_in_the_second_member_it_ends_with_the_same_weights(made: FamilyOutcome) -> None:
    path = write_config(made.directory.parent, "again", siblings=[])
    seen: list[str] = []

    def interrupted(line: str) -> None:
        seen.append(line)
        if any("macs_0.5" in earlier for earlier in seen) and "epoch 1/2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_family(path, say=interrupted)
    lines: list[str] = []
    again = make_family(path, say=lines.append)
    assert sum("finished already" in line for line in lines) == 1
    for before, after in zip(made.results.front, again.results.front, strict=True):
        assert replace(before, latency_ms=0, cpu_hours=0) == replace(after, latency_ms=0, cpu_hours=0)
    for name in ("macs_0.7", "macs_0.5_params_0.6"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (made.directory, again.directory))
        assert all((other[key] == value).all() for key, value in one.items())


def test_a_member_whose_config_changed_is_made_anew_with_all_that_follow(
    made: FamilyOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(made.directory.parent, "out", batch_size=256)
    started: list[str] = []

    def noted(settings: Any, **kwargs: Any) -> None:
        started.append(Path(settings.run.output_dir).name)
        raise KeyboardInterrupt

    monkeypatch.setattr(members, "run_settings", noted)
    with pytest.raises(KeyboardInterrupt):
        make_family(path, say=quiet)
    assert started == ["macs_0.7"]


def test_a_family_of_other_weights_under_the_same_name_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, siblings=[], weights=str(tmp_path / "sibling.safetensors"), epochs=0)
    path.write_text(path.read_text().replace('"exponential"', '"one_shot"'))
    make_family(path, say=quiet)
    started: list[str] = []

    def noted(settings: Any, **kwargs: Any) -> None:
        started.append(Path(settings.run.output_dir).name)

    monkeypatch.setattr(members, "run_settings", noted)
    make_family(path, say=quiet)
    assert started == []
    state = load_file(tmp_path / "sibling.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "sibling.safetensors")
    make_family(path, say=quiet)
    assert started == ["macs_0.7", "macs_0.5_params_0.6"]


@pytest.mark.parametrize(
    "family",
    [
        [{"latency": "2ms"}, {"latency": "3ms", "precision": "int8"}],
        [{"macs": 0.5, "latency": "2ms"}, {"macs": 0.5, "latency": "2ms", "threads": 1}],
        [{"macs": 0.5, "params": 0.5}, {"macs": 0.6, "params": 0.4}],
        [0.5, {"macs": 0.6, "latency": "2ms"}],
    ],
)
def test_members_that_numbers_cannot_order_are_left_to_their_order(family: list[Any], tmp_path: Path) -> None:
    check._falling(read_family(write_config(tmp_path, family=family)), Cost(1000, 1000))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": None}, r'family: missing.*"family": \[0.75, 0.5, 0.35\]'),
        ({"family": [0.5, 1.5]}, r"family\[1\]: expected a number in \(0, 1\) or an object, got 1.5"),
        ({"family": [0.5, 0.7]}, r"family\[1\]: 'macs_0.7' may keep .* MACs, and 'macs_0.5' before it .*Order"),
        ({"family": [{"latency": "2ms"}, {"latency": "3ms"}]}, r"family\[1\]: 'latency_3ms' may keep 3,000,000 n"),
        ({"family": [{"macs": 0.5, "params": 0.4}, {"params": 0.4}]}, r"family\[1\]: 'params_0.4' may keep .* param"),
        ({"family": [0.5, {"latency": 0.4}]}, r"family\[1\]\.latency: a share of the time would be .*larger member's"),
        ({"family": [0.5, "0.7"]}, r"family\[1\]"),
        ({"family": [0.5, 0.001]}, r"family\[1\]: budget: macs of at most .* cannot be reached.*the least is"),
        ({"compression": {"algorithm": "filter_pruning", "params": {"pruning_flops_target": 0.5}}},
         r"family: the budgets go to the first entry of .compression., and 'filter_pruning' takes none\. Put"),
        ({"dataset": None}, "dataset: missing. A family is compared by accuracy"),
        ({"siblings": [{"model": "timm:resnet18"}]}, r"siblings\[0\]\.weights: missing. An untrained network"),
        ({"siblings": [{"model": "timm:resnet18", "weights": "no.safetensors"}]}, r"siblings\[0\].*no such file"),
        ({"warm_start": "runs/x"}, r'warm_start: belongs to one run. Use "start"'),
        ({"accuracy_aware_training": {"mode": "early_exit", "params": {"maximal_absolute_accuracy_degradation": 1}}},
         "accuracy_aware_training: a search chooses"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "run_settings", never)
    with pytest.raises(CompactPruneError, match=said):
        make_family(write_config(tmp_path, **changes), say=quiet)
    assert not (tmp_path / "out").exists()


def test_a_warm_start_needs_a_finished_run(tmp_path: Path) -> None:
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}
    path = write_config(tmp_path, compression=compression, warm_start=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"warm_start: .*nothing' is no directory of a finished run: plan\.json"):
        run_settings(read_settings(path), say=quiet)


def test_siblings_are_compared_at_equal_cost() -> None:
    points = (
        Point("dense", "dense", 0.9, 100, 10), Point("macs_0.5", "member", 0.8, 50, 6),
        Point("small", "sibling", 0.7, 75, 3), Point("tiny", "sibling", 0.6, 10, 1),
    )  # fmt: skip
    results = Results("net", "digits", "previous", points)
    assert results.at_cost("macs", 75) == pytest.approx(0.85)
    assert results.at_cost("macs", 49) is None
    assert results.at_cost("latency_ms", 1.0) is None
    near, far = beside_siblings(results)
    assert "has +15.00 points at its MACs." in near
    assert "outside the family's" in far
    assert "| small (unpruned) | 70.00 % | 75 | 75.0 % |" in family_markdown(results, [])
    pytest.importorskip("matplotlib")
    assert fronts(replace(results, points=points[:2]), "svg") != fronts(results, "svg")


def test_a_family_for_some_of_the_classes(tmp_path: Path) -> None:
    params = {"schedule": "one_shot", "samples_per_class": 3, "classes": [1, 3, 8]}
    for_some = {"algorithm": "catro", "params": params}
    path = write_config(tmp_path, compression=for_some, family=[0.7, 0.5], siblings=None, epochs=1)
    made = make_family(path, say=quiet)
    names = [point.name for point in made.results.points if point.kind == "member"]
    plans = [PruningPlan.from_json((made.directory / name / "plan.json").read_bytes()) for name in names]
    assert [plan.output_classes for plan in plans] == [(1, 3, 8), (1, 3, 8)]

    def further(classes: list[int]) -> PruningPlan:
        entry = {"algorithm": "catro", "budget": {"macs": 0.4}, "params": {**params, "classes": classes}}
        changes = {"compression": entry, "warm_start": str(made.directory / names[1]), "family": None}
        return run(write_config(tmp_path, "further", siblings=None, epochs=1, **changes), say=quiet).plan

    assert further([1, 8]).output_classes == (1, 8)
    expected = r"compression\[0\]\.params\.classes: class 4 has gone: the network .* has \[1, 3, 8\] left"
    with pytest.raises(ConfigError, match=expected):
        further([1, 4])


def test_a_share_of_the_time_means_the_dense_network(tmp_path: Path) -> None:
    for name in ("plan.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    compression = {"algorithm": "fbnet_pruning", "budget": {"latency": 0.5}}
    path = write_config(tmp_path, compression=compression, warm_start=str(tmp_path))
    with pytest.raises(ConfigError, match=r'budget\.latency: a share .* Give a time, such as "4\.5ms"'):
        check_warm_start(read_settings(path))
