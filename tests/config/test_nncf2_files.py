"""NNCF 2.x's own configuration files load, and their networks become smaller (the whole: examples/benchmarks)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nncf2_configs import prunes, run
from support.places import ROOT

from nncf_compactprune.config import load_config, read_document
from nncf_compactprune.errors import ConfigError
from nncf_compactprune.plugins import default_plugins

FOLDER = (ROOT / ".." / "shared" / "data" / "nncf2_configs").resolve()
FILES = sorted(FOLDER.glob("*.json"))
#: algorithms that NNCF dropped, and how they say so
REFUSED = {"binarization": '"binarization" is not supported'}
MIXED_PRECISION = "initializer.precision: mixed precision is not supported: no runtime here executes it"

needs_files = pytest.mark.skipif(not FILES, reason=f"NNCF 2.x's configuration files are not in {FOLDER.name}")


@needs_files
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("openvinotoolkit-nncf__"))
def test_a_real_file_loads_or_is_refused_for_its_reason(path: Path) -> None:
    document = read_document(path)
    section = document.data["compression"]
    entries = section if isinstance(section, list) else [section]
    unknown = {entry["algorithm"] for entry in entries} - set(default_plugins().algorithms) - set(REFUSED)
    if unknown:
        pytest.skip(f"{', '.join(unknown)} is not installed")
    reasons = [REFUSED[entry["algorithm"]] for entry in entries if entry["algorithm"] in REFUSED]
    if any("precision" in entry.get("initializer", {}) for entry in entries):
        with pytest.raises(ConfigError, match=MIXED_PRECISION):
            load_config(document)
    elif reasons:
        with pytest.raises(ConfigError) as caught:
            load_config(document)
        assert len(caught.value.problems) == len(reasons)
        assert all(reason in str(caught.value) for reason in reasons)
    else:
        assert len(load_config(document).compression) == len(entries)


def kinds() -> list[Path]:
    """One pruning file of each kind of network and of ranking."""
    found: dict[tuple[str, bool], Path] = {}
    for path in FILES:
        config = read_document(path).data
        if prunes(config):
            found.setdefault((config["model"], "learned_ranking" in json.dumps(config)), path)
    return [path for (name, _), path in found.items() if name not in ("resnet34", "resnet50")]  # slow, and as resnet18


@needs_files
@pytest.mark.parametrize("path", kinds(), ids=lambda path: path.stem.removeprefix("openvinotoolkit-nncf__"))
def test_the_network_of_a_real_file_becomes_smaller(path: Path) -> None:
    config = read_document(path).data
    if config["model"] not in ("unet", "ssd_vgg"):
        pytest.importorskip("torchvision")
    outcome = run(config, side=64 if config["model"] == "ssd_vgg" else 32)
    assert outcome.params[0] < outcome.params[1]
    assert outcome.macs[0] < outcome.macs[1]


#: written anew, of the same kinds as the real ones
UNET = {
    "model": "unet",
    "input_info": {"sample_size": [1, 3, 32, 64]},
    "compression": [
        {
            "algorithm": "filter_pruning",
            "pruning_init": 0.05,
            "params": {"pruning_target": 0.25, "pruning_steps": 10, "weight_importance": "geometric_median"},
            "ignored_scopes": ["{re}UNet/ModuleList\\[up_path\\]/UNetUpBlock\\[\\d\\]/NNCFConvTranspose2d\\[up\\].*"],
        }
    ],
}
SSD = {
    "model": "ssd_vgg",
    "num_classes": 4,
    "input_info": {"sample_size": [2, 3, 64, 64]},
    "compression": [
        {"algorithm": "filter_pruning", "params": {"schedule": "baseline", "pruning_flops_target": 0.2}},
        {"algorithm": "knowledge_distillation", "type": "mse", "scale": 0.1},
    ],
}
ICNET = {
    "model": "icnet",
    "input_info": {"sample_size": [1, 3, 32, 32]},
    "compression": {
        "algorithm": "filter_pruning",
        "schedule": "exponential_with_bias",
        "pruning_target": 0.5,
        "pruning_steps": 9,
        "prune_first_conv": True,
        "prune_downsample_convs": True,
        "interlayer_ranking_type": "unweighted_ranking",
        "all_weights": True,
    },
}


@pytest.mark.parametrize("config", [UNET, SSD, ICNET], ids=lambda config: config["model"])
def test_files_of_the_same_kinds(config: dict, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    outcome = run(read_document(path).data)
    assert outcome.params[0] < outcome.params[1]


def test_what_is_checked_can_fail() -> None:
    torch.manual_seed(0)
    entry = {**UNET["compression"][0], "ignored_scopes": ["{re}.*block.*Conv2d.*", "{re}.*up.*"]}
    with pytest.raises(Exception, match="nothing can be pruned"):
        run({**UNET, "compression": [entry]})
