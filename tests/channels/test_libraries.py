"""Real networks of timm and Hugging Face, in their smallest forms: pruned, exact, trainable, and reloaded."""

from __future__ import annotations

import copy
import importlib.util
import json
import operator

import numpy as np
import pytest
import torch
from support.places import BENCHMARKS

from nncf_compactprune import analyse, export_model, load_pruned, prune, save_pruned
from nncf_compactprune.cut.surgery import apply_plan, cut
from nncf_compactprune.cut.transaction import for_a_while
from nncf_compactprune.errors import BudgetError, CompactPruneError, NothingPrunableError
from nncf_compactprune.integrations.timm import load_pruned_timm, save_pruned_timm


def load_sweep():
    """The benchmark script, under a name that is not that of the coverage package."""
    spec = importlib.util.spec_from_file_location("coverage_sweep", BENCHMARKS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
sweep = load_sweep()

TIMM = timm.list_models("test_*")
EXTRA = [
    "resnet18", "mobilenetv2_050", "ghostnet_100", "shvit_s1", "res2net50_26w_4s", "mixnet_s",
    "swin_tiny_patch4_window7_224",
]  # fmt: skip


def build(library: str, name: str):
    return sweep.build(library, name)


def pruned(library: str, name: str):
    model, x = build(library, name)
    settings = {"budget": {"macs": 0.8}, "round_to": 1, "importance": "l1", "max_ratio": 0.8}
    try:
        return model, x, prune(model, x, **settings)
    except (NothingPrunableError, BudgetError):  # LayerNorm or standardised weights everywhere
        return model, x, prune(model, x, allow_approximate=True, **settings)


@pytest.mark.parametrize(
    ("library", "name"),
    [("timm", name) for name in [*TIMM, *EXTRA]] + [("transformers", name) for name in sweep.hugging_face()],
)
def test_pruned_exact_trains_and_reloads(library, name, tmp_path):
    model, x, result = pruned(library, name)
    assert result.self_check.error <= 1e-5
    assert result.plan.after.macs <= 0.8 * result.plan.before.macs
    assert sweep.trains(model, x)
    save_pruned(model, tmp_path)
    again = load_pruned(lambda: build(library, name)[0], tmp_path)
    with torch.no_grad():
        for a, b in zip(outputs(model, x), outputs(again, x), strict=True):
            assert torch.equal(a, b)


def outputs(model, x):
    return [t for t in torch.utils._pytree.tree_leaves(sweep.call(model.eval(), x)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("mixnet_s", "splits"), ("res2net50_26w_4s", "width"), ("fasternet_t0", "dim_conv3"),
        ("cs3darknet_s", "expand_chs"), ("rexnet_100", "in_channels"), ("dpn48b", "num_1x1_c"),
    ],
)  # fmt: skip
def test_networks_that_split_by_their_own_numbers_have_no_floor(name, attribute):
    model = timm.create_model(name, num_classes=5)
    x = torch.randn(1, 3, 64, 64)
    graph = analyse(model, x)
    assert {pinned.reason for pinned in graph.pinned} == {"model output"}
    assert graph.cost.macs(np.ones(len(graph.groups))) < 0.02 * graph.macs
    result = prune(model, x, budget={"macs": 0.5}, round_to=1, importance="l1")
    assert attribute in {key for values in result.plan.attributes.values() for key in values}


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("timm", "test_vit"),
        ("timm", "test_resnet"),
        pytest.param("timm", "mixnet_s", marks=pytest.mark.slow),
        ("transformers", "Swin"),
    ],
)
def test_exports_with_fewer_heads_and_channels(library, name, tmp_path):
    model, x, _ = pruned(library, name)
    files = export_model(model, x, tmp_path / "model.onnx")
    assert files[0].verification.max_rel_error < 1e-5


def test_timm_models_keep_name_arguments_and_data_config(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    x = torch.randn(2, 1, 64, 64)
    prune(model, x, budget={"macs": 0.6}, round_to=1)
    save_pruned_timm(model, tmp_path, num_classes=7, in_chans=1)
    again = load_pruned_timm(tmp_path, example_inputs=x)
    assert not again.training
    assert torch.equal(outputs(model, x)[0], outputs(again, x)[0])
    config = timm.data.resolve_data_config(model=again)
    assert config == timm.data.resolve_data_config(model=model)
    with pytest.raises(CompactPruneError, match=r"expected a model of timm\.create_model"):
        save_pruned_timm(torch.nn.Linear(2, 2), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "architecture": "no_such"}))
    with pytest.raises(CompactPruneError, match="has no model 'no_such'"):
        load_pruned_timm(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CompactPruneError, match="expected what save_pruned_timm wrote"):
        load_pruned_timm(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_resnet", ("num_features", "head_hidden_size")),
        ("regnetx_002", ("num_features", "head_hidden_size", "head.in_features", "head.num_features")),
        ("mobilenetv3_small_050", ("num_features", "head_hidden_size")),  # of two widths
        ("levit_128s", ("num_features", "head_hidden_size")),  # two classifiers, each with a norm
        ("test_vit", ("num_features", "head_hidden_size", "embed_dim")),
    ],
)
def test_a_new_head_of_a_pruned_timm_model_fits_its_width(name, said):
    def numbers(model):
        return [operator.attrgetter(one)(model) for one in said]

    size = 224 if name == "levit_128s" else 64
    x = torch.randn(2, 3, size, size)
    model = timm.create_model(name, num_classes=5, **({"img_size": size} if name == "test_vit" else {}))
    dense = numbers(model)
    settings = {"allow_approximate": True, "allocation": "uniform", "round_to": 1}  # narrows every group
    result = prune(copy.deepcopy(model), x, budget={"macs": 0.5}, **settings)
    with for_a_while() as log:
        cut(log, model, result.plan)
        assert all(new < old for new, old in zip(numbers(model), dense, strict=True))
    assert numbers(model) == dense
    apply_plan(model, result.plan)  # as load_pruned does
    model.reset_classifier(3)
    assert outputs(model, x)[0].shape == (2, 3)
