"""A bar on a terminal; plain lines in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.user_files import NET_SOURCE

from nncf_compactprune.cli import main

# Without matplotlib there are no pictures, which take longer than the rest.
OUTPUT = (
    "import sys; sys.modules['matplotlib'] = None; from nncf_compactprune.cli import main; main(['run', sys.argv[1]])"
)


def write_config(folder: Path) -> Path:
    (folder / "net.py").write_text(NET_SOURCE)
    params = {"schedule": "one_shot"}
    config = {
        "model": f"python:{folder / 'net.py'}:build",
        "dataset": "digits",
        "pretrain_epochs": 1,
        "epochs": 1,
        "compression": {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": params},
        "export": {"formats": ["openvino"], "precisions": ["fp32"]},
        "output_dir": str(folder / "out"),
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0, b"".join(parts).decode()
    return b"".join(parts).decode()


@pytest.mark.slow
def test_terminal_gets_bars(tmp_path: Path) -> None:
    shown = on_a_terminal([sys.executable, "-c", OUTPUT, str(write_config(tmp_path))])
    for title in ("epoch 1/1", "loss", "Batch norm adaptation", "Exporting", "Measuring latency", "\x1b[?25l"):
        assert title in shown


def test_pipe_gets_plain_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(write_config(tmp_path))])
    assert ended.value.code == 0
    text, errors = capfd.readouterr()
    assert not {"\x1b", "\r"} & {*text, *errors}
    assert "Batch norm adaptation" not in text
    assert "Self-check of fbnet_pruning: error" in text
    checks = json.loads((tmp_path / "out" / "summary.json").read_text())["self_check"]
    assert checks["fbnet_pruning"]["proof"] is True
    assert checks["fbnet_pruning"]["compared"]
