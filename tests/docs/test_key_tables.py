"""The tables of keys in the documents are what the classes that read the keys say."""

from __future__ import annotations

import json
import re
import sys

import pytest
from pydantic import BaseModel
from support.places import ROOT

from nncf_compactprune.algorithms.overparameterization.config import OverparameterizationConfig
from nncf_compactprune.algorithms.overparameterization.recovery import RecoveryConfig
from nncf_compactprune.config import json_schema
from nncf_compactprune.config.descriptions import descriptions
from nncf_compactprune.plugins import default_plugins

sys.path.append(str(ROOT / "tools"))
import architecture_picture
import key_tables

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in ROOT.glob("docs/**/*.md")}
BUILT_IN = [
    name for name, cls in default_plugins().algorithms.items() if cls.__module__.startswith("nncf_compactprune")
]


@pytest.mark.parametrize(("page", "text"), PAGES.items(), ids=list(PAGES))
def test_tables_are_up_to_date(page: str, text: str) -> None:
    assert key_tables.filled(text) == text, "run: python tools/key_tables.py"


def test_a_changed_default_is_seen() -> None:
    page = PAGES["docs/fbnet_pruning.md"]
    assert key_tables.filled(page.replace('| `"l2"` |', '| `"l1"` |')) == page
    assert '| `"l2"` |' in page


@pytest.mark.parametrize("name", [*BUILT_IN, "run", "family", "top level", "budget"])
def test_every_key_says_what_it_means(name: str) -> None:
    assert [key for key, _, meaning in key_tables.rows(key_tables.model_of(name)) if not meaning] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_algorithm_has_its_keys_on_a_page(name: str) -> None:
    tables = {
        table.partition(" without ")[0]
        for text in PAGES.values()
        for table in re.findall(r"<!-- keys: (.+?) -->", text)
    }
    by_hand = {"recovery", "linear_overparameterization", "const_sparsity"}
    assert name in tables | by_hand


def test_texts_come_as_markdown_from_a_class_and_its_bases() -> None:
    class Base:
        """Some sizes.

        :param batch: samples of a
            request, as in ``4``.
        :param device: see :func:`~torch.cuda.device`.
        """

    class Own(Base):
        """:param device: where."""

    assert descriptions(Own) == {"device": "where.", "batch": "samples of a request, as in `4`."}
    assert descriptions(Base)["device"] == "see `device`."


def test_the_picture_of_the_rooms_is_up_to_date() -> None:
    assert architecture_picture.PICTURE.read_text("utf-8") == architecture_picture.drawing()


def test_the_schema_says_it_to_editors() -> None:
    entry = json_schema()["$defs"]["FBNetParams"]["properties"]
    assert entry["min_channels"]["description"].startswith(
        "least channels kept in any group. 0: a residual branch may go"
    )


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


@pytest.mark.parametrize(
    ("page", "config"),
    [("docs/overparameterization.md", OverparameterizationConfig), ("docs/recovery.md", RecoveryConfig)],
)
def test_tables_by_hand_list_every_key_with_its_default(page: str, config: type[BaseModel]) -> None:
    """These two say more of a key than its class does."""
    rows = re.findall(r"^\| `((?:params|distillation)\.\w+)` \| `(.*?)` \|", PAGES[page], re.MULTILINE)
    own = {key: value for key, value in fields(config).items() if key.startswith(("params.", "distillation."))}
    assert dict(rows) == own
