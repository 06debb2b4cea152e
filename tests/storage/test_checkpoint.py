"""Saved = loaded, in another process too, and nothing that comes from a file can harm a model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cuts import HardCoded, assert_facts_are_true, random_plan, same, snapshot
from support.networks import STRUCTURES, images, trained
from support.places import TESTS
from torch import Tensor, nn

from nncf_compactprune import CompactPruneError, PruningPlan, apply_plan
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.surgery import PLAN_ATTRIBUTE, plan_of
from nncf_compactprune.errors import PlanError, SelfCheckError, StorageError
from nncf_compactprune.plan import Cost
from nncf_compactprune.storage.checkpoint import load_pruned, save_pruned

WEIGHTS, PLAN = "model.safetensors", "plan.json"


def pruned(name: str = "residual", *, seed: int = 0, ratio: float = 0.5, dtype: torch.dtype = torch.float32):
    """A pruned model whose weights have moved on since, as fine-tuning makes them."""
    model, x = trained(name, dtype=dtype), images(dtype)
    prune_in_place(model, random_plan(model, x, seed=seed, ratio=ratio), x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def untrained(name: str = "residual", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A dense model with weights of its own."""
    torch.manual_seed(99)
    return STRUCTURES[name]().to(dtype).eval()


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(images(dtype))


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def without_digest(directory: Path) -> None:
    """Weights as another program writes them: they name no plan."""
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = save_pruned(pruned(), tmp_path / "model")
    without_digest(directory)
    return directory


# -- the same on both sides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "with-self-check"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_round_trip_is_bit_identical(name, checked, tmp_path):
    model = pruned(name)
    assert save_pruned(model, tmp_path) == tmp_path
    loaded = load_pruned(untrained(name), tmp_path, example_inputs=images(torch.float32) if checked else None)
    assert torch.equal(output(model), output(loaded))
    assert same(snapshot(model), snapshot(loaded))
    assert_facts_are_true(loaded)
    assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruning_twice_round_trips(name, tmp_path):
    model, x = pruned(name, ratio=0.3), images(torch.float32)
    prune_in_place(model, random_plan(model, x, seed=5, ratio=0.3), x)
    loaded = load_pruned(lambda: untrained(name), save_pruned(model, tmp_path), example_inputs=x)
    assert torch.equal(output(model), output(loaded))
    again = load_pruned(untrained(name), save_pruned(loaded, tmp_path))
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize("name", ["plain", "tied", "weight_norm"])
def test_model_never_pruned_round_trips(name, tmp_path):
    model = trained(name, dtype=torch.float32)
    loaded = load_pruned(untrained(name), save_pruned(model, tmp_path), example_inputs=images(torch.float32))
    assert torch.equal(output(model), output(loaded))
    assert plan_of(loaded).is_identity
    x = images(torch.float32)
    prune_in_place(loaded, random_plan(loaded, x), x)  # and may be pruned from here on
    assert torch.equal(output(loaded), output(load_pruned(untrained(name), save_pruned(loaded, tmp_path))))


