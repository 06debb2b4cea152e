"""The example script on the real NNCF 2.19, changed in nothing but the import.

Runs in an environment with NNCF 2.19 and ``NNCF_TORCH_LEGACY_TRACING=1``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.nncf2_imports import imports
from support.places import CONFIGS, ROOT

LEGACY_TRACING = "NNCF_TORCH_LEGACY_TRACING"
if not version("nncf").startswith("2.") or not os.environ.get(LEGACY_TRACING):
    pytest.skip(f"needs NNCF 2.19 and {LEGACY_TRACING}=1", allow_module_level=True)


def test_the_script_runs_on_nncf_219_but_for_its_import(tmp_path: Path) -> None:
    theirs, ours = imports()
    source = (ROOT / "examples" / "nncf2_classification.py").read_text(encoding="utf-8")
    assert source.count(ours) == 1
    script = tmp_path / "script.py"
    script.write_text(source.replace(ours, theirs))
    config = CONFIGS / "nncf2_digits_filter_pruning.json"
    arguments = ["--config", config, "--log-dir", tmp_path, "--pretrain-epochs", 0, "--epochs", 3]
    for more in ([], ["--resume", tmp_path / "last.pth", "--epochs", 4]):
        done = subprocess.run(
            [sys.executable, str(script), *map(str, [*arguments, *more])],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 4: .* rate 0\.50\d*, fully_compressed$", done.stdout, re.MULTILINE)
