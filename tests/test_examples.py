"""Examples run; what the documents quote is what the files say; the tables of keys are those of the config."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from support.meters import FakeMeter
from support.places import ROOT
from torch.utils.data import Subset

from nncf_compactprune.algorithms.catro.algorithm import CatroConfig
from nncf_compactprune.algorithms.data_free.inputs import GenerationConfig
from nncf_compactprune.algorithms.fbnet import FBNetConfig
from nncf_compactprune.algorithms.overparameterization.config import OverparameterizationConfig
from nncf_compactprune.algorithms.overparameterization.recovery import RecoveryConfig
from nncf_compactprune.cli import main
from nncf_compactprune.config import AccuracyAwareParams, CompressionConfig, InputInfo, load_config
from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.run import datasets
from nncf_compactprune.run.settings import RunConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {"README.md": README} | {f"docs/{path.name}": path.read_text("utf-8") for path in ROOT.glob("docs/*.md")}


# -- examples run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with terminal output of a fixed width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def run(example: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


def test_prune_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("prune_once.py", monkeypatch)
    before, after = re.findall(r"([\d,]+) -> ([\d,]+) MACs", capsys.readouterr().out)[0]
    assert int(after.replace(",", "")) <= 0.5 * int(before.replace(",", ""))
    assert {path.name for path in (elsewhere / "runs" / "prune_once").iterdir()} == {"model.safetensors", "plan.json"}


def test_prune_to_latency(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    monkeypatch.setitem(default_plugins().latency_meters, "openvino", FakeMeter)
    run("prune_to_latency.py", monkeypatch)
    assert re.search(r"ms \(70\.\d% of .* ms, ± .*; a fake device, \d+ networks in", capsys.readouterr().out)


def test_op_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("op_rule.py", monkeypatch)
    assert capsys.readouterr().out.splitlines() == [
        "without the rule: 0 groups; first: no rule for the operation aten.cumprod",
        "with the rule: 16 channels of first can go",
    ]


def few(monkeypatch: pytest.MonkeyPatch, train: int, test: int) -> None:
    """Digits with their first images only."""
    whole = datasets.resolve_dataset

    def shortened(name: str) -> Any:
        data = whole(name)
        return dataclasses.replace(data, train=Subset(data.train, range(train)), test=Subset(data.test, range(test)))

    monkeypatch.setattr(datasets, "resolve_dataset", shortened)


def test_catro_subtask(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few(monkeypatch, 320, 200)
    run("catro_subtask.py", monkeypatch, "--dense-epochs", "1", "--epochs", "1")
    printed = capsys.readouterr().out
    assert "MACs, classes (3, 8): " in printed
    before, after = re.findall(r"([\d,]+) -> ([\d,]+) MACs", printed)[0]
    assert int(after.replace(",", "")) <= 0.2 * int(before.replace(",", ""))
    assert (elsewhere / "runs" / "catro_subtask" / "plan.json").is_file()


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch, 128, 64)


def run_command(
    example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    with pytest.raises(SystemExit) as ended:
        run(example, monkeypatch, *arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("few_digits")
def test_nncf_training_loop(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--dense-epochs", "1", "--epochs", "5", "--output", "net.onnx")
    printed = run_command("nncf_training_loop.py", monkeypatch, capsys, *arguments)
    parameters = [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) parameters in memory", printed)]
    assert len(parameters) == 5
    assert parameters[0] == parameters[1] == parameters[2] > parameters[3] == parameters[4]
    assert "60% of the MACs removed" in printed
    assert f"{(elsewhere / 'net.onnx').stat().st_size:,} bytes" in printed


@pytest.mark.usefixtures("few_digits")
def test_plain_pytorch_goes_on_from_its_checkpoint(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_command("plain_pytorch.py", monkeypatch, capsys, "--epochs", "4")
    assert re.findall(r"epoch (\d): (\d+)%", first) == [("1", "0"), ("2", "0"), ("3", "29"), ("4", "50")]
    second = run_command("plain_pytorch.py", monkeypatch, capsys, "--epochs", "5")
    assert re.findall(r"epoch (\d): (\d+)%", second) == [("5", "50")]
    assert (elsewhere / "runs" / "plain" / "model.xml").is_file()


@pytest.mark.usefixtures("few_digits")
def test_huggingface_trainer_goes_on_from_its_checkpoint(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")
    first = run_command("huggingface_trainer.py", monkeypatch, capsys, "--epochs", "6")
    assert "fully_compressed" in first
    assert "model.onnx" in first
    again = run_command("huggingface_trainer.py", monkeypatch, capsys, "--epochs", "7")
    assert "'epoch': '7'" in again
    assert "'epoch': '6'" not in again


def test_timm_train(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    printed = run_command("timm_train.py", monkeypatch, capsys, "--epochs", "4", "--images", "64")
    dense, pruned = printed.split("Pruning it")
    assert "removed" not in dense
    assert re.findall(r"EMA\), (\d+)%", pruned)[-1] == "50"
    assert {p.name for p in (elsewhere / "runs" / "timm").iterdir()} >= {
        "model.safetensors",
        "plan.json",
        "config.json",
    }


# -- documents quote what is there -------------------------------------------------------------------------------------


def quotations() -> Iterator[Any]:
    for document, text in DOCUMENTS.items():
        for match in re.finditer(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], match[2].rstrip("\n"), id=f"{document}:{line}")


@pytest.mark.parametrize(("file", "block"), list(quotations()))
def test_quoted_code_is_a_part_of_its_file(file: str, block: str) -> None:
    lines, size = (ROOT / file).read_text(encoding="utf-8").splitlines(), block.count("\n") + 1
    parts = (textwrap.dedent("\n".join(lines[at : at + size])) for at in range(len(lines) - size + 1))
    assert block in parts


@pytest.mark.parametrize(("document", "text"), DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_python_in_documents_names_its_file(document: str, text: str) -> None:
    marked = len(re.findall(r"<!-- file: \S+ -->\n```python\n", text))
    assert len(re.findall(r"^```python$", text, re.MULTILINE)) == marked


@pytest.mark.parametrize(("document", "text"), DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_links_in_documents_lead_somewhere(document: str, text: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / link).exists(), link


def missing_files(text: str) -> list[str]:
    """Python files named in backticks that are neither in the repository, the package, the tests nor the examples.

    A name without a folder may lie anywhere in the package: a document speaks of one room at a time.
    """
    names = set(re.findall(r"`([\w./-]*\w\.py)`", text))
    places = [ROOT, ROOT / "nncf_compactprune", ROOT / "tests", ROOT / "examples"]
    found = {path.name for path in (ROOT / "nncf_compactprune").rglob("*.py")}
    return sorted(name for name in names if name not in found and not any((place / name).is_file() for place in places))


@pytest.mark.parametrize(("document", "text"), DOCUMENTS.items(), ids=list(DOCUMENTS))
def test_python_paths_in_documents_exist(document: str, text: str) -> None:
    assert missing_files(text.replace("timm's `train.py`", "")) == []


def test_a_path_that_is_nowhere_is_missing() -> None:
    text = (
        "`decide/scopes.py`, `scopes.py`, `prune_once.py`, `cli.py`, `nowhere/scopes.py`, `nncf_compactprune/trace.py`"
    )
    assert missing_files(text) == ["nncf_compactprune/trace.py", "nowhere/scopes.py"]


def commands() -> Iterator[Any]:
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield pytest.param(command, output, id=command)


@pytest.mark.parametrize(("command", "output"), list(commands()))
def test_commands_print_what_the_readme_shows(
    command: str, output: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line; ``...`` stands for lines left out, and nothing else is."""
    shutil.copytree(ROOT / "configs", elsewhere / "configs")
    program, *arguments = shlex.split(command)
    assert program == "nncf-compactprune"
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    printed = "\n".join(line.rstrip() for line in (captured.err or captured.out).splitlines())
    pattern = ".*\n".join(re.escape(part) for part in output.rstrip("\n").split("...\n"))
    assert re.fullmatch(pattern, printed, re.DOTALL), printed


