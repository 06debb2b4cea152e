"""Residual branches that go as a whole: masked = compact, in torch, plans, optimizers, copies and files."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import openvino
import pytest
import torch
from support.cuts import same, snapshot
from support.depth import graph_with_branches, shallower, with_statistics
from torch import nn

from nncf_compactprune import PruningPlan, apply_plan, export_model, load_pruned, prune, save_pruned
from nncf_compactprune.channels import trace
from nncf_compactprune.channels.branches import Branch
from nncf_compactprune.cut import surgery
from nncf_compactprune.cut.masks import Masks
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.errors import PlanError, SelfCheckError
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.plan import Cost, make_plan
from nncf_compactprune.run.networks.digits_net import digits_net


def torchvision_model(name):
    return lambda: pytest.importorskip("torchvision").models.get_model(name, num_classes=10)


def timm_model(name):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=10)


NETWORKS = {
    "resnet18": (torchvision_model("resnet18"), 8),
    "resnet50": (torchvision_model("resnet50"), 16),
    "mobilenet_v2": (torchvision_model("mobilenet_v2"), 10),
    "fbnetv3_b": (timm_model("fbnetv3_b"), 21),
    "convnext_atto": (timm_model("convnext_atto"), 12),
}


def digits():
    torch.manual_seed(0)
    return with_statistics(digits_net()), torch.randn(2, 1, 16, 16)


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_equals_compact_and_costs_are_exact(name):
    build, count = NETWORKS[name]
    model, x = with_statistics(build()), torch.randn(2, 3, 64, 64)
    graph = graph_with_branches(model, x)
    assert len(graph.branches) == count
    plan = shallower(graph)
    assert len(plan.removed) == (count + 1) // 2
    masks, fresh = Masks(model, graph), copy.deepcopy(model)
    masks.update(plan)
    with torch.no_grad():
        masked = model(x)
        masks.remove()
        apply_plan(fresh, PruningPlan.from_json(plan.to_json()))
        torch.testing.assert_close(fresh(x), masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))
    check = prune_in_place(model, plan, x)
    assert max(check.error, check.inside) < 1e-5
    assert torch.equal(model(x), fresh(x))
    again = trace(model, x)
    assert (again.macs, again.params) == (plan.after.macs, plan.after.params)
    assert again.params == sum(p.numel() for p in model.parameters())


def test_training_sees_no_difference_either():
    """A branch without weights gives zeros in training mode, too: what its BatchNorm would add is masked."""
    model, x = digits()
    plan = shallower(graph_with_branches(model, x), ratio=0)
    masks, compact = Masks(model, graph_with_branches(model, x)), copy.deepcopy(model)
    masks.update(plan)
    apply_plan(compact, plan)
    model.train(), compact.train()
    torch.testing.assert_close(model(x), compact(x), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["another function", "nothing removed"])
def test_a_wrong_shortcut_fails_the_self_check_and_all_is_restored(monkeypatch, wrong):
    model, x = digits()
    plan = shallower(graph_with_branches(model, x))
    before, types = snapshot(model), [type(module) for module in model.modules()]
    spoiled = {"another function": lambda *_: nn.Hardtanh(-0.1, 0.1), "nothing removed": lambda block, _: block}
    monkeypatch.setattr(surgery, "shortcut", spoiled[wrong])
    with pytest.raises(SelfCheckError):
        prune_in_place(model, plan, x)
    assert same(snapshot(model), before)
    assert [type(module) for module in model.modules()] == types


def test_optimizer_and_ema_lose_the_branch_as_well():
    model, x = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    ema = copy.deepcopy(model)
    with pytest.raises(PlanError):  # rolled back as a whole
        apply_plan(model, wrong_plan(model, x, Branch("blocks.2", ("layers.0",))), optimizer=optimizer, ema=ema)
    assert len(optimizer.state) == len(list(model.parameters()))
    plan = shallower(graph_with_branches(model, x))
    apply_plan(model, plan, optimizer=optimizer, ema=ema)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters()) == set(optimizer.state)
    assert (
        model_tensors(ema).shapes()
        == model_tensors(model).shapes()
        == plan.shapes(model_tensors(digits_net()).shapes())
    )
    model(x).square().sum().backward()
    optimizer.step()


def wrong_plan(model, x, branch):
    plan = shallower(graph_with_branches(model, x))
    return PruningPlan(
        {}, plan.fingerprint, plan.before, count_without(model, branch, plan.before.macs), removed=(branch,)
    )


def count_without(model, branch, macs):
    return Cost(macs, sum(p.numel() for name, p in model.named_parameters() if not branch.owns(name)))


@pytest.mark.parametrize(
    ("branch", "said"),
    [
        (Branch("blocks.2", ("layers.0",)), "adds no branch of the layers layers.0 to a shortcut"),
        (Branch("blocks.1", ("layers",)), "adds no branch of the layers layers to a shortcut"),
        (Branch("blocks.77", ("layers",)), "'blocks.77' does not exist in DigitsNet"),
        (Branch("blocks.2", ("other",)), "'blocks.2.other' does not exist in DigitsNet"),
        (Branch("blocks.2", ()), "does not exist in DigitsNet"),
        (Branch("", ("stem",)), "does not exist in DigitsNet"),
    ],
)
def test_plans_that_name_no_branch_are_refused(branch, said):
    model, x = digits()
    before = snapshot(model)
    with pytest.raises(PlanError, match=said):
        apply_plan(model, wrong_plan(model, x, branch))
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace('"layers":["layers"]', '"layers":[1]'), "expected text"),
        (lambda text: text.replace('"removed":[{', '"removed":[7,{'), "removed.0: expected an object"),
        (
            lambda text: text.replace('"kept":{', '"kept":{"blocks.2.layers.0.0.weight":{"0":[1]},'),
            "goes with its branch",
        ),
    ],
)
def test_altered_plans_are_refused(change, said):
    model, x = digits()
    text = shallower(graph_with_branches(model, x), every=1).to_json()
    assert change(text) != text
    with pytest.raises(PlanError, match=said):
        PruningPlan.from_json(change(text)).validate(model)


def test_a_group_alone_does_not_lose_its_last_channel():
    model, x = digits()
    graph = graph_with_branches(model, x)
    keep = [np.ones(group.size, bool) for group in graph.groups]
    branch = next(groups for groups in graph.branches.values() if len(groups) > 1)
    keep[branch[0]][:] = False
    with pytest.raises(PlanError, match="none of all groups of a residual branch"):
        make_plan(graph, keep)


def test_pruned_twice_saved_and_loaded(tmp_path):
    model, x = digits()
    prune_in_place(model, shallower(graph_with_branches(model, x), every=3), x)
    first = surgery.plan_of(model)
    second = shallower(graph_with_branches(model, x), seed=1, every=1)
    prune_in_place(model, second, x)
    plan = surgery.plan_of(model)
    assert [one.block for one in first.removed] == ["blocks.2"]
    assert [one.block for one in plan.removed] == ["blocks.2", "blocks.4", "blocks.6"]
    assert sum(not group.after for group in plan.groups) == 5
    save_pruned(model, tmp_path)
    for inputs in (None, x):
        loaded = load_pruned(digits_net, tmp_path, example_inputs=inputs)
        assert torch.equal(loaded(x), model(x))
    assert copy.deepcopy(model)(x).equal(model(x))


def test_no_operation_of_the_branch_is_in_the_files(tmp_path):
    model, x = digits()
    prune_in_place(model, shallower(graph_with_branches(model, x), every=1), x)
    left = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(left) == 30 - 13, "three blocks of three convolutions, two of them with a gate of two more"
    for suffix in ("onnx", "xml"):
        export_model(model, x, tmp_path / f"model.{suffix}")
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    operations = Counter(one.get_type_name() for one in openvino.Core().read_model(tmp_path / "model.xml").get_ops())
    assert nodes["Conv"] == operations["Convolution"] + operations["GroupConvolution"] == len(left)
    assert nodes["Add"] == 1, "three additions went with their branches; that of the first block has only the stream's"


def test_hooks_of_a_block_go_on():
    model, x = digits()
    shapes = []
    model.blocks[2].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    plan = shallower(graph_with_branches(model, x), every=1, ratio=0)
    prune_in_place(model, plan, x)
    shapes.clear()
    model(x)
    assert shapes == [(2, 24, 16, 16)]


class SplitInside(nn.Module):
    """A branch whose code splits by a list of widths; a list of no channels says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.widths = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), [6, 10]

    def forward(self, x):
        first, second = self.a(x).split(self.widths, 1)
        return x + self.b(torch.cat([first.relu(), second.sigmoid()], 1))


class SplitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), SplitInside(), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x))).mean((2, 3))


def test_a_branch_that_cannot_go_to_none_keeps_a_channel() -> None:
    torch.manual_seed(0)
    model = SplitNet().eval()
    result = prune(model, torch.randn(2, 3, 12, 12), budget={"macs": 0.6}, round_to=1, min_channels=0)
    assert result.self_check.error < 1e-5
    assert min(model.block.widths) >= 1
