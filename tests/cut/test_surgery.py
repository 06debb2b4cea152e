"""Masked = compact for every structure, and nothing is lost when a cut fails."""

from __future__ import annotations

import copy
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from support.cuts import HardCoded, assert_facts_are_true, random_plan, same, snapshot
from support.networks import STRUCTURES, images, model32, trained
from torch import nn

from nncf_compactprune import PruningPlan, apply_plan, create_compressed_model, prune
from nncf_compactprune.channels import trace
from nncf_compactprune.cut.masks import Masks
from nncf_compactprune.cut.self_check import in_double, prune_in_place
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import PlanError, SelfCheckError
from nncf_compactprune.host.tensors import model_tensors


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STRUCTURES)
def test_masked_equals_compact_in_float64(name, seed):
    model, x = trained(name), images()
    plan = random_plan(model, x, seed=seed)
    check = prune_in_place(model, plan, x)
    assert check.error <= 1e-13
    graph = trace(model, x)
    assert (graph.macs, graph.params) == (plan.after.macs, plan.after.params)
    assert model_tensors(model).shapes() == plan.shapes(model_tensors(trained(name)).shapes())
    assert_facts_are_true(model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_nncf_masks_equal_compact(name):
    """The masks that train are the function that is cut, through NNCF's hooks and not the self-check's own zeroing."""
    model, x = trained(name), images()
    plan = random_plan(model, x)
    masks = Masks(model, trace(copy.deepcopy(model), x))
    masks.update(plan)
    with torch.no_grad():
        masked = model(x)
        masks.remove()
        dense = model(x)
        apply_plan(model, plan)
        compact = model(x)
    assert not torch.allclose(dense, masked), "the plan removes nothing that matters"
    torch.testing.assert_close(compact, masked, rtol=1e-12, atol=1e-12)
    assert "__nncf_hooks" not in dict(model.named_children())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruned_models_train(name):
    model, x = trained(name), images()
    prune_in_place(model, random_plan(model, x), x)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_pruning_twice_composes(name):
    model, x = trained(name), images()
    prune_in_place(model, random_plan(model, x, ratio=0.3), x)
    assert prune_in_place(model, random_plan(model, x, seed=5, ratio=0.3), x).error <= 1e-13
    at_once = trained(name)
    apply_plan(at_once, plan_of(model))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in at_once.state_dict().items())


def test_approximate_channels_are_cut_by_consent_and_checked():
    model, x = trained("layer_norm"), images()
    plan = random_plan(model, x, allow_approximate=True)
    assert plan.approximate
    assert prune_in_place(model, plan, x).error <= 1e-13
    assert model.features[1].norm.normalized_shape == (model.features[1].norm.weight.shape[0],)
    assert model.features[2].num_channels < 16


def _step(model, *optimizers):
    for one in optimizers:
        one.zero_grad()
    model(images(torch.float32)).square().mean().backward()
    for one in optimizers:
        one.step()


def test_several_optimizers_follow():
    model, x = model32(), images(torch.float32)
    convs = [p for p in model.parameters() if p.dim() == 4]
    others = [p for p in model.parameters() if p.dim() != 4]
    optimizers = [torch.optim.SGD(convs, lr=0.01, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]
    _step(model, *optimizers)
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizers)
    assert all(optimizers[0].state[p]["momentum_buffer"].shape == p.shape for p in convs)
    assert all(optimizers[1].state[p]["exp_avg"].shape == p.shape for p in others)
    _step(model, *optimizers)


class _Lookahead(torch.optim.Optimizer):
    """As timm's: slow weights in the state of the optimizer that it steps."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self._base_optimizer, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self._base_optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self._base_optimizer.state[p]
                slow = state.setdefault("slow", p.clone())
                p.copy_(slow.lerp_(p, 0.5))


class _Factored(torch.optim.SGD):
    """With lists of matrices in its state, as preconditioners have."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            factors = self.state[p].setdefault("factors", [torch.eye(n) for n in p.shape])
            assert [len(f) for f in factors] == list(p.shape)
        return super().step(closure)


