"""What the documents show is true: code, configs, commands, links, and the places of messages."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.places import ROOT

from nncf_compactprune.cli import app, main
from nncf_compactprune.config import load_config
from nncf_compactprune.run.settings import RunConfig

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
EACH = pytest.mark.parametrize(("document", "text"), DOCUMENTS.items(), ids=list(DOCUMENTS))
MARK = r"(?:<!-- ([a-z]+)(?:: (\S+))? -->\n)?"


def blocks(language: str) -> Iterator[tuple[str, int, str | None, str | None, str]]:
    """Every block of a language: document, line, its mark with what the mark says, and the text."""
    for document, text in DOCUMENTS.items():
        for match in re.finditer(rf"^{MARK}```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield document, text[: match.start()].count("\n") + 1, match[1], match[2], match[3]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for the configs, with terminal output of a fixed width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


# -- Python ----------------------------------------------------------------------------------------------------------


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


def test_python_is_quoted_run_or_compiled() -> None:
    unmarked = [f"{name}:{line}" for name, line, mark, *_ in blocks("python") if mark not in ("file", "run", "compile")]
    assert unmarked == []


def _running() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for document, line, mark, _, text in blocks("python"):
        if mark == "run":
            found.setdefault(document, []).append("\n" * line + text)
    return found


@pytest.mark.filterwarnings("default::FutureWarning")  # transformers about itself, while a model is traced
@pytest.mark.parametrize("document", list(_running()))
def test_python_that_is_marked_runs(document: str, elsewhere: Path) -> None:
    """The blocks of one document run one after the other, and share their names."""
    if "transformers" in "".join(_running()[document]):
        pytest.importorskip("transformers")
    names: dict[str, Any] = {"__name__": "document"}
    for block in _running()[document]:
        exec(compile(block, str(ROOT / document), "exec"), names)


def misused(source: str) -> list[str]:
    """What code imports from this package or passes to it, and the package does not have."""
    tree, wrong, known = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nncf_compactprune"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if hasattr(module, name.name):
                    known[name.asname or name.name] = getattr(module, name.name)
                else:
                    wrong.append(f"{node.module} has no {name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            parameters = inspect.signature(known[node.func.id]).parameters
            if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
                wrong += [
                    f"{node.func.id} takes no {k.arg}" for k in node.keywords if k.arg and k.arg not in parameters
                ]
    return wrong


COMPILED = [
    pytest.param(text, id=f"{name}:{line}") for name, line, mark, _, text in blocks("python") if mark == "compile"
]


@pytest.mark.parametrize("text", COMPILED)
def test_python_that_needs_more_is_compiled_and_calls_what_there_is(text: str) -> None:
    modules = set(re.findall(r"nncf_compactprune\.integrations\.(\w+)", text))
    for module in modules & {"huggingface", "lightning"}:
        pytest.importorskip({"huggingface": "transformers", "lightning": "lightning"}[module])
    assert misused(text) == []


def test_a_wrong_name_or_argument_is_found() -> None:
    code = "from nncf_compactprune import prune, prone\nprune(1, 2, budged={})\n"
    assert misused(code) == ["nncf_compactprune has no prone"]
    assert misused("from nncf_compactprune import save_pruned\nsave_pruned(1, 2, folder=3)\n") == [
        "save_pruned takes no folder"
    ]


# -- configs ---------------------------------------------------------------------------------------------------------

CONFIGS = [pytest.param(text, id=f"{name}:{line}") for name, line, mark, _, text in blocks("json") if mark != "part"]


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_load(text: str) -> None:
    document = json.loads(text)
    config = load_config(document)
    assert config.compression
    if "model" in document:
        RunConfig.model_validate(document)
    else:
        assert isinstance(config.example_inputs()[0], torch.Tensor)  # type: ignore[index]


# -- commands --------------------------------------------------------------------------------------------------------


def shown_commands() -> Iterator[Any]:
    for document, _, _, _, text in blocks("console"):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield pytest.param(command, output, id=f"{document}: {command}")


@pytest.mark.parametrize(("command", "output"), list(shown_commands()))
def test_commands_print_what_the_documents_show(
    command: str, output: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line; ``...`` stands for lines left out, and nothing else is."""
    program, *arguments = shlex.split(command)
    assert program == "nncf-compactprune"
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    printed = "\n".join(line.rstrip() for line in (captured.err or captured.out).splitlines())
    pattern = ".*\n".join(re.escape(part) for part in output.rstrip("\n").split("...\n"))
    assert re.fullmatch(pattern, printed, re.DOTALL), printed


def command_lines() -> Iterator[Any]:
    for document, line, _, _, text in blocks("sh"):
        for command in re.split(r"\n|&&", text.replace("\\\n", " ")):
            words = shlex.split(command, comments=True)
            if words[:1] == ["nncf-compactprune"] or words[:1] == ["python"]:
                yield pytest.param(words, id=f"{document}:{line}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_commands_have_their_options_and_files(words: list[str]) -> None:
    files = [word for word in words if word.startswith(("configs/", "examples/", "tools/"))]
    assert [file for file in files if not (ROOT / file).exists()] == []
    if words[0] == "nncf-compactprune":
        name, *arguments = words[1:]
        parse(typer.main.get_command(app), name, arguments)


def parse(program: Any, name: str, arguments: list[str]) -> None:
    """Reads a command's words as the program would, and runs nothing."""
    program.commands[name].make_context(name, list(arguments))


def test_an_option_that_is_not_there_is_found() -> None:
    with pytest.raises(Exception, match="--widths"):  # typer carries a click of its own
        parse(typer.main.get_command(app), "run", ["config.json", "--widths", "3"])


# -- links and paths -------------------------------------------------------------------------------------------------


@EACH
def test_links_in_documents_lead_somewhere(document: str, text: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / document).parent / link).exists(), link


def missing_files(text: str) -> list[str]:
    """Python files named in backticks that are neither in the repository, the package, the tests nor the examples.

    A name without a folder may lie anywhere in the package: a document speaks of one room at a time.
    """
    names = set(re.findall(r"`([\w./-]*\w\.py)`", text))
    places = [ROOT, ROOT / "nncf_compactprune", ROOT / "tests", ROOT / "examples", ROOT / "examples" / "benchmarks"]
    found = {path.name for path in (ROOT / "nncf_compactprune").rglob("*.py")}
    return sorted(name for name in names if name not in found and not any((place / name).is_file() for place in places))


@EACH
def test_python_paths_in_documents_exist(document: str, text: str) -> None:
    assert missing_files(text.replace("timm's `train.py`", "")) == []


def test_a_path_that_is_nowhere_is_missing() -> None:
    text = (
        "`decide/scopes.py`, `scopes.py`, `prune_once.py`, `cli.py`, `nowhere/scopes.py`, `nncf_compactprune/trace.py`"
    )
    assert missing_files(text) == ["nncf_compactprune/trace.py", "nowhere/scopes.py"]


# -- messages --------------------------------------------------------------------------------------------------------


def templates() -> Mapping[str, str]:
    """Every message of the package by its text, with ``…`` where a value goes in, and the file that it is in."""
    found: dict[str, str] = {}
    for path in (ROOT / "nncf_compactprune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found[node.value] = path.name
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
                found["".join(str(part) for part in parts)] = path.name
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_package() -> None:
    quoted = re.findall(r"^### `+ ?(.+?) ?`+$", DOCUMENTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 15
    known = templates()
    unknown = [message for message in quoted if not any(message in text for text in known)]
    assert unknown == []
