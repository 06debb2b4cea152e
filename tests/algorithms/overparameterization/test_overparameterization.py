"""``linear_overparameterization`` in NNCF's loop: exact at both ends, resumable, and at home with what loops hold."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from support.networks import STRUCTURES, images, labelled_batches, model32, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nncf_compactprune import CompressionStage, create_compressed_model
from nncf_compactprune.algorithms.overparameterization.config import DistillationConfig
from nncf_compactprune.errors import CompactPruneError, ConfigError, DistillationError, ScopeError, SelfCheckError

INPUT = {"sample_size": [2, 3, 12, 12]}
SIMILARITY = {"similarity_weight": 10.0, "logits_weight": 0.1}


def lop(*, distillation=None, scopes=None, **params):
    """An entry of the form "factors" unless another is named; without a teacher unless one is asked for."""
    distillation = {"similarity_weight": 0.0} if distillation is None else distillation
    return {
        "algorithm": "linear_overparameterization",
        "params": {"form": "factors", **params},
        "distillation": distillation,
        **(scopes or {}),
    }


def pruning(**params):
    return {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"round_to": 1, **params}}


def config(*entries):
    return {"input_info": INPUT, "compression": list(entries)}


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01, "momentum": 0.9, **options})


def train_epoch(model, ctrl, optimizer, *, scheduler=None, ema=None):
    ctrl.scheduler.epoch_step()
    model.train()
    for x, y in labelled_batches():
        ctrl.scheduler.step()
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + ctrl.loss()).backward()
        optimizer.step()
        if ema is not None:
            ema.update_parameters(model)
    if scheduler is not None:
        scheduler.step()


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# -- both ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["factors", "branches"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_starts_and_ends_exactly(name, form):
    model = model32(name)
    reference, x = copy.deepcopy(model), images(torch.float32)
    ctrl, same = create_compressed_model(
        model, config(lop(form=form, skip_last=False, distillation={"similarity_weight": 1.0}))
    )
    assert same is model
    expected = reference(x).detach()
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    optimizer = sgd(model, lr=1e-3)
    model.train()
    (model(x).square().mean() + ctrl.loss()).backward()
    optimizer.step()
    expected = model.eval()(x)
    compact = ctrl.strip()
    torch.testing.assert_close(compact(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    assert list(compact.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in compact.named_modules()] == [n for n, _ in reference.named_modules()]
    assert all(a.requires_grad == b.requires_grad for a, b in zip(
        compact.parameters(), reference.parameters(), strict=True))  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in compact.modules())
    changed = [n for n, value in reference.state_dict().items() if not torch.equal(value, compact.state_dict()[n])]
    assert any(n.endswith("weight") and value.dim() > 1 for n, value in reference.state_dict().items() if n in changed)


@pytest.mark.parametrize("name", ["residual", "transposed", "attention", "depthwise"])
def test_chain_and_merged_train_alike(name):
    courses = []
    for mode in ("merged", "chain"):
        model = trained(name)
        ctrl, _ = create_compressed_model(model, config(lop(mode=mode, expansion=2)), example_inputs=images())
        optimizer = sgd(model)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(images()).square().mean().backward()
            optimizer.step()
        courses.append(ctrl.strip().state_dict())
    for key, value in courses[0].items():
        torch.testing.assert_close(value, courses[1][key], rtol=1e-8, atol=1e-8)


def test_after_pruning_in_one_list():
    dense, pruned, model = model32(), model32(), model32()
    alone, _ = create_compressed_model(pruned, config(pruning(schedule="one_shot")))
    ctrl, _ = create_compressed_model(model, config(pruning(schedule="one_shot"), lop(distillation=SIMILARITY)))
    x = images(torch.float32)
    torch.testing.assert_close(model.eval()(x), pruned.eval()(x), rtol=1e-5, atol=1e-6)
    assert ctrl.compression_rate == alone.compression_rate > 0.4
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    text = ctrl.statistics().to_str()
    assert "6 of 7" in text
    assert sum(p.numel() for p in model.parameters()) > 3 * sum(p.numel() for p in dense.parameters())
    optimizer = sgd(model)
    train_epoch(model, ctrl, optimizer)
    assert float(ctrl.loss().detach()) > 0
    assert "similarity loss" in ctrl.statistics().to_str()
    assert {k: v.shape for k, v in ctrl.strip().state_dict().items()} == {
        k: v.shape for k, v in pruned.state_dict().items()
    }


def test_begins_when_a_schedule_has_cut_and_joins_optimizer_scheduler_and_ema():
    model = model32()
    ctrl, _ = create_compressed_model(
        model, config(pruning(schedule="exponential", pruning_steps=1), lop(distillation=SIMILARITY))
    )
    optimizer = sgd(model)
    ema = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ctrl.attach(optimizer=optimizer, ema=ema)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train_epoch(model, ctrl, optimizer, scheduler=scheduler)
    assert not any(p.dim() == 4 and "core" in n for n, p in model.named_parameters())
    train_epoch(model, ctrl, optimizer, scheduler=scheduler, ema=ema)
    cores = [p for n, p in model.named_parameters() if n.endswith("core")]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(cores) == 6
    assert {id(p) for p in cores} <= held
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    x, shadow = images(torch.float32), ema.module
    outputs = model.eval()(x), shadow.eval()(x)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6
    ctrl.strip()
    for net, expected in zip((model, shadow), outputs, strict=True):
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        assert "__nncf_hooks" not in net._modules
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert not any(id(p) in layers | {id(c) for c in cores} for p in optimizer.state), "momentum starts anew"
    assert optimizer.state[model.head.weight], "but where nothing was expanded it goes on"
    train_epoch(model, ctrl, optimizer, scheduler=scheduler)  # goes on with the compact weights
    assert not torch.equal(model.eval()(x), outputs[0])


@pytest.mark.parametrize("form", ["factors", "branches"])
def test_ema_made_after_creation_is_folded_too(form):
    model = model32()
    ctrl, _ = create_compressed_model(model, config(lop(form=form, distillation=SIMILARITY)))
    optimizer = sgd(model)
    ema = AveragedModel(model)
    ctrl.attach(optimizer=optimizer, ema=ema)
    train_epoch(model, ctrl, optimizer, ema=ema)
    x = images(torch.float32)
    expected = ema.module.eval()(x)
    ctrl.strip()
    torch.testing.assert_close(ema.module(x), expected, rtol=1e-5, atol=1e-5)
    assert list(ema.module.state_dict()) == list(model.state_dict())


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "form"), [([pruning(schedule="one_shot")], "factors"), ([], "factors"), ([], "branches")]
)
def test_killed_and_resumed_run_gives_the_same_weights(first, form):
    entries = config(*first, lop(form=form, distillation={**SIMILARITY, "schedule": "linear", "schedule_epochs": 4}))
    whole = model32()
    ctrl, _ = create_compressed_model(whole, entries)
    optimizer = sgd(whole)
    ctrl.attach(optimizer=optimizer)
    train_epoch(whole, ctrl, optimizer)
    saved = json.dumps(ctrl.get_compression_state())
    weights, momentum = weights_of(whole), copy.deepcopy(optimizer.state_dict())
    train_epoch(whole, ctrl, optimizer)

    resumed = model32()
    again, _ = create_compressed_model(resumed, entries, compression_state=json.loads(saved))
    resumed.load_state_dict(weights)
    optimizer = sgd(resumed)
    optimizer.load_state_dict(momentum)
    again.attach(optimizer=optimizer)
    train_epoch(resumed, again, optimizer)
    assert_same(weights_of(resumed), weights_of(whole))
    assert_same(weights_of(again.strip()), weights_of(ctrl.strip()))
    finished = create_compressed_model(model32(), entries, compression_state=again.get_compression_state())[1]
    finished.load_state_dict(resumed.state_dict())
    assert "__nncf_hooks" not in finished._modules


def test_resume_with_another_teacher_or_configuration_is_refused():
    ctrl, _ = create_compressed_model(model32(), config(lop(distillation=SIMILARITY)))
    state = ctrl.get_compression_state()
    stranger = model32()
    with torch.no_grad():
        stranger.head.weight += 1
    with pytest.raises(DistillationError, match=r"teacher differs from the one in that run\. Load the dense model"):
        create_compressed_model(stranger, config(lop(distillation=SIMILARITY)), compression_state=state)
    with pytest.raises(CompactPruneError, match='had 6 layers of form "factors" with expansion 4'):
        create_compressed_model(model32(), config(lop(expansion=2, distillation=SIMILARITY)), compression_state=state)


# -- loops -----------------------------------------------------------------------------------------------------------


def test_gradients_accumulate_over_micro_batches():
    model = model32("squeeze_excite").eval()  # BatchNorm by its statistics: a batch is the sum of its parts
    model.training = True
    create_compressed_model(model, config(lop()))
    cores = [p for n, p in model.named_parameters() if n.endswith("core")]
    (x, y) = labelled_batches(1)[0]
    whole = torch.autograd.grad(F.cross_entropy(model(x), y), cores)
    for part in (slice(0, 2), slice(2, 4)):
        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
    for core, expected in zip(cores, whole, strict=True):
        torch.testing.assert_close(core.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["factors", "branches"])
def test_autocast_step_is_finite_and_trains_every_factor(form):
    model = model32()
    distillation = {**SIMILARITY, "teacher_precision": "bfloat16"}
    ctrl, _ = create_compressed_model(model, config(lop(form=form, distillation=distillation)))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(labelled_batches(1)[0][0]), labelled_batches(1)[0][1]) + ctrl.loss()
    loss.backward()
    factors = [p for n, p in model.named_parameters() if "__nncf_hooks" in n]
    assert len(factors) >= 18
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() and p.grad.any() for p in factors)


def test_optimizer_built_too_early_gets_the_factors_by_attach():
    model = model32()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.01)
    ctrl, _ = create_compressed_model(model, config(lop()))
    ctrl.attach(optimizer=optimizer)
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("core")}
    train_epoch(model, ctrl, optimizer)
    assert before
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_torch_compile_runs_the_hooks():
    """Dynamo follows NNCF's function mode (with graph breaks around the teacher)."""
    model = model32("squeeze_excite")
    ctrl, _ = create_compressed_model(model, config(lop(distillation=SIMILARITY)))
    twin = copy.deepcopy(model).train()
    compiled = torch.compile(model.train(), backend="eager")
    x = images(torch.float32)
    y = compiled(x)
    torch.testing.assert_close(y, twin(x))
    (y.square().mean() + ctrl.loss()).backward()
    assert float(ctrl.loss().detach()) > 0
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("core"))