class _Preconditioned(torch.optim.SGD):
    """With a matrix for each dimension in its state, as Shampoo has."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            for dim, n in enumerate(p.shape):
                assert len(self.state[p].setdefault(f"of_{dim}", torch.eye(n))) == n
        return super().step(closure)


def test_preconditioners_of_a_square_weight_are_no_state_of_its_elements():
    layers = [nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)]
    model, x = nn.Sequential(*layers), torch.randn(4, 12)
    optimizer = _Preconditioned([layer.weight for layer in layers[::2]], lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    assert layers[2].weight.shape != (16, 16)
    model(x).square().mean().backward()
    optimizer.step()


def test_optimizers_that_step_another_one_follow():
    model, x = model32(), images(torch.float32)
    optimizer = _Lookahead(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    _step(model, optimizer)
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    _step(model, optimizer)


def test_state_of_other_shapes_in_lists_starts_anew_told_once(caplog):
    model, x = model32(), images(torch.float32)
    optimizer = _Factored(model.parameters(), lr=0.01)
    _step(model, optimizer)
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    assert len([r for r in caplog.records if "starts anew" in r.message]) == 1
    _step(model, optimizer)


def test_the_history_of_lbfgs_starts_anew():
    model, x = model32(), images(torch.float32)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    before = float(closure().detach())
    optimizer.step(closure)
    assert float(closure().detach()) < before


def test_identity_is_kept_and_optimizer_and_ema_follow():
    model, x = trained("residual", dtype=torch.float32), images(torch.float32)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    identity = {n: id(p) for n, p in model.named_parameters()}
    model.eval()
    plan = random_plan(model, x)
    prune_in_place(model, plan, x, optimizer=optimizer, ema=ema)
    assert identity == {n: id(p) for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = moments[name]
        for dim, positions in plan.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(positions))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected)
    assert {n: p.shape for n, p in ema.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    model.train()
    model(x).square().sum().backward()
    optimizer.step()  # the references hold


def test_an_old_graph_that_is_alive_does_not_hold_the_old_shape():
    """A loss still in scope keeps autograd's accumulators of the parameters alive."""
    model, x = trained("residual", dtype=torch.float32), images(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(x).square().sum()
    loss.backward()
    prune_in_place(model, random_plan(model, x), x, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    del loss


def test_state_of_another_shape_starts_anew():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    model(x).sum().backward()
    optimizer.step()
    plan = random_plan(model, x)
    prune_in_place(model, plan, x, optimizer=optimizer)
    factored = [p for n, p in model.named_parameters() if n in plan.kept and p.shape[2:] == (3, 3)]
    assert factored
    assert not any(p in optimizer.state for p in factored)
    model(x).sum().backward()
    optimizer.step()
    assert all(optimizer.state[p]["row_var"].shape[:-1] == p.shape[:-1] for p in factored)


def test_channels_last_stays_channels_last():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    model.to(memory_format=torch.channels_last)
    prune_in_place(model, random_plan(model, x), x)
    weight = model.features[2][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


class Positions(nn.Module):
    """Its code makes single precision: a grid, a constant, and a conversion."""

    scale = torch.full((3, 8), 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        grid = torch.arange(x.shape[-1], dtype=torch.float32).expand(x.shape[0], 1, 1, -1)
        seen = self.conv(x.float() + grid).float().mean((2, 3))
        return seen @ self.scale.T


def test_code_that_makes_single_precision_runs_in_double():
    model, x = Positions().eval(), torch.randn(2, 3, 6, 6)
    expected, weight = model(x), model.conv.weight.detach().clone()
    with in_double(model):
        found = model(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected)
    assert not torch.equal(found, expected.double())
    assert torch.equal(model.conv.weight, weight)
    assert model.scale.dtype == torch.float32


def test_half_precision_models_are_checked_in_double():
    model, x = trained("plain", dtype=torch.float32).bfloat16(), images(torch.float32).bfloat16()
    check = prune_in_place(model, random_plan(model, x), x)
    assert check.error <= 1e-5
    assert model.head.weight.dtype == torch.bfloat16


def test_failed_cut_leaves_everything_bit_for_bit():
    model, x = HardCoded(), torch.randn(1, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = copy.deepcopy(model)
    model(x).sum().backward()
    optimizer.step()
    before, shadow = snapshot(model), snapshot(ema)
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.train()
    with pytest.raises(SelfCheckError, match=r"HardCoded does not run after the cut.*restored"):
        prune_in_place(model, random_plan(model, x), x, optimizer=optimizer, ema=ema)
    assert same(before, snapshot(model))
    assert same(shadow, snapshot(ema))
    assert all(torch.equal(momentum[n], optimizer.state[p]["momentum_buffer"]) for n, p in model.named_parameters())
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters())
    assert model.training


def test_wrong_cut_is_noticed(monkeypatch):
    """The check can fail: cut the wrong half of one consumer, and it says so."""
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    plan = random_plan(model, x)
    kept = {name: dict(dims) for name, dims in plan.kept.items()}
    positions = kept["features.2.0.weight"][1]
    others = [p for p in range(16) if p not in positions]
    kept["features.2.0.weight"][1] = tuple(sorted((*positions[1:], others[0])))
    wrong = PruningPlan(kept, plan.fingerprint, plan.before, plan.after)
    before = snapshot(model)
    with pytest.raises(SelfCheckError, match="differs from the masked one"):
        prune_in_place(model, wrong, x)
    assert same(before, snapshot(model))


def test_outputs_that_are_not_finite_are_refused():
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    plan = random_plan(model, x)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(SelfCheckError, match="not finite"):
        prune_in_place(model, plan, x)


def test_plan_of_another_model_changes_nothing():
    plan = random_plan(trained("plain"), images())
    model = trained("residual")
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"does not exist|another model"):
        apply_plan(model, plan)
    assert same(before, snapshot(model))


class Holder(nn.Module):
    """A network whose only child is called ``module``, beside a parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module, self.shift = inner, nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return self.module(x) + self.shift


def averaged_by_torch(model):
    return torch.optim.swa_utils.AveragedModel(model)


def held_by_a_plain_object(model):
    return SimpleNamespace(module=copy.deepcopy(model))


def held_by_another_name(model):
    """As timm's first ``ModelEma`` holds it, and libraries that hold the model itself, too."""
    return SimpleNamespace(online=model, ema=copy.deepcopy(model))


def held_in_a_wrapper(model):
    """``AveragedModel`` of a network that DistributedDataParallel wraps."""
    return SimpleNamespace(module=nn.DataParallel(copy.deepcopy(model)))


@pytest.mark.parametrize("build", [lambda: model32("plain"), lambda: Holder(model32("plain"))], ids=["plain", "module"])
@pytest.mark.parametrize(
    ("average", "path"),
    [
        (copy.deepcopy, None),
        (averaged_by_torch, "module"),
        (held_by_a_plain_object, "module"),
        (held_by_another_name, "ema"),
        (held_in_a_wrapper, "module.module"),
    ],
)
def test_an_ema_of_any_make_follows(build, average, path):
    """Also where the network itself has a child called ``module``."""
    model, x = build(), images(torch.float32)
    ema = average(model)
    shadow = ema if path is None else attrgetter(path)(ema)
    prune_in_place(model, random_plan(model, x), x, ema=ema)
    assert [p.shape for p in shadow.parameters()] == [p.shape for p in model.parameters()]
    assert plan_of(shadow) == plan_of(model)


@pytest.mark.parametrize("average", [copy.deepcopy, averaged_by_torch])
def test_masks_and_cut_of_a_schedule_reach_the_ema_of_a_network_with_a_child_called_module(average):
    model = Holder(model32("plain"))
    ema = average(model)
    config = {
        "input_info": {"sample_size": [1, 3, 12, 12]},
        "compression": {
            "algorithm": "fbnet_pruning",
            "budget": {"macs": 0.6},
            "params": {"round_to": 1, "pruning_init": 0.3, "pruning_steps": 2},
        },
    }
    ctrl, _ = create_compressed_model(model, config)
    ctrl.attach(ema=ema)
    ctrl.scheduler.epoch_step()
    shadow = ema if average is copy.deepcopy else ema.module
    torch.testing.assert_close(shadow(images(torch.float32)), model(images(torch.float32)))
    ctrl.strip()
    assert [p.shape for p in shadow.parameters()] == [p.shape for p in model.parameters()]


class Encoder(nn.Module):
    """As segmentation libraries make it of a timm classifier: its head is deleted, what asks for it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(3, 8, 3), 8

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(self.num_features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_an_encoder_without_its_head_is_cut():
    model = nn.Sequential(Encoder(), nn.Conv2d(8, 4, 1))
    prune(model, torch.randn(2, 3, 8, 8), budget={"macs": 0.5}, round_to=1)
    assert model[1].in_channels == model[0].conv.out_channels < 8
