"""Tries a built wheel as a visitor would: in a new environment, outside of the repository.

    python tools/check_dist.py dist            # installs it with its dependencies, from the package index
    python tools/check_dist.py dist --behind   # quicker: dependencies are those of this environment

Checks what the archives hold, the command, the packaged demo (shortened), a script, a plan that comes back, and the
types as a user's mypy sees them. Ends with status 1 and a reason at the first thing that is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_WHEEL = ("py.typed", "run/demo.json", "report/templates/run.html")
IN_SOURCES = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/index.md", "tests/conftest.py", "configs")
SCRIPT = """
import torch
from nncf_compactprune import load_pruned, prune, save_pruned
from nncf_compactprune.run.networks.digits_net import digits_net

model, images = digits_net(), torch.randn(2, 1, 16, 16)
result = prune(model, images, budget={"macs": 0.5})
save_pruned(model, "checkpoint")
assert torch.equal(load_pruned(digits_net(), "checkpoint")(images), model.eval()(images))
"""
#: what a consumer may write; the last line is wrong, and mypy has to say so
TYPED = """
import torch
from nncf_compactprune import PruningPlan, prune

plan: PruningPlan = prune(torch.nn.Linear(2, 2), torch.zeros(1, 2), budget={"macs": 0.5}).plan
macs: int = plan.after.macs
wrong: str = plan.after.macs
"""


def check(truth: bool, message: str) -> None:
    if not truth:
        print(f"check_dist: {message}", file=sys.stderr)
        raise SystemExit(1)


def run(words: list[str | Path], folder: Path, status: int = 0) -> str:
    """What a command prints.

    :param words: the command.
    :param folder: where it runs.
    :param status: what it has to end with.
    """
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    check(
        done.returncode == status,
        f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}",
    )
    return done.stdout + done.stderr


def check_archives(dist: Path) -> Path:
    """Looks into both archives, and returns the wheel."""
    wheels, sources = list(dist.glob("*.whl")), list(dist.glob("*.tar.gz"))
    check(len(wheels) == 1 and len(sources) == 1, f"expected one wheel and one source archive in {dist}")
    names = zipfile.ZipFile(wheels[0]).namelist()
    for name in IN_WHEEL:
        check(any(one.endswith(f"nncf_compactprune/{name}") for one in names), f"the wheel does not hold {name}")
    check(
        not [one for one in names if one.startswith(("tests/", "examples/", "tools/"))],
        "the wheel holds more than the package",
    )
    with tarfile.open(sources[0]) as archive:
        inside = archive.getnames()
    for name in IN_SOURCES:
        check(any(f"/{name}" in one for one in inside), f"the source archive does not hold {name}")
    return wheels[0]


def environment(folder: Path, wheel: Path, behind: bool) -> Path:
    """A new environment with the wheel in it; returns its ``bin``."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    python = folder / "bin" / "python"
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if behind:
        own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        place = sysconfig.get_path("purelib")
        (Path(own) / "behind.pth").write_text(f"import site; site.addsitedir({place!r})\n")
        run([*pip, "--no-deps", wheel], folder.parent)
    else:
        flags = os.environ.get("PIP_FLAGS", "").split()
        run([*pip, *flags, "-c", ROOT / "constraints.txt", f"{wheel}[report]", "mypy"], folder.parent)
    return folder / "bin"


def main(dist: Path, behind: bool) -> None:
    wheel = check_archives(dist.resolve())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bin_ = environment(work / "venv", wheel, behind)
        program, python = bin_ / "nncf-compactprune", bin_ / "python"
        place = run([python, "-c", "import nncf_compactprune; print(nncf_compactprune.__file__)"], work).strip()
        check(str(work.resolve()) in str(Path(place.splitlines()[-1]).resolve()), f"the package comes from {place}")
        listed = run([program, "--help"], work)
        for command in ("run", "demo", "inspect", "export", "verify", "benchmark"):
            check(command in listed, f"--help does not name {command}")
        version = run([program, "--version"], work).strip()
        check(version.splitlines()[-1] in wheel.name, f"--version says {version}, the wheel is {wheel.name}")
        short = ("pretrain_epochs=1", "epochs=2", "compression.params.pruning_steps=1", 'export.precisions=["fp32"]')
        run([program, "demo", "--output", "demo", *(word for one in short for word in ("--set", one))], work)
        for file in ("summary.json", "report.md", "plan.json", "pruned/model.onnx", "pruned/model.xml"):
            check((work / "demo" / file).is_file(), f"the demo wrote no {file}")
        (work / "script.py").write_text(SCRIPT)
        run([python, "script.py"], work)
        (work / "typed.py").write_text(TYPED)
        said = run([python, "-m", "mypy", "--strict", "typed.py"], work, status=1)
        check("typed.py:7" in said and "Found 1 error" in said, f"mypy of a consumer says:\n{said}")
    print(f"{wheel.name}: holds what it needs, runs its demo and is typed.")


if __name__ == "__main__":
    check(len(sys.argv) > 1, "expected the folder of the archives, such as dist")
    main(Path(sys.argv[1]), "--behind" in sys.argv)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
