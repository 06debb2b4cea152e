"""The wheel works outside of the repository. Dependencies are those of this environment; `make dist` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import CONFIGS, ROOT

from nncf_compactprune.config import read_document
from nncf_compactprune.version import __version__

PACKAGED = ROOT / "nncf_compactprune" / "run" / "demo.json"


def test_the_packaged_demo_is_the_config_of_the_repository() -> None:
    assert PACKAGED.read_bytes() == (CONFIGS / "digits_fbnet.json").read_bytes()
    assert json.dumps(read_document(PACKAGED).data)


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_wheel_works_in_a_new_environment(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="build is not installed")
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    check = [sys.executable, str(ROOT / "tools" / "check_dist.py"), str(tmp_path / "dist"), "--behind"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
