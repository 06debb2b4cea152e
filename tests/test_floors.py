"""The oldest versions that are tested are the oldest that are allowed."""

from __future__ import annotations

import re

from support.places import ROOT


def test_every_floor_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert listed is not None
    floors = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', listed[1]))
    lines = (ROOT / "constraints-floors.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    # The oldest NNCF has an environment of its own; constraints-floors.txt holds the oldest NNCF 3.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    own = re.search(r"\bnncf==([0-9.]+)", makefile)
    assert own is not None
    tested["nncf"] = own[1]
    assert len(floors) == listed[1].count('"') // 2, "a dependency without a floor"
    assert floors.keys() == tested.keys()
    for name, floor in floors.items():
        assert (tested[name] + ".").startswith(floor + "."), f"{name}: {tested[name]} is tested, {floor} is allowed"


def test_everything_that_is_installed_by_name_has_a_pin() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = set(re.findall(r"\"([a-z-]+)>=[0-9.]+\"", project))
    for packages in re.findall(r"^\t\$\(PIP\) (?:--no-deps )?([a-z_ -]+)$", makefile, re.MULTILINE):
        asked |= set(packages.split())
    pinned = set(re.findall(r"^([a-z0-9_-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"torch", "timm", "selenium", "pillow", "torch-pruning"} <= asked
    assert asked - pinned == {"setuptools"}