# -- tables of keys ----------------------------------------------------------------------------------------------------


def table(first_key: str, document: str = README) -> dict[str, str]:
    """Key and default of every row of the document's table that begins with a key."""
    (rows,) = re.findall(rf"\| Key \| Default \| Meaning \|\n\| --- .*\n(\| `{first_key}` (?:.*\n)+?)\n", document)
    cells = [[cell.strip(" `") for cell in row.split("|")] for row in rows.splitlines()]
    return {key: default for _, key, default, *_ in cells}


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of a config class, nested ones by dotted path, with its default as JSON."""
    result = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            result |= fields(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            result[prefix + name] = "" if field.is_required() else json.dumps(default)
    return result


def test_readme_lists_every_key_of_fbnet_pruning_with_its_default() -> None:
    assert table("algorithm") == fields(FBNetConfig)


@pytest.mark.parametrize(
    ("document", "config"),
    [("docs/overparameterization.md", OverparameterizationConfig), ("docs/recovery.md", RecoveryConfig)],
)
def test_documents_list_every_key_of_recovery_algorithms_with_their_defaults(document, config) -> None:
    own = {key: value for key, value in fields(config).items() if "." in key}
    expected = {key: value for key, value in own.items() if not key.startswith("initializer.")}
    assert table("params.form", DOCUMENTS[document]) == expected


def test_readme_lists_what_catro_has_beside_or_otherwise() -> None:
    (rows,) = re.findall(r"\| Key of `catro` .*\n\| --- .*\n((?:\| .*\n)+)", README)
    cells = [[cell.strip(" `") for cell in row.split("|")] for row in rows.splitlines()]
    common = fields(FBNetConfig)
    own = {key: value for key, value in fields(CatroConfig).items() if common.get(key) != value}
    assert {key: default for _, key, default, *_ in cells} == own
    assert common.keys() - fields(CatroConfig).keys() == {"params.importance"}


def test_data_free_document_lists_every_key_of_generation_with_its_default() -> None:
    assert table("generation.source", DOCUMENTS["docs/data_free.md"]) == fields(GenerationConfig, "generation.")


def test_every_key_of_accuracy_aware_training_is_listed_with_its_default() -> None:
    document = DOCUMENTS["docs/from_nncf2.md"]
    assert table("maximal_relative_accuracy_degradation", document) == fields(AccuracyAwareParams)


def test_readme_lists_every_key_of_a_run_with_its_default() -> None:
    assert table("model") == fields(RunConfig)


@pytest.mark.parametrize("name", [*CompressionConfig.model_fields, *InputInfo.model_fields])
def test_readme_names_every_key_of_the_top_level(name: str) -> None:
    assert f"`{name}`" in README


def test_configs_in_the_readme_load() -> None:
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        config = load_config(json.loads(block))
        assert config.compression
        assert isinstance(config.example_inputs()[0], torch.Tensor)  # type: ignore[index]
