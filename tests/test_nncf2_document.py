"""docs/from_nncf2_config.md says of every key what is true of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import pytest
from pydantic import BaseModel
from support.places import CONFIGS, ROOT

from nncf_compactprune.algorithms.distillation.algorithm import KnowledgeDistillationConfig
from nncf_compactprune.algorithms.filter_pruning.config import FilterPruningConfig
from nncf_compactprune.algorithms.sparsity.config import (
    ConstSparsityConfig,
    MagnitudeSparsityConfig,
    RBSparsityConfig,
)
from nncf_compactprune.config import load_config
from nncf_compactprune.config.nncf2 import GONE
from nncf_compactprune.config.sections import NotYet

DOCUMENT = (ROOT / "docs" / "from_nncf2_config.md").read_text(encoding="utf-8")
KINDS = (
    FilterPruningConfig,
    MagnitudeSparsityConfig,
    RBSparsityConfig,
    ConstSparsityConfig,
    KnowledgeDistillationConfig,
)


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    return found


def table(title: str) -> dict[str, str]:
    rows = [row for row in section(title).splitlines() if row.startswith("| `")]
    return {cells[1].strip(" `"): cells[2].strip(" `") for cells in (row.split("|") for row in rows)}


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if name in getattr(model, "unread", {}) or (prefix == "" and name == "algorithm"):
            continue
        if any(isinstance(mark, NotYet) for mark in field.metadata):  # refused, with the way
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            result |= fields(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            result[prefix + name] = "" if field.is_required() else json.dumps(default)
    return result


COMMON = table("Of every entry")


def own(kind: type[BaseModel]) -> Mapping[str, str]:
    return {key: default for key, default in fields(kind).items() if key not in COMMON}


def test_every_key_of_every_entry_is_there_with_its_default() -> None:
    assert table("filter_pruning") == own(FilterPruningConfig)
    assert table("knowledge_distillation") == own(KnowledgeDistillationConfig)
    sparsity = table("magnitude_sparsity, rb_sparsity, const_sparsity")
    both = own(MagnitudeSparsityConfig) | {"compression_lr_multiplier": "null"}
    assert sparsity == both
    differing = {key for key, default in own(RBSparsityConfig).items() if sparsity.get(key) != default}
    assert differing == {"params.schedule"}
    assert own(ConstSparsityConfig) == {}
    assert fields(ConstSparsityConfig) == COMMON


def older_keys() -> set[str]:
    rows = [row.split("|")[1] for row in section("Older keys").splitlines() if row.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_every_older_spelling_is_there() -> None:
    spelled = {path for kind in KINDS for path in (*kind.spellings, *kind.leftovers)}
    assert {path.removeprefix("params.") for path in spelled} <= older_keys()
    assert all(f"`{name}`" in DOCUMENT for name in GONE)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("nncf2_*.json")), ids=lambda path: path.stem)
def test_the_configs_load_without_a_warning(path, caplog) -> None:
    load_config(path)
    assert not caplog.records
