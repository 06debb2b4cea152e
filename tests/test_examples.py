"""Examples run."""

from __future__ import annotations

import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.meters import FakeMeter
from support.places import ROOT
from timm_import import let_detectors_run
from torch.utils.data import Subset

from nncf_compactprune.plugins import default_plugins
from nncf_compactprune.run import datasets


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
    assert re.search(r"ms \((69|70)\.\d% of .* ms, ± .*; a fake device, .*\d+ networks in", capsys.readouterr().out)


def test_segmentation(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    run("segmentation.py", monkeypatch, "--pictures", "24", "--epochs", "1", "--fine-tuning", "1")
    said = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) -> ([\d,]+) MACs", said)[0])
    assert after <= 0.5 * before
    assert re.search(r"mean IoU: dense \d+\.\d%, pruned \d+\.\d%, fine-tuned \d+\.\d%", said)


def test_detection(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    let_detectors_run()
    monkeypatch.syspath_prepend(ROOT / "examples")
    run("detection.py", monkeypatch, "--pictures", "24", "--epochs", "1", "--fine-tuning", "1")
    said = capsys.readouterr().out
    before, after = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) -> ([\d,]+) MACs", said)[0])
    assert after <= 0.5 * before
    assert re.search(r"mAP at 0.5: dense \d+\.\d%, pruned \d+\.\d%, fine-tuned \d+\.\d%", said)


def test_shapes_lie_where_the_targets_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    pictures = runpy.run_path(str(ROOT / "examples" / "shapes_on_photographs.py"))["pictures"]
    images, masks, targets = pictures(6, train=True)
    assert images.shape == (6, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    for mask, target in zip(masks, targets, strict=True):
        inside = torch.zeros_like(mask, dtype=torch.bool)
        for (left, top, right, bottom), label in zip(target["boxes"].long().tolist(), target["labels"], strict=True):
            part = mask[top : bottom + 1, left : right + 1]
            assert set(part.unique().tolist()) <= {0, int(label)}
            assert float((part > 0).float().mean()) > 0.4
            inside[top : bottom + 1, left : right + 1] = True
        assert not bool(mask[~inside].any())
    assert not torch.equal(images[0], pictures(1, train=False)[0][0])


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


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
def test_plain_pytorch_goes_on_from_its_checkpoint(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_command("plain_pytorch.py", monkeypatch, capsys, "--epochs", "4")
    assert re.findall(r"epoch (\d): (\d+)%", first) == [("1", "0"), ("2", "0"), ("3", "29"), ("4", "50")]
    second = run_command("plain_pytorch.py", monkeypatch, capsys, "--epochs", "5")
    assert re.findall(r"epoch (\d): (\d+)%", second) == [("5", "50")]
    assert (elsewhere / "runs" / "plain" / "model.xml").is_file()


@pytest.mark.slow
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


@pytest.mark.slow
def test_detector_int8(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_command("detector_int8.py", monkeypatch, capsys, "--steps", "2", "--output", "detector")
    before, after = (int(one.replace(",", "")) for one in re.findall(r"([\d,]+) -> ([\d,]+) MACs", printed)[0])
    assert 0.45 * before < after <= 0.5 * before
    assert {path.suffix for path in (elsewhere / "detector").iterdir()} == {".onnx", ".xml", ".bin"}
    assert "OpenVINO INT8" in printed


@pytest.mark.slow
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