def test_replay_in_another_process_is_bit_identical(tmp_path):
    model = pruned("residual")
    save_pruned(model, tmp_path)
    code = (
        "import sys, torch; from support.networks import residual, images;"
        "from nncf_compactprune.storage.checkpoint import load_pruned;"
        "model = load_pruned(residual, sys.argv[1]);"
        "torch.set_grad_enabled(False); sys.stdout.buffer.write(model(images(torch.float32)).numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=TESTS, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(output(model).numpy().tobytes())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype, tmp_path):
    model = trained("plain").to(dtype)
    apply_plan(model, random_plan(trained("plain"), images()))
    loaded = load_pruned(untrained("plain", dtype), save_pruned(model, tmp_path))
    assert same(snapshot(model), snapshot(loaded))


def test_identity_and_memory_format_stay_and_the_model_evaluates(tmp_path):
    save_pruned(pruned("plain"), tmp_path)
    model = untrained("plain").to(memory_format=torch.channels_last).train()
    identity = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    frozen = model.features[0][0].weight.requires_grad_(False)
    assert load_pruned(model, tmp_path) is model
    assert identity == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert model.features[2][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in model.modules())
    assert not frozen.requires_grad
    model(images(torch.float32)).sum().backward()


def test_tied_weights_are_stored_once_under_either_name(tmp_path):
    model = pruned("tied")
    save_pruned(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert "features.a.weight" in stored
    assert "features.b.weight" not in stored
    stored["features.b.weight"] = stored.pop("features.a.weight")
    save_file(stored, tmp_path / WEIGHTS)
    loaded = load_pruned(untrained("tied"), tmp_path)
    assert loaded.features.a.weight is loaded.features.b.weight
    assert torch.equal(output(model), output(loaded))


class SharedStorage(nn.Module):
    """Two tensors that are views of one, a transposed one, and a buffer that is rebuilt and not saved."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.arange(8.0)
        self.low, self.high = nn.Parameter(both[:4]), nn.Parameter(both[4:])
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.register_buffer("counter", torch.tensor(3))
        self.register_buffer("table", torch.ones(2), persistent=False)


def test_views_of_one_storage(tmp_path):
    model, dense = SharedStorage(), SharedStorage()
    with torch.no_grad():
        model.low.add_(100)
    load_pruned(dense, save_pruned(model, tmp_path))
    assert same(snapshot(model.eval()), snapshot(dense))
    assert "table" not in load_file(tmp_path / WEIGHTS)


def test_config_is_written_beside(tmp_path):
    save_pruned(pruned(), tmp_path, config={"model": "timm:resnet18", "compression": {"algorithm": "fbnet_pruning"}})
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "timm:resnet18"
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS, PLAN]
    assert len({(tmp_path / name).stat().st_mode for name in os.listdir(tmp_path)}) == 1, "who reads one reads all"


def test_reformatted_plan_is_the_same_plan(tmp_path):
    model = pruned()
    save_pruned(model, tmp_path)
    text = json.dumps(json.loads((tmp_path / PLAN).read_text()), indent=4).replace("\n", "\r\n")
    (tmp_path / PLAN).write_bytes(text.encode())
    assert torch.equal(output(model), output(load_pruned(untrained(), tmp_path)))


def test_pruned_models_can_be_copied_and_pickled():
    model = pruned()
    assert plan_of(copy.deepcopy(model)) == plan_of(model)
    assert pickle.loads(pickle.dumps(plan_of(model))) == plan_of(model)


def test_not_strict(tmp_path):
    model = pruned()
    save_pruned(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    del stored["head.bias"]
    save_file({**stored, "extra": torch.ones(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CompactPruneError, match=r"missing: 'head.bias'; unknown: 'extra'"):
        load_pruned(untrained(), tmp_path)
    dense = untrained()
    own = dense.head.bias.clone()
    loaded = load_pruned(dense, tmp_path, strict=False)
    assert torch.equal(loaded.head.bias, own)
    assert torch.equal(loaded.head.weight, model.head.weight)
    stored["head.weight"] = stored["head.weight"][:, :1].clone()
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(CompactPruneError, match=r"other: 'head.weight' \(expected F32"):
        load_pruned(untrained(), tmp_path, strict=False)


# -- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(7))  # a flush each, moves of the next plan, weights and plan, the last unlink
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_save_leaves_the_old_or_the_new_checkpoint(step, when, tmp_path, monkeypatch):
    old, new = pruned(seed=1), pruned(seed=2)
    save_pruned(old, tmp_path)
    calls = 0

    def killing(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            mine, calls = calls, calls + 1
            if mine > step:
                raise SystemExit  # dead: nothing after this takes effect, cleaning up neither
            if mine == step and when == "before":
                raise SystemExit
            result = function(*args, **kwargs)
            if mine == step:
                raise SystemExit
            return result

        return wrapped

    with monkeypatch.context() as patch:
        # A dead process cleans nothing up either.
        patch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)
        for target, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            patch.setattr(target, name, killing(getattr(target, name)))
        with pytest.raises(SystemExit):
            save_pruned(new, tmp_path)
    result = output(load_pruned(untrained(), tmp_path))
    weights_replaced = step > 4 or (step == 4 and when == "after")
    assert torch.equal(result, output(new if weights_replaced else old))
    save_pruned(new, tmp_path)
    assert torch.equal(output(load_pruned(untrained(), tmp_path)), output(new))


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file: cannot be written"):
        save_pruned(pruned(), tmp_path / "file")


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"anything": object()}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Sequential(WithExtraState(2, 2)), "'0' has extra state"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "'0.weight' is not initialised"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
        (lambda: nn.Sequential(pruned()), "'0' was pruned on its own"),
    ],
)
def test_models_that_cannot_be_saved(build, words, tmp_path):
    with pytest.raises(CompactPruneError, match=words):
        save_pruned(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_model_rebuilt_since_pruning_is_not_saved(tmp_path):
    model = pruned()
    model.head = nn.Linear(24, 5)
    with pytest.raises(CompactPruneError, match=r"'head.weight' of shape \(5, 24\) is not what the pruning left"):
        save_pruned(model, tmp_path)


def test_config_that_is_no_json(tmp_path):
    with pytest.raises(CompactPruneError, match="config: expected a JSON document"):
        save_pruned(pruned(), tmp_path / "new", config={"x": object()})
    assert not (tmp_path / "new").exists()


# -- refused before anything is touched ------------------------------------------------------------------------------

STEM = "features.0.0.weight"
CONSUMER = "features.1.conv1.weight"


def pad_name(d):
    d["kept"]["x" * 10**6] = {"0": [0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["kept"][STEM].update({"0": [0, 99]}), r"position 99 is out of range, expected 0 to 15"),
        (lambda d: d["kept"][STEM].update({"0": [0, 2**62]}), r"out of range"),
        (lambda d: d["kept"][STEM].update({"0": [0, 2**63]}), r"expected a whole number"),
        (lambda d: d["kept"][STEM].update({"0": [True]}), r"expected a whole number.*got True"),
        (lambda d: d["kept"][STEM].update({"0": [1.0]}), r"whole numbers only, got 1.0"),
        (lambda d: d["kept"][STEM].update({"0": [1, 1]}), r"without repeats"),
        (lambda d: d["kept"][STEM].update({"0": [2, 1]}), r"ascending"),
        (lambda d: d["kept"][STEM].update({"00": [1]}), r"dimensions from 0 to 16, got '00'"),
        (lambda d: d["kept"][STEM].update({"-1": [1]}), r"dimensions from 0 to 16"),
        (lambda d: d["kept"].pop(STEM), r"after: states \d+ parameters, but they are \d+"),
        (lambda d: d["after"].update(params=1), r"after: states 1 parameters"),
        (lambda d: d["before"].update(params=10**9), r"before: states"),
        (lambda d: d["after"].update(macs=2**61), r"after.macs: expected at most"),
        (lambda d: d["groups"][0].update(after=10**6), r"groups.0.after: expected at most 16"),
        (lambda d: d["kept"].update({STEM: {"2": [0]}}), r"plan: "),
        (lambda d: d.update(version=1.0), r"whole numbers"),
        (lambda d: d.update(version=2), r"version: expected 1, as this version of nncf_compactprune writes it, got 2"),
        (lambda d: d.update(version=True), r"version: expected 1"),
        (lambda d: d.update(algorithm="\ud800"), r"algorithm: expected text"),
        (lambda d: d["kept"].update({"\x1b[2Jx": {"0": [0]}}), r"'\\x1b\[2Jx' does not exist"),
        (pad_name, r"got more\. This is no plan|does not exist"),
    ],
)
def test_altered_plan(saved, change, words):
    model = untrained()
    before = snapshot(model)
    edit(saved / PLAN, change)
    with pytest.raises(PlanError, match=words) as caught:
        load_pruned(model, saved)
    assert len(str(caught.value)) < 600
    assert same(before, snapshot(model))
    assert not hasattr(model, PLAN_ATTRIBUTE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"null", "expected an object, got None"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"kept":' * 50_000, "nested too deeply|not JSON"),
        (b'{"kept": {}, "kept": {}}', "'kept' is given twice"),
        (b'{"version": ' + b"9" * 100_000 + b"}", "not JSON"),
        (b'{"version": NaN}', "whole numbers only"),
        (b" " * 10**7, "got more. This is no plan for it"),
    ],
    ids=["empty", "binary", "null", "deep-lists", "deep-objects", "twice", "digits", "nan", "huge"],
)
def test_text_that_is_no_plan(saved, text, words):
    (saved / PLAN).write_bytes(text)
    with pytest.raises(PlanError, match=words):
        load_pruned(untrained(), saved)


def test_millions_of_faults_cost_no_more_than_their_text():
    """The reader stops at the first; one that collects them needs gigabytes here."""
    text = '{"format":"nncf_compactprune.plan","version":1,"kept":[' + "-1," * 5_000_000 + "0]}"
    with pytest.raises(PlanError, match="expected format, version"):
        PruningPlan.from_json(text)


def refit(plan: PruningPlan, model: nn.Module, **kept) -> PruningPlan:
    """A plan with other positions and honest counts, as a careful forger makes it."""
    changed = {**plan.kept, **{name.replace("__", "."): dims for name, dims in kept.items()}}
    changed = {name: dims for name, dims in changed.items() if dims}
    forged = PruningPlan(changed, plan.fingerprint, plan.before, plan.after)
    shapes = forged.shapes({n: tuple(p.shape) for n, p in model.named_parameters()})
    params = sum(torch.Size(shape).numel() for shape in shapes.values())
    return PruningPlan(changed, plan.fingerprint, plan.before, Cost(0, params))


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("plain", {"features__0__1__bias": {0: (0, 1)}}, r"BatchNorm2d 'features.0.1': its bias keeps 2 channels"),
        ("plain", {"features__0__1__running_var": {}}, r"BatchNorm2d 'features.0.1': its running_var keeps 16"),
        ("plain", {"features__0__0__weight": {2: (0, 1)}}, r"Conv2d 'features.0.0': its kernel is cut"),
        ("squeeze_excite", {"features__1__reduce__bias": {}}, r"Conv2d 'features.1.reduce': its bias keeps 8"),
        ("flatten", {"hidden__bias": {0: (0,)}}, r"Linear 'hidden': its bias keeps 1"),
        ("grouped", {"features__1__0__weight": {0: (0, 1, 8)}}, r"different numbers of channels in its 4 groups"),
        ("depthwise", {"features__4__weight": {0: (0, 2, 3)}}, r"keeps a part of a group whose channels go together"),
        ("transposed", {"up_grouped__bias": {0: (0, 5)}}, r"ConvTranspose2d 'up_grouped': its bias keeps 2"),
        ("group_norm", {"features__1__weight": {0: (0,)}, "features__1__bias": {0: (0,)}}, r"part of one of its 8"),
        (
            "weight_norm",
            {"features__0__parametrizations__weight__original0": {0: (0, 1)}},
            r"parts of its re-parameterised 'weight' keep different positions",
        ),
    ],
)
def test_forged_plan_that_does_not_fit_within_a_layer(name, kept, words, tmp_path):
    model = untrained(name)
    plan = random_plan(trained(name, dtype=torch.float32), images(torch.float32))
    plan.validate_consistency(model)
    forged = refit(plan, model, **kept)
    forged.validate(model)
    with pytest.raises(PlanError, match=words):
        forged.validate_consistency(model)
    save_pruned(pruned(name), tmp_path)
    without_digest(tmp_path)
    (tmp_path / PLAN).write_text(forged.to_json())
    before = snapshot(model)
    with pytest.raises(PlanError, match=words):
        load_pruned(model, tmp_path)
    assert same(before, snapshot(model))


def producer_alone(directory: Path) -> None:
    """Cuts a linear layer and not the one after it: every layer fits in itself, counts and weights are honest."""
    dense = untrained("flatten")
    plan = refit(PruningPlan({}, "", Cost(0, 0), Cost(0, 0)), dense)
    save_pruned(dense, directory)
    identity = PruningPlan.from_json((directory / PLAN).read_text())
    plan = refit(identity, dense, hidden__weight={0: (0, 1)}, hidden__bias={0: (0, 1)})
    (directory / PLAN).write_text(plan.to_json())
    stored = load_file(directory / WEIGHTS)
    stored.update({name: stored[name][:2].clone() for name in ("hidden.weight", "hidden.bias")})
    save_file(stored, directory / WEIGHTS)


def test_producer_without_its_consumer_is_told_by_example_inputs(tmp_path):
    producer_alone(tmp_path)
    model = untrained("flatten").train()
    before = snapshot(model)
    with pytest.raises(SelfCheckError, match="does not run after the cut"):
        load_pruned(model, tmp_path, example_inputs=images(torch.float32))
    assert same(before, snapshot(model))
    assert plan_of(model) is None
    assert model.training


def test_wrong_positions_of_a_consumer_are_told_by_example_inputs(saved):
    """Counts are right, positions are not: the weights still load, but it is no pruning of this model."""
    document = json.loads((saved / PLAN).read_text())
    positions = document["kept"][CONSUMER]["1"]
    other = next(p for p in range(16) if p not in positions)
    positions[:] = sorted([*positions[1:], other])
    (saved / PLAN).write_text(json.dumps(document))
    model = untrained()
    before = snapshot(model)
    with pytest.raises(SelfCheckError, match="differs from the masked one"):
        load_pruned(model, saved, example_inputs=images(torch.float32))
    assert same(before, snapshot(model))


def test_plan_of_another_model(saved):
    model = untrained("plain")
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"does not exist|another model"):
        load_pruned(model, saved)
    assert same(before, snapshot(model))


def test_model_that_is_pruned_already(saved):
    model = pruned()
    with pytest.raises(PlanError, match=r"out of range|another model"):
        load_pruned(model, saved)


def test_plan_of_another_save(tmp_path):
    save_pruned(pruned(seed=1), tmp_path / "a")
    save_pruned(pruned(seed=2), tmp_path / "b")
    (tmp_path / "a" / PLAN).write_bytes((tmp_path / "b" / PLAN).read_bytes())
    with pytest.raises(PlanError, match="is not the one that the weights were saved with"):
        load_pruned(untrained(), tmp_path / "a")


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(CompactPruneError, match=f"{name}: no such file"):
        load_pruned(untrained(), saved)
    (saved / name).mkdir()
    with pytest.raises(CompactPruneError, match=f"{name}: no such file"):
        load_pruned(untrained(), saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "head.weight": t["head.weight"].t().contiguous()}, r"'head.weight' \(expected F32 \[5, \d+\]"),
        (lambda t: {**t, "head.weight": t["head.weight"].double()}, r"got F64 \[5, \d+\]"),
        (lambda t: {k: v for k, v in t.items() if k != "head.bias"}, r"missing: 'head.bias'"),
        (lambda t: {**t, "head.biaz": t["head.bias"].clone()}, r"unknown: 'head.biaz'"),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, r"and \d+ more; unknown"),
    ],
)
def test_weights_that_do_not_fit(saved, change, words):
    model = untrained()
    before = snapshot(model)
    save_file(change(load_file(saved / WEIGHTS)), saved / WEIGHTS)
    with pytest.raises(CompactPruneError, match=words):
        load_pruned(model, saved)
    assert same(before, snapshot(model))


def test_pickled_weights_are_not_read(saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "exploded"),)

    for write in (lambda p: torch.save({"x": Bomb()}, p), lambda p: p.write_bytes(pickle.dumps(Bomb()))):
        write(saved / WEIGHTS)
        with pytest.raises(CompactPruneError, match="is no safetensors file"):
            load_pruned(untrained(), saved)
    assert not (saved / "exploded").exists()


def test_weights_are_copied_from_the_file(saved):
    model = load_pruned(untrained(), saved)
    before = output(model)
    size = (saved / WEIGHTS).stat().st_size
    with open(saved / WEIGHTS, "rb+") as file:
        file.seek(size // 2)
        file.write(b"\x7f" * (size // 2))
    assert torch.equal(output(model), before)


def test_failure_while_loading_restores(saved, monkeypatch):
    """The last step fails: the cut and what was loaded before it are undone."""
    model = untrained()
    model(images(torch.float32)).sum().backward()
    before, grads = snapshot(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    empty_like, calls = torch.empty_like, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 10:
            raise torch.OutOfMemoryError
        return empty_like(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", failing)
        with pytest.raises(torch.OutOfMemoryError):
            load_pruned(model, saved)
    assert same(before, snapshot(model))
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters())
    assert plan_of(model) is None


def test_hard_coded_width_is_told_by_example_inputs(tmp_path):
    model = HardCoded()
    save_pruned(model, tmp_path)
    identity = PruningPlan.from_json((tmp_path / PLAN).read_text())
    kept = {"conv__weight": {0: (0, 1)}, "conv__bias": {0: (0, 1)}, "head__weight": {1: (0, 1)}}
    apply_plan(model, refit(identity, model, **kept))
    save_pruned(model, tmp_path)
    with pytest.raises(SelfCheckError, match="does not run after the cut"):
        load_pruned(HardCoded, tmp_path, example_inputs=torch.randn(1, 3, 8, 8))


class WithTable(nn.Module):
    """Its table of positions is no part of a checkpoint, and is as large as the last input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))[:, None]
        return self.last((self.first(x) + self.table).relu())


def test_a_table_that_a_run_fills_does_not_make_it_another_network(tmp_path):
    model, x = WithTable().eval(), torch.randn(2, 5, 6)
    model(x)
    prune_in_place(model, random_plan(model, x), x)
    save_pruned(model, tmp_path)
    assert torch.equal(load_pruned(WithTable(), tmp_path).eval()(x), model(x))


@pytest.mark.parametrize("given", [None, "resnet50", lambda: "resnet50"])
def test_what_is_no_model(saved, given):
    with pytest.raises(CompactPruneError, match=r"expected a torch.nn.Module or a function that builds one"):
        load_pruned(given, saved)


@pytest.mark.parametrize("name", STRUCTURES)
def test_honest_plans_are_consistent(name):
    dense = trained(name)
    for seed in range(3):
        plan = random_plan(dense, images(), seed=seed, allow_approximate=seed == 2)
        plan.validate(dense)
        plan.validate_consistency(dense)