def _worker(rank, folder):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = model32()
    ctrl, _ = create_compressed_model(
        model, config(pruning(schedule="one_shot"), lop(distillation=SIMILARITY, weight_decay=0.1))
    )
    optimizer = sgd(model)
    ctrl.attach(optimizer=optimizer)
    parallel = DistributedDataParallel(model)
    ctrl.scheduler.epoch_step()
    parallel.train()
    for x, y in labelled_batches():
        ctrl.scheduler.step()
        optimizer.zero_grad()
        part = slice(2 * rank, 2 * rank + 2)
        (F.cross_entropy(parallel(x[part]), y[part]) + ctrl.loss()).backward()
        optimizer.step()
    torch.save({n: p.detach() for n, p in ctrl.strip().named_parameters()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_weights(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(left, right)
    alone = model32()
    create_compressed_model(alone, config(pruning(schedule="one_shot")))
    assert any(not torch.equal(value, dict(alone.named_parameters())[n]) for n, value in left.items())


# -- decay -----------------------------------------------------------------------------------------------------------


def test_decay_of_the_merged_weight_pulls_as_plain_decay_does():
    model = model32("plain")
    plain = copy.deepcopy(model)
    ctrl, _ = create_compressed_model(model, config(lop(weight_decay=0.3)))
    model.train()(images(torch.float32))
    expected = sum(0.15 * m.weight.square().sum() for m in plain.modules() if isinstance(m, nn.Conv2d))
    assert float(ctrl.loss().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    optimizer = sgd(model, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it allows no new group
    ctrl.attach(optimizer=optimizer)
    train_epoch(model, ctrl, optimizer, scheduler=scheduler)
    assert len(optimizer.param_groups) == 1
    ctrl.strip()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_factors_with_a_decay_of_their_own_do_not_decay_by_the_optimizer(kind):
    model = model32()
    ctrl, _ = create_compressed_model(model, config(lop(weight_decay=0.1)))
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.5)
    ctrl.attach(optimizer=optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    factors = [n for n in before if n.endswith((".first", ".core", ".last"))]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def fails():
        msg = "out of memory"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(fails)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 if name in factors else 0.95)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    assert len(optimizer.param_groups[0]["params"]) == len(before)


def test_decay_of_factors_shrinks_the_product_three_times():
    """What the documentation says of ``weight_decay`` left to the optimizer."""
    model = model32("plain")
    weight = model.features[0][0].weight.detach().clone()
    ctrl, _ = create_compressed_model(model, config(lop()))
    optimizer = sgd(model, lr=0.1, momentum=0.0, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(ctrl.strip().features[0][0].weight, weight * 0.95**3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["factors", "orthogonal"])
def test_several_optimizers_share_the_weights_out(form):
    model = model32()
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    others = [p for p in model.parameters() if all(p is not conv for conv in convs)]
    optimizers = [torch.optim.SGD(convs[:2], lr=0.01), torch.optim.SGD(convs[2:] + others, lr=0.01)]
    ctrl, _ = create_compressed_model(model, config(lop(form=form)))
    ctrl.attach(optimizer=optimizers)
    held = [{id(p) for p in one.param_groups[0]["params"]} for one in optimizers]
    names = {id(p): n for n, p in model.named_parameters()}
    assert not held[0] & held[1]
    assert held[0] | held[1] >= set(names)
    if form == "factors":
        assert len([p for p in held[0] if names.get(p, "").endswith((".first", ".core", ".last"))]) == 6
    ctrl.scheduler.epoch_step()
    model.train()
    (model(images(torch.float32)).square().mean() + ctrl.loss()).backward()
    for one in optimizers:
        one.step()
    assert "orthogonal steps" in ctrl.statistics().to_str() or form == "factors"
    ctrl.strip()
    assert {id(p) for p in optimizers[0].param_groups[0]["params"]} == {id(p) for p in convs[:2]}


# -- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_without_expansion_leaves_parameters_alone():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten())  # no NNCF hooks: allowed
    names = [n for n, _ in model.named_parameters()]
    ctrl, _ = create_compressed_model(model, config(lop(form="none", distillation=SIMILARITY)))
    assert [n for n, _ in model.named_parameters()] == names
    model.train()(images(torch.float32))
    assert float(ctrl.loss().detach()) == pytest.approx(0, abs=1e-6), "the teacher is the model itself"
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(16, 1, 1, 1))
    model(images(torch.float32))
    assert float(ctrl.loss().detach()) > 1e-4
    ctrl.strip()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_teacher_is_the_dense_model_as_it_came():
    dense = model32()
    seen = []
    for teacher in (None, copy.deepcopy(dense)):
        model = model32()
        ctrl, _ = create_compressed_model(
            model, config(pruning(schedule="one_shot"), lop(distillation=SIMILARITY)), teacher=teacher
        )
        model.train()(images(torch.float32))
        seen.append(float(ctrl.loss().detach()))
    assert seen[0] == seen[1] > 0


def test_a_teacher_without_the_layers_is_refused_and_the_model_stays_as_it_is():
    model = model32()
    before = weights_of(model)
    with pytest.raises(DistillationError, match="5 of 6 layers have no partner of the same name in Classifier"):
        create_compressed_model(model, config(lop(distillation=SIMILARITY)), teacher=model32("plain"))
    assert_same(weights_of(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_weights_of_distillation_fall_on_schedule_and_the_teacher_leaves():
    model = model32()
    ctrl, _ = create_compressed_model(
        model, config(lop(form="none", distillation={**SIMILARITY, "schedule": "linear", "schedule_epochs": 2}))
    )
    with torch.no_grad():
        model.features[0][0].weight[0] += 1
    losses = []
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        model.train()(images(torch.float32))
        losses.append(float(torch.as_tensor(ctrl.loss()).detach()))
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-4)
    assert losses[2] == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    cosine = DistillationConfig(schedule="cosine", schedule_epochs=4)
    assert [cosine.factor(e) for e in (0, 1, 2, 4, 9)] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0])
    assert DistillationConfig().factor(1000) == 1


# -- which layers ----------------------------------------------------------------------------------------------------

LAYERS = ["features.0.0", "features.1.conv1", "features.1.conv2", "features.2.conv1", "features.2.conv2",
          "features.2.shortcut", "head"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expanded"),
    [
        ({"skip_last": False}, LAYERS),
        ({}, LAYERS[:-1]),
        ({"skip_first": True}, LAYERS[1:-1]),
        ({"scopes": {"ignored_scopes": ["features.1"]}}, [LAYERS[0], *LAYERS[3:6]]),
        ({"scopes": {"target_scopes": ["features/1/conv1/conv2d/0", "{re}features.2.c"]}}, [LAYERS[1], *LAYERS[3:5]]),
    ],
)  # fmt: skip
def test_which_layers_are_expanded(options, expanded):
    model = model32()
    create_compressed_model(model, config(lop(**options)))
    frozen = {n.removesuffix(".weight") for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(expanded)


def test_frozen_and_unused_layers_stay():
    model = model32()
    model.features[1].conv1.weight.requires_grad_(False)
    model.spare = nn.Linear(3, 3)
    ctrl, _ = create_compressed_model(model, config(lop()))
    assert {n for n, p in model.named_parameters() if n.endswith("core")} == {
        f"__nncf_hooks.post_hooks.{name.replace('.', ':')}:weight__0.0.core" for name in LAYERS[:-1]
    } - {"__nncf_hooks.post_hooks.features:1:conv1:weight__0.0.core"}
    assert not ctrl.strip().features[1].conv1.weight.requires_grad


def test_a_shared_weight_runs_merged_but_not_as_a_chain():
    with pytest.raises(
        CompactPruneError, match=r"'features\.a\.weight' goes into features/a/conv2d/0, features/b/conv2d/0"
    ):
        create_compressed_model(model32("tied"), config(lop(mode="chain")))
    model = model32("tied")
    create_compressed_model(model, config(lop(skip_last=False)))
    assert sum(n.endswith("core") for n, _ in model.named_parameters()) == 4  # a and b are one


# -- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (lop(expansion=0), ConfigError, r"params\.expansion: .*at least 1.*got 0"),
        (lop(expansion=1.5), ConfigError, r"params\.expansion"),
        (lop(expandsion=4), ConfigError, r"params\.expandsion: unknown key\. Did you mean 'expansion'"),
        (lop(expansion=None), ConfigError, r"params\.expansion"),
        (lop(form="none"), ConfigError, "nothing to do"),
        (
            lop(form="none", weight_decay=0.1, distillation=SIMILARITY),
            ConfigError,
            'params.weight_decay belongs to "form": "factors" or "branches", but the form is "none". Remove',
        ),
        (
            lop(step_size=0.1),
            ConfigError,
            'params.step_size belongs to "form": "orthogonal", but the form is "factors"',
        ),
        ({**lop(), "initializer": {}}, ConfigError, "nothing to initialize here"),
        (lop(distillation={"similarity_weight": -1}), ConfigError, r"distillation\.similarity_weight"),
        (lop(scopes={"ignored_scopes": ["features.9"]}), ScopeError, "'features.9' matches no operation and no module"),
        (lop(scopes={"target_scopes": ["features.0.1"]}), ScopeError, r"no layer to expand in Classifier: 7 trainable"),
    ],
)
def test_mistakes_are_told_and_the_model_stays_as_it_is(entry, error, message):
    model = model32()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        create_compressed_model(model, config(entry))
    assert_same(weights_of(model), before)
    assert "__nncf_hooks" not in model._modules


def test_failed_self_check_restores_the_model_bit_for_bit(monkeypatch):
    model = model32()
    before = weights_of(model)
    monkeypatch.setattr("nncf_compactprune.algorithms.overparameterization.expandable.START_TOLERANCE", -1.0)
    with pytest.raises(SelfCheckError, match=r"expanding the layers changed the output.*The model was restored"):
        create_compressed_model(model, config(lop()))
    assert_same(weights_of(model), before)
    assert all(p.requires_grad for p in model.parameters())
