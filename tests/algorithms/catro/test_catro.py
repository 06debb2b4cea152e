"""CATRO end to end: the better channels are kept, labels are asked for, subtasks cut the classifier and come back."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import STRUCTURES, images, model32
from support.user_files import NET_SOURCE
from torch import Tensor, nn

from nncf_compactprune import PruningPlan, create_compressed_model, load_pruned, prune, save_pruned
from nncf_compactprune.algorithms.catro.subtask import ClassSubset
from nncf_compactprune.channels import trace
from nncf_compactprune.cli import main
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import apply_plan, plan_of
from nncf_compactprune.errors import BudgetError, CompactPruneError, ConfigError, DataError, PlanError, SelfCheckError
from nncf_compactprune.run.datasets import only_classes, resolve_dataset
from nncf_compactprune.storage.plan_file import PLAN_FILE


def loader(n: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 3, 12, 12, generator=generator), torch.arange(n) % 5
    return list(zip(x.split(6), y.split(6), strict=True))


def catro(model: nn.Module, budget: object = None, batches: object = None, **params: object):
    return prune(
        model, images(torch.float32), "catro", budget=budget or {"macs": 0.5}, round_to=1,
        train_loader=loader() if batches is None else batches, **params,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_every_structure_is_pruned(name: str) -> None:
    model = model32(name)
    if name == "transposed":
        with pytest.raises(CompactPruneError, match=r"'catro' needs a classifier: .* got \[2, 2, 12, 12\]"):
            catro(model, {"macs": 0.8})
        return
    result = catro(model, {"macs": 0.8})
    assert result.plan.after.macs <= 0.8 * result.plan.before.macs
    assert trace(model, images(torch.float32)).macs == result.plan.after.macs


@pytest.mark.parametrize("form", ["margin", "plain"])
@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
def test_all_budgets_hold_at_once(form: str, allocation: str) -> None:
    plan = catro(model32(), {"macs": 0.6, "params": 0.4}, form=form, allocation=allocation).plan
    assert plan.after.macs <= 0.6 * plan.before.macs
    assert plan.after.params <= 0.4 * plan.before.params
    assert plan.algorithm == "catro"


def test_floors_rounding_and_scopes_hold() -> None:
    model = model32("plain")
    result = prune(
        model, images(torch.float32), "catro", budget={"macs": 0.7}, train_loader=loader(), round_to=4, max_ratio=0.5,
        ignored_scopes=["features.0"],
    )  # fmt: skip
    first, *others = result.plan.groups
    assert first.after == first.before
    assert all(g.after % 4 == 0 and g.after >= g.before / 2 for g in others)
    with pytest.raises(BudgetError, match="cannot be reached"):
        catro(model32(), {"macs": 0.01}, max_ratio=0.3)


def test_channels_that_matter_for_no_class_go_first() -> None:
    """Dead channels, and living ones that no class score depends on."""
    model = model32("plain")
    with torch.no_grad():
        model.features[0][1].weight[:4] = 0  # dead: constant 0 behind the ReLU
        model.features[0][1].bias[:4] = 0
        model.head.weight[:, 8:] = model.head.weight[:1, 8:]  # the same for all classes: margins do not move
    result = catro(model, {"macs": 0.45}, contribution=0.0)
    kept = result.plan.kept
    assert not set(kept["features.0.0.weight"][0]) & set(range(4))
    assert sum(c < 8 for c in kept["features.3.0.weight"][0]) == min(8, len(kept["features.3.0.weight"][0]))


def test_a_schedule_ramps_masks_with_statistics_taken_anew() -> None:
    model = model32()
    config = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": {
            "algorithm": "catro", "budget": {"macs": 0.5}, "params": {"round_to": 1, "pruning_steps": 3},
        },
    }  # fmt: skip
    ctrl, _ = create_compressed_model(model, config, loader())
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    widths = []
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        if ctrl.algorithms[0].plan is not None:
            widths.append([g.after for g in ctrl.algorithms[0].plan.groups])
    assert (np.diff(np.array(widths), axis=0) <= 0).all()  # what was masked has no effect any more, so it stays out
    assert trace(model, images(torch.float32)).macs <= 0.5 * plan_of(model).before.macs


def test_hugging_face_batches_and_outputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model32("plain")

        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(pixel_values)}

    model = Wrapped()
    batches = [{"pixel_values": x, "labels": y} for x, y in loader()]
    result = prune(
        model, {"pixel_values": images(torch.float32)}, "catro", budget={"macs": 0.5}, train_loader=batches, round_to=1
    )
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs


class ByEinsum(nn.Module):
    """Channels that an operation consumes which is not looked into."""

    def __init__(self, with_conv: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 12, 3)
        self.second = nn.Conv2d(12, 12, 3) if with_conv else nn.Identity()
        self.head = nn.Parameter(torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return torch.einsum("bc,oc->bo", x, self.head)


def test_groups_whose_consumers_are_not_seen_fall_back_on_filter_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    from nncf.common.logging import nncf_logger

    said = []
    monkeypatch.setattr(nncf_logger, "warning", lambda text, *args: said.append(text % args))
    model = ByEinsum(with_conv=True)
    norms = model.second.weight.detach().square().sum((1, 2, 3)) + model.second.bias.detach().square()
    result = catro(model, {"macs": 0.4})
    kept = result.plan.kept["second.weight"][0]
    assert sorted(kept) == sorted(norms.topk(len(kept)).indices.tolist())
    assert said == ["catro: these groups are ranked by filter norms, because no consumer was seen: second."]
    with pytest.raises(CompactPruneError, match="saw no convolution or matrix product consume a channel of ByEinsum"):
        catro(ByEinsum(with_conv=False))


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([x for x, _ in loader()], "hold no labels"),
        ([(x, y.float()) for x, y in loader()], "integer class indices as labels, got torch.float32"),
        ([(x, F.one_hot(y, 5)) for x, y in loader()], r"shape \[n\], got \[6, 5\]"),
        ([(x, y + 1) for x, y in loader()], "label 5 is out of range: the model has 5 classes"),
        ([], "samples of 0 classes"),
    ],
)
def test_loaders_without_proper_labels_are_refused_and_nothing_is_touched(batches: object, message: str) -> None:
    model = model32()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=message):
        catro(model, batches=batches)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert plan_of(model) is None


def test_no_loader_at_all() -> None:
    with pytest.raises(DataError, match="'catro' chooses channels by labelled samples: give a train_loader"):
        prune(model32(), images(torch.float32), "catro", budget={"macs": 0.5})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allocation": "global"}, 'allocation: expected one of "greedy", "uniform", got "global"'),
        ({"classes": [1]}, r"at least two different class indices from 0, got \[1\]"),
        ({"classes": [1, 1]}, "at least two different class indices"),
        ({"classes": [0, -1]}, "at least two different class indices"),
        ({"classes": [0, 1], "schedule": "exponential"}, '"schedule": "one_shot"'),
        ({"damping": 2.0}, "damping"),
        ({"samples_per_class": 0}, "samples_per_class"),
    ],
)
def test_wrong_params_are_named(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        catro(model32(), **params)


def test_classes_that_the_model_has_not() -> None:
    with pytest.raises(CompactPruneError, match=r"params\.classes: 5 is out of range, expected 0 to 4"):
        catro(model32(), classes=[1, 5])


# -- subtasks ----------------------------------------------------------------------------------------------------------


def test_the_classifier_is_cut_to_the_classes() -> None:
    dense = model32()
    model = copy.deepcopy(dense)
    model.num_classes = 5  # as timm's models say
    result = catro(model, {"macs": 1.0}, classes=[3, 1], batches=[(x, y) for x, y in loader()])
    plan = result.plan
    assert model.num_classes == 2
    assert plan.output_classes == (1, 3)
    assert model.head.out_features == 2
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    assert plan.after.macs == trace(model, images(torch.float32)).macs
    assert result.self_check.error < 1e-5


def test_without_a_budget_to_meet_the_scores_are_those_of_the_dense_model() -> None:
    dense, x = model32(), images(torch.float32)
    model = copy.deepcopy(dense)
    graph = trace(model, x)
    from nncf_compactprune.algorithms.catro.subtask import with_classifier_cut
    from nncf_compactprune.plan import make_plan
    from nncf_compactprune.plugins import default_plugins

    plan = make_plan(graph, [np.ones(g.size, bool) for g in graph.groups])
    plan = with_classifier_cut(plan, model, graph, (0, 2, 4), x, default_plugins())
    prune_in_place(model, plan, x)
    torch.testing.assert_close(model(x), dense(x)[:, [0, 2, 4]])


def test_a_subtask_comes_back_from_disk(tmp_path: Path) -> None:
    model, x = model32(), images(torch.float32)
    catro(model, classes=[0, 2])
    save_pruned(model, tmp_path)
    again = load_pruned(model32(), tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert plan_of(again).output_classes == (0, 2)
    checked = load_pruned(model32(), tmp_path, example_inputs=x)
    assert checked.head.out_features == 2
    assert PruningPlan.from_json(plan_of(model).to_json()) == plan_of(model)


def test_plans_without_classes_read_as_before() -> None:
    plan = catro(model32()).plan
    assert "output_classes" not in json.loads(plan.to_json())
    assert PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "ascending class indices"),
        ([2, 0], "ascending class indices"),
        ([0, 0], "ascending class indices"),
        ([0, 3], "no weight keeps just these 2 rows"),
        ([0], "no weight keeps just these 1 rows"),
        ([0, 2, 2**63], "output_classes.2: expected a whole number"),
        ([0, True], "output_classes.1: expected a whole number"),
        ("02", "expected an array"),
        ({"0": 2}, "expected an array"),
        (None, "expected an array"),
    ],
)
def test_altered_classes_in_a_plan_are_refused(classes: object, message: str, tmp_path: Path) -> None:
    model = model32()
    catro(model, classes=[0, 2])
    document = json.loads(plan_of(model).to_json())
    document["output_classes"] = classes
    dense = model32()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(PlanError, match=message):
        apply_plan(dense, PruningPlan.from_json(json.dumps(document)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), dense.state_dict().values(), strict=True))


def test_classes_of_another_layer_fail_the_self_check(tmp_path: Path) -> None:
    """Rows that some other weight keeps pass for classes until the model runs."""
    model, x = model32(), images(torch.float32)
    catro(model, classes=[0, 2])
    plan = plan_of(model)
    wrong = next(d[0] for n, d in plan.kept.items() if n != "head.weight" and 0 in d and d[0] != (0, 2))
    forged = dataclasses.replace(plan, output_classes=wrong)
    with pytest.raises((PlanError, SelfCheckError)):
        prune_in_place(model32(), forged, x)


def test_plans_of_subtasks_compose() -> None:
    model = model32()
    catro(model, {"macs": 0.8}, classes=[0, 2, 4])
    batches = [(a, torch.arange(len(a)) % 3) for a, _ in loader()]
    catro(model, {"macs": 0.8}, classes=[0, 2], batches=batches)
    plan = plan_of(model)
    assert plan.output_classes == (0, 4)
    again = model32()
    apply_plan(again, plan)
    assert again.head.out_features == 2


def test_scores_that_come_from_no_layer_cannot_be_cut() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model32("plain")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * torch.arange(1.0, 6.0)

    model = Softmax()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompactPruneError):
        catro(model, classes=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_class_subset_filters_and_renames() -> None:
    y = torch.tensor([4, 1, 3, 1])
    x = torch.arange(4.0)[:, None]
    subset = ClassSubset([(x, y), (x[:1], y[:1] * 0)], [4, 1])
    for _ in range(2):  # iterated anew
        ((inputs, labels),) = list(subset)
        assert inputs.ravel().tolist() == [0, 1, 3]
        assert labels.tolist() == [1, 0, 0]
    ((batch),) = list(ClassSubset([{"pixel_values": x, "labels": y}], [1, 3]))
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["pixel_values"].ravel().tolist() == [1, 2, 3]


def test_datasets_of_some_classes() -> None:
    whole = resolve_dataset("digits")
    part = only_classes(whole, [8, 3])
    assert part.class_names == ("3", "8")
    assert len(part.test) == int((whole.test.labels == 3).sum() + (whole.test.labels == 8).sum())
    x, y = next(iter(part.test_loader(1000)))
    expected, labels = next(iter(whole.test_loader(1000)))
    chosen = (labels == 3) | (labels == 8)
    assert torch.equal(x, expected[chosen])
    assert torch.equal(y, (labels[chosen] == 8).long())
    subset = list(ClassSubset(whole.test_loader(1000), [8, 3]))
    assert torch.equal(y, subset[0][1])


@pytest.mark.slow
def test_the_command_line_reports_accuracy_on_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model": f"python:{tmp_path / 'net.py'}:build",
        "dataset": "digits",
        "pretrain_epochs": 6,
        "epochs": 3,
        "optimizer": {"lr": 0.1},
        "compression": {
            "algorithm": "catro",
            "budget": {"macs": 0.4},
            "params": {"schedule": "one_shot", "round_to": 1, "classes": [3, 8], "samples_per_class": 10},
        },
        "export": {"formats": ["onnx"], "precisions": ["fp32"]},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "net.py").write_text(NET_SOURCE)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path)])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    assert "Dense, among classes 3, 8: test accuracy" in printed
    report = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert report["classes"] == [3, 8]
    assert report["pruned"]["accuracy"] > 0.8
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert plan["output_classes"] == [3, 8]
