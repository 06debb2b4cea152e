"""The commands do what they say, and every mistake ends with one message and status 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import typer
from safetensors.torch import load_file
from support.places import CONFIGS
from support.user_files import NET_SOURCE

from nncf_compactprune.cli import app, main
from nncf_compactprune.config import load_config, read_document
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.report.summary import read_summary
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.pipeline import load_run
from nncf_compactprune.run.prepare import remove_old_results
from nncf_compactprune.run.training import evaluate
from nncf_compactprune.version import __version__

Invoke = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(NET_SOURCE)
    return path


def write_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    config = {
        "model": f"python:{folder / 'net.py'}:build",
        "dataset": "digits",
        "pretrain_epochs": 15,
        "epochs": 3,
        "optimizer": {"lr": 0.1},
        "compression": {
            "algorithm": "fbnet_pruning",
            "budget": {"macs": 0.5},
            "params": {"schedule": "exponential", "pruning_steps": 1},
        },
        "export": {"precisions": ["fp32"]},
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / name
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_every_option_has_a_help_text() -> None:
    commands = typer.main.get_command(app).commands
    silent = [(name, option.name) for name, one in commands.items() for option in one.params if not option.help]
    assert commands
    assert not silent


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs a command that must succeed and returns what it printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Runs a command that must end with status 2 and without a traceback, and returns its message."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert ended.value.code == 2, printed.out + printed.err
        assert "Traceback" not in printed.err
        return printed.err

    return call


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """The directory of one finished run."""
    with pytest.raises(SystemExit) as ended:
        main(["run", str(write_config(folder))])
    assert ended.value.code == 0
    return folder / "out"


def accuracy_in_onnx_runtime(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path))
    correct, images = 0, 0
    for inputs, labels in resolve_dataset("digits").test_loader(100):
        (scores,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        correct += int((np.argmax(scores, 1) == labels.numpy()).sum())
        images += len(labels)
    return correct / images


def test_run_leaves_a_report_whose_figures_the_files_confirm(finished: Path) -> None:
    report = json.loads((finished / "summary.json").read_text())
    for network, weights in (("dense", "dense.safetensors"), ("pruned", "model.safetensors")):
        figures = report[network]
        exported = finished / network / "model.onnx"
        assert figures["accuracy"] == accuracy_in_onnx_runtime(exported)
        assert figures["file_bytes"]["ONNX FP32"] == exported.stat().st_size
        assert figures["latency_ms"].keys() == {"ONNX FP32", "OpenVINO FP32"}
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        tensors = load_file(finished / weights)
        assert figures["params"] == sum(t.numel() for k, t in tensors.items() if not k.endswith(buffers))
    assert report["dense"]["accuracy"] > 0.8
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["ratio"]["file_bytes"]["ONNX FP32"] < 0.8
    assert [(epoch["phase"], epoch["epoch"]) for epoch in report["epochs"]] == [
        *(("dense", epoch) for epoch in range(1, 16)),
        *(("pruned", epoch) for epoch in range(1, 4)),
    ]
    assert all(check["max_rel_error"] <= check["tolerance"] for check in report["verification"].values())


def test_run_writes_a_page_that_names_every_group(finished: Path) -> None:
    page = (finished / "report.md").read_text()
    plan = PruningPlan.from_json((finished / "plan.json").read_text())
    assert "| Accuracy |" in page
    for group in plan.groups:
        assert f"| `{group.name}` | {group.before} | {group.after} |" in page
    assert "`head` (10 channels): model output" in page


def test_checkpoint_comes_back_with_the_accuracy_of_the_report(finished: Path) -> None:
    report = json.loads((finished / "summary.json").read_text())
    pruned = load_run(finished)
    assert evaluate(pruned.model, resolve_dataset("digits").test_loader(64)) == report["pruned"]["accuracy"]
    assert isinstance(pruned.example_inputs, torch.Tensor)
    assert pruned.example_inputs.shape == (1, 1, 16, 16)


def test_export_writes_the_file_that_run_wrote(finished: Path, tmp_path: Path, invoke: Invoke) -> None:
    printed = invoke("export", finished, "--output", tmp_path / "again.onnx")
    assert "ONNX FP32" in printed
    images, _ = next(iter(resolve_dataset("digits").test_loader(5)))
    outputs = []
    for path in (tmp_path / "again.onnx", finished / "pruned" / "model.onnx"):
        session = onnxruntime.InferenceSession(str(path))
        outputs.append(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    np.testing.assert_array_equal(*outputs)


def test_run_takes_weights_instead_of_training_and_set_values(
    finished: Path, folder: Path, tmp_path: Path, invoke: Invoke
) -> None:
    changes = ["--set", "epochs=0", "--set", 'export.formats=["onnx"]', "--set", "compression.budget.macs=0.7"]
    weights = finished / "dense.safetensors"
    printed = invoke("run", folder / "config.json", "--weights", weights, "--output", tmp_path / "again", *changes)
    assert "Training the dense model" not in printed
    first, again = (json.loads((path / "summary.json").read_text()) for path in (finished, tmp_path / "again"))
    assert again["dense"]["accuracy"] == first["dense"]["accuracy"]
    assert 0.5 < again["ratio"]["macs"] <= 0.7
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["compression"]["budget"] == {"macs": 0.7}
    assert written["input_info"] == {"sample_size": [1, 1, 16, 16]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "config.json: model: missing. Expected a string."),
        ({"optimizer": {"type": "sdg"}}, "config.json: optimizer.type: expected one of"),
        ({"dataset": "digit"}, "Unknown dataset 'digit'. Did you mean 'digits'?"),
        ({"model_options": {"num_classes": 7}}, "[1, 7], but 'digits' has 10 classes. Set model_options, such as"),
        ({"model": "python:torch.nn:ReLU"}, "gives an output of shape [1, 1, 16, 16]"),
        ({"weights": "none.safetensors"}, "No such weights file: none.safetensors"),
        ({"input_info": {"sample_size": [1, 3, 8, 8]}}, "config.json: input_info.sample_size: expected [n, 1, 16, 16]"),
        ({"compression": {"algorithm": "fbnet_prunin", "budget": {"macs": 0.5}}}, "Did you mean 'fbnet_pruning'?"),
        (
            {"accuracy_aware_training": {"mode": "early_exit", "params": {"maximal_absolute_accuracy_degradation": 1}}},
            'config.json: accuracy_aware_training: "params" must give "maximal_total_epochs".',
        ),
    ],
)
def test_run_refuses_what_cannot_work(
    folder: Path, tmp_path: Path, refused: Invoke, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "net.py").write_text(NET_SOURCE)
    assert message in refused("run", write_config(tmp_path, **changes))
    assert not (tmp_path / "out" / "dense.safetensors").exists()


def test_unreachable_budget_is_told_before_training(tmp_path: Path, refused: Invoke) -> None:
    (tmp_path / "net.py").write_text(NET_SOURCE)
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 1e-6}, "params": {"min_channels": 8}}
    config = write_config(tmp_path, compression=compression, pretrain_epochs=10_000)
    assert "budget" in refused("run", config)


def test_directory_that_cannot_be_written_is_told_before_training(tmp_path: Path, refused: Invoke) -> None:
    (tmp_path / "net.py").write_text(NET_SOURCE)
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path, pretrain_epochs=10_000, output_dir=str(tmp_path / "file" / "out"))
    assert "cannot be written" in refused("run", config)


def test_misspelt_training_key_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET_SOURCE)
    with pytest.raises(SystemExit):
        main(["run", str(write_config(tmp_path, pretrain_epoch=1, weights="none.safetensors"))])
    assert "Warning: 'pretrain_epoch' is not read. Did you mean 'pretrain_epochs'?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.json"], "error: none.json: no such file."),
        (["run", "none.json", "--set", "epochs"], "--set: expected KEY=VALUE, got 'epochs'"),
        (["inspect"], "no model to inspect"),
        (["inspect", "resnet18"], "'resnet18' names no model"),
        (["inspect", "python:torch.nn:ReLU", "--sample-size", "1;2"], "--sample-size: expected whole numbers"),
        (["export", "."], ". is no directory of a finished run: config.json, plan.json, model.safetensors not found"),
        (["benchmark", "none.xml"], "none.xml: no such file or directory"),
        (["benchmark", "m.xml", "--sample-size", "3,a"], "no such file"),
        (["runn"], "No such command 'runn'"),
    ],
)
def test_mistakes_on_the_command_line(refused: Invoke, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_set_refuses_a_place_that_is_not_there(folder: Path, refused: Invoke) -> None:
    message = refused("run", write_config(folder, "set.json"), "--set", "model.name=x")
    assert "set.json: model.name: cannot be set" in message


def test_inspect_tells_groups_costs_and_reasons_in_100_columns(folder: Path, invoke: Invoke) -> None:
    printed = invoke("inspect", f"python:{folder / 'net.py'}:build")
    # conv1: 32 * 9 * 64; conv2: 32 * 32 * 9 * 16; head: 32 * 10
    assert f"{18_432 + 147_456 + 320:,} MACs" in printed
    # halving conv1 halves conv1 and conv2
    assert f"-{(18_432 + 147_456) / 2 / 166_208:.1%}" in printed
    assert "1 not prunable" in printed
    assert "model output" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100


def test_inspect_as_json_with_scopes_of_a_config(folder: Path, invoke: Invoke) -> None:
    compression = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "ignored_scopes": ["conv2"]}
    config = write_config(folder, "scoped.json", compression=compression, model_options={"num_classes": 5})
    document = json.loads(invoke("inspect", "--config", config, "--json"))
    assert [(group["name"], group["channels"], group["in_scope"]) for group in document["groups"]] == [
        ("conv1", 32, True),
        ("conv2", 32, False),
    ]
    assert [(pinned["name"], pinned["size"]) for pinned in document["pinned"]] == [("head", 5)]
    assert document["groups"][0]["macs_saved_by_halving"] == pytest.approx(0.5 * 165_888 / 166_048)
    assert "left out by the config's scopes" in invoke("inspect", "--config", config)


def test_inspect_counts_for_the_given_shape(folder: Path, invoke: Invoke) -> None:
    name = f"python:{folder / 'net.py'}:build"
    document = json.loads(invoke("inspect", name, "--sample-size", "4x1x32x32", "--json"))
    assert document["input_shapes"] == [[4, 1, 32, 32]]
    assert document["macs"] == 4 * (18_432 + 147_456) + 320


def test_inspect_states_each_reason_once(invoke: Invoke) -> None:
    printed = invoke("inspect", "python:nncf_compactprune.run.networks.cifar_resnet:resnet20")
    assert printed.count("in 'layer2.0'") == 1
    for block in range(3):
        assert f"layer2.{block}.conv2 (16)" in printed


def test_algorithms_are_listed(invoke: Invoke) -> None:
    assert "fbnet_pruning" in invoke("algorithms")


def test_schema_covers_compression_and_training(tmp_path: Path, invoke: Invoke) -> None:
    schema = json.loads(invoke("schema"))
    assert {"compression", "model", "optimizer"} <= schema["properties"].keys()
    for reference in find_references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    invoke("schema", "--output", tmp_path / "schema.json")
    assert json.loads((tmp_path / "schema.json").read_text()) == schema


def find_references(node: Any) -> list[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    own = [node["$ref"]] if isinstance(node, dict) and isinstance(node.get("$ref"), str) else []
    return own + [reference for child in children for reference in find_references(child)]


@pytest.mark.slow
def test_demo_prunes_to_its_budget_at_97_percent_or_more(tmp_path: Path, invoke: Invoke) -> None:
    config = CONFIGS / "digits_fbnet.json"
    invoke("run", config, "--output", tmp_path)
    report = json.loads((tmp_path / "summary.json").read_text())
    assert report["dense"]["accuracy"] >= 0.97
    assert report["pruned"]["accuracy"] >= 0.97
    assert report["ratio"]["macs"] <= 0.4


def test_version_is_printed(invoke: Invoke) -> None:
    assert invoke("--version").strip() == __version__


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_shipped_config_is_valid_and_its_model_builds(config: Path, invoke: Invoke, tmp_path: Path) -> None:
    document = read_document(config)
    if document.data.get("model", "").startswith("timm:"):
        pytest.importorskip("timm")
    if document.data.get("model_options", {}).get("pretrained"):  # weights cannot be fetched everywhere
        initial = config.read_text(encoding="utf-8").replace('"pretrained": true', '"pretrained": false')
        config = tmp_path / config.name
        config.write_text(initial, encoding="utf-8")
    if "model" in document.data:
        assert " prunable groups" in invoke("inspect", "--config", config)
    else:  # for a script of the user's, which builds the model
        assert load_config(document).compression


def test_verify_serves_every_file_of_a_run(finished: Path, invoke: Invoke, refused: Invoke, tmp_path: Path) -> None:
    report = json.loads((finished / "summary.json").read_text())
    checks = json.loads(invoke("verify", finished, "--samples", 600, "--json"))  # all test images
    assert len(checks) == 4
    for check in checks:
        network = "dense" if "/dense/" in check["path"] else "pruned"
        assert check["passed"], check["problems"]
        assert check["compared_with"] == "torch"
        assert check["torch_accuracy"] == report[network]["accuracy"]
        assert check["widths"] == [3, 3]
    assert "no such file or directory" in refused("verify", tmp_path / "none")
    assert "holds no exported file" in refused("verify", tmp_path)


def test_verify_fails_when_a_file_is_another_networks(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    shutil.copytree(finished, other)
    shutil.copyfile(other / "dense" / "model.onnx", other / "pruned" / "model.onnx")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(other / "pruned" / "model.onnx")])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert "widths differ: 'conv1.weight' is" in printed.err


def test_piped_tables_leave_paths_whole(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for command in (["verify", str(finished)], ["export", str(finished)]):
        with pytest.raises(SystemExit):
            main(command)
        assert str(finished / "pruned" / "model.onnx") in capsys.readouterr().out


def test_second_run_removes_every_file_of_the_first(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    said: list[str] = []
    remove_old_results(tmp_path / "out", said.append)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["config.json"]
    assert len(said) == 1


def test_run_leaves_a_page_a_summary_and_pictures(finished: Path) -> None:
    summary = read_summary(finished)
    assert {one.file for one in summary.served} == {
        f"{n}/model.{s}" for n in ("dense", "pruned") for s in ("onnx", "xml")
    }
    assert all(not one.problems for one in summary.served)
    assert [one.name for one in summary.layers] == ["conv1", "conv2", "head"]
    assert sum(one.macs_pruned for one in summary.layers) == summary.pruned.macs
    assert sum(one.macs_dense for one in summary.layers) == summary.dense.macs
    page = (finished / "report.md").read_text()
    for picture in ("widths.png", "training.png", "layers.png"):
        assert f"]({picture})" in page
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    assert "conv1" in (finished / "report.html").read_text()


def test_compare_shows_runs_side_by_side(finished: Path, tmp_path: Path, invoke: Invoke, refused: Invoke) -> None:
    shutil.copytree(finished, tmp_path / "again")
    printed = invoke("compare", finished, tmp_path / "again", "--output", tmp_path / "runs.html")
    assert "again" in printed
    assert "<svg" not in (tmp_path / "runs.html").read_text()
    assert "data:image/svg+xml;base64," in (tmp_path / "runs.html").read_text()
    assert "no directory of a finished run" in refused("compare", tmp_path)
    assert "ends in .html" in refused("compare", finished, "--output", tmp_path / "runs.txt")


def test_profile_tells_cost_and_time_of_every_layer(finished: Path, invoke: Invoke, refused: Invoke) -> None:
    files = [finished / network / "model.xml" for network in ("dense", "pruned")]
    printed = invoke("profile", *files, "--runs", 2)
    assert printed.count("µs") >= 3
    assert "of the MACs are left" in printed
    assert "layers are timed in OpenVINO" in refused("profile", files[0], finished / "pruned" / "model.onnx")


def test_the_package_runs_as_the_command_does() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "nncf_compactprune", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in said.stdout
