"""One grammar of scopes for groups, parameters and operations."""

from __future__ import annotations

import pytest
import torch
from support.networks import images, trained

from nncf_compactprune.channels import trace
from nncf_compactprune.decide.scopes import (
    names_of,
    operations_out_of_scope,
    parameters_in_scope,
    prunable_groups,
)
from nncf_compactprune.errors import ScopeError

X = images(torch.float32)
LAYER = "features.1.conv1"  # in the residual network


@pytest.fixture(scope="module")
def model():
    return trained("residual", dtype=torch.float32)


def weights(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dim() > 1}


@pytest.mark.parametrize("scope", [LAYER, "features/1/conv1/conv2d/0", r"{re}features[./]1[./]conv1(/|$)"])
def test_one_layer_by_each_kind_of_name(model, scope: str) -> None:
    graph, every = trace(model, X), weights(model)
    assert parameters_in_scope(model, X, every, [scope], None) == every - {f"{LAYER}.weight"}
    assert parameters_in_scope(model, X, every, [], [scope]) == {f"{LAYER}.weight"}
    produced = [any(m.parameter == f"{LAYER}.weight" and m.role != "consumer" for m in g.members) for g in graph.groups]
    assert any(produced)
    assert prunable_groups(model, X, graph, [], [scope]) == produced
    assert prunable_groups(model, X, graph, [scope], None) == [not p for p in produced]
    assert operations_out_of_scope(model, X, [scope], None) == {"features/1/conv1/conv2d/0"}
    every_operation = {o for found in names_of(model, X).values() for o in found.operations}
    assert operations_out_of_scope(model, X, [], [scope]) == every_operation - {"features/1/conv1/conv2d/0"}


def test_a_container_is_all_below_it_and_ignored_wins(model) -> None:
    every = weights(model)
    below = {name for name in every if name.startswith("features.1.")}
    assert len(below) > 1
    assert parameters_in_scope(model, X, every, [], ["features.1"]) == below
    assert parameters_in_scope(model, X, every, [LAYER], ["features.1"]) == below - {f"{LAYER}.weight"}
    out = operations_out_of_scope(model, X, [LAYER], ["features.1"])
    assert "features/1/conv1/conv2d/0" in out
    assert "features/1/conv2/conv2d/0" not in out
    assert "head/linear/0" in out


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("features.1.conv9", "'features.1.conv9' matches no operation and no module. Did you mean 'features.1.conv"),
        ("{re}conv9", "matches no operation and no module"),
        ("{re}(", r"'\{re\}\(' is no valid regular expression"),
        (f"{LAYER}.weight", "matches no operation"),  # a parameter is no scope; it used to match and mean nothing
    ],
)
@pytest.mark.parametrize("key", ["ignored_scopes", "target_scopes"])
def test_what_matches_nothing_is_told_with_its_key(model, scope: str, message: str, key: str) -> None:
    scopes = ([scope], None) if key == "ignored_scopes" else ([], [scope])
    for call in (
        lambda: prunable_groups(model, X, trace(model, X), *scopes),
        lambda: parameters_in_scope(model, X, weights(model), *scopes),
        lambda: operations_out_of_scope(model, X, *scopes),
    ):
        with pytest.raises(ScopeError, match=f"^{key}: .*{message}"):
            call()
