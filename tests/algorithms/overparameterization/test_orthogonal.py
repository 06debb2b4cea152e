"""``"form": "orthogonal"``: every direction of a step has the same size, in the user's own SGD."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nncf.common.logging import nncf_logger
from support.networks import images, labelled_batches, model32
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.overparameterization.factors import Geometry
from nncf_compactprune.algorithms.overparameterization.orthogonal import OrthogonalSteps, orthogonalised

INPUT = {"sample_size": [2, 3, 12, 12]}
ENTRY = {
    "algorithm": "linear_overparameterization",
    "params": {"form": "orthogonal"},
    "distillation": {"similarity_weight": 0.0},
}
STEP_SIZE = 0.08  # the default
KINDS = {
    "conv": lambda: nn.Conv2d(6, 10, 3),
    "grouped": lambda: nn.Conv2d(6, 12, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 9, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 9, 2, groups=3),
    "linear": lambda: nn.Linear(6, 4),
}


def config(*entries):
    return {"input_info": INPUT, "compression": list(entries)}


def trained_by(ctrl, model, optimizer, *, scale=1.0, steps=2, resumed=0):
    model.train()
    for x, y in (labelled_batches() * 3)[resumed : resumed + steps]:
        optimizer.zero_grad()
        ((F.cross_entropy(model(x), y) + ctrl.loss()) * scale).backward()
        optimizer.step()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


@pytest.mark.parametrize("shape", [(1, 8, 72), (2, 72, 8), (3, 16, 16), (5, 1, 9)])
def test_directions_stay_and_their_sizes_become_one(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, rows, columns = shape
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(batch, rows, rank, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(batch, columns, rank, generator=generator))[0]
    uneven = torch.logspace(0, -1.3, rank)  # twenty times the smallest
    found = orthogonalised(1e-6 * u @ torch.diag(uneven) @ v.mT)
    sizes = torch.linalg.svdvals(found)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    assert (torch.linalg.matrix_norm(found - u @ v.mT) / rank**0.5).max() < 0.35
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_every_kind_of_weight_by_the_same_share(kind) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind]()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    steps = OrthogonalSteps(optimizer, {layer.weight: Geometry.of(layer)}, STEP_SIZE)
    before, geometry = layer.weight.detach().clone(), Geometry.of(layer)
    x = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 6, 5, 5)
    layer(x).square().sum().backward()
    gradient, bias = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    moved = before - layer.weight.detach()
    assert moved.norm() / before.norm() == pytest.approx(0.1 * STEP_SIZE, rel=1e-4)
    assert (moved * gradient).sum() > 0, "downhill"
    assert torch.equal(layer.bias.grad, bias), "vectors keep their gradients"
    matrices = geometry.matrices(moved).flatten(2)
    if min(matrices.shape[1:]) > 1:
        sizes = torch.linalg.svdvals(matrices)
        assert sizes.max() / sizes.min() < 2.5
        assert torch.linalg.svdvals(geometry.matrices(gradient).flatten(2)).aminmax().max / sizes.max() > 1
    steps.remove()
    layer.weight.grad.copy_(gradient)
    optimizer.step()
    assert torch.equal(layer.weight.grad, gradient), "a plain optimizer again"


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_step_with_a_closure_turns_the_gradients_that_it_makes(by_keyword) -> None:
    stepped = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        layer = nn.Conv2d(6, 10, 3, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        OrthogonalSteps(optimizer, {layer.weight: Geometry.of(layer)}, STEP_SIZE)

        def closure(layer=layer, optimizer=optimizer):
            optimizer.zero_grad()
            loss = layer(torch.ones(1, 6, 5, 5)).square().sum()
            loss.backward()
            return loss

        if with_closure:
            loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
            assert float(loss.detach()) > 0
        else:
            closure()
            optimizer.step()
        stepped.append(layer.weight.detach())
    assert torch.equal(*stepped)


def test_the_loss_may_be_scaled_and_a_fused_optimizer_unscales() -> None:
    layers = []
    for loss_scale, fused_scale in ((1.0, None), (4096.0, None), (1.0, torch.tensor(256.0))):
        torch.manual_seed(0)
        layer = nn.Conv2d(6, 10, 3, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused_scale is not None)
        OrthogonalSteps(optimizer, {layer.weight: Geometry.of(layer)}, STEP_SIZE)
        (layer(torch.ones(1, 6, 5, 5)).square().sum() * loss_scale).backward()
        if fused_scale is not None:
            optimizer.grad_scale, optimizer.found_inf = fused_scale, torch.tensor(0.0)  # as GradScaler does
        optimizer.step()
        layers.append(layer.weight.detach())
    torch.testing.assert_close(layers[1], layers[0])
    torch.testing.assert_close(layers[2], layers[0])


def test_in_the_loop_layers_step_alike_and_the_classifier_as_ever() -> None:
    model = model32()
    ctrl, _ = create_compressed_model(model, config(ENTRY))
    names = [name for name, _ in model.named_parameters()]
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = sgd(model, momentum=0.0)
    ctrl.attach(optimizer=optimizer)
    trained_by(ctrl, model, optimizer, steps=1)
    shares = {
        name: float((value.detach() - plain[name]).norm() / plain[name].norm())
        for name, value in model.named_parameters()
        if value.dim() > 1
    }
    *layers, classifier = shares.values()
    assert layers == pytest.approx([0.1 * STEP_SIZE] * 6, rel=1e-3)
    assert classifier != pytest.approx(0.1 * STEP_SIZE, rel=0.05)
    assert ctrl.statistics().algorithms["linear_overparameterization"]["orthogonal steps"] == "6 of 7 layers"
    compact = ctrl.strip()
    assert [name for name, _ in compact.named_parameters()] == names
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("make", [None, lambda model: torch.optim.AdamW(model.parameters(), 1e-3)])
def test_without_an_sgd_weights_train_as_ever_and_a_warning_says_so_once(make, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(nncf_logger, "warning", said.append)
    courses = []
    for entry in (ENTRY, {**ENTRY, "params": {"form": "none"}, "distillation": {"similarity_weight": 1e-9}}):
        model = model32()
        ctrl, _ = create_compressed_model(model, config(entry))
        optimizer = sgd(model) if make is None else make(model)
        if make is not None:
            ctrl.attach(optimizer=optimizer)
        trained_by(ctrl, model, optimizer)
        courses.append(model.state_dict())
    assert len(said) == 1
    assert ("no optimizer was attached" if make is None else "AdamW is no SGD") in said[0]
    assert all(torch.allclose(value, courses[1][name], atol=1e-6) for name, value in courses[0].items())


def test_begins_when_a_schedule_has_cut() -> None:
    pruning = {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"round_to": 1, "schedule": "exponential", "pruning_steps": 1},
    }
    model = model32()
    ctrl, _ = create_compressed_model(model, config(pruning, ENTRY))
    optimizer = sgd(model)
    ctrl.attach(optimizer=optimizer)
    sizes = []
    for _ in range(3):
        ctrl.scheduler.epoch_step()
        trained_by(ctrl, model, optimizer, steps=1)
        sizes.append("linear_overparameterization" in ctrl.statistics().algorithms)
    assert sizes[-1]
    assert "orthogonal steps" in ctrl.statistics().algorithms["linear_overparameterization"]
    ctrl.strip()


def test_a_resumed_run_gives_the_same_weights_and_another_optimizer_takes_over() -> None:
    whole = model32()
    ctrl, _ = create_compressed_model(whole, config(ENTRY))
    optimizer = sgd(whole)
    ctrl.attach(optimizer=optimizer)
    trained_by(ctrl, whole, optimizer, steps=1)
    kept = copy.deepcopy((ctrl.get_compression_state(), whole.state_dict(), optimizer.state_dict()))
    trained_by(ctrl, whole, optimizer, steps=1, resumed=1)

    again = model32()
    ctrl, _ = create_compressed_model(again, config(ENTRY), compression_state=kept[0])
    ctrl.attach(optimizer=sgd(again))
    optimizer = sgd(again)
    ctrl.attach(optimizer=optimizer)
    again.load_state_dict(kept[1])
    optimizer.load_state_dict(kept[2])
    trained_by(ctrl, again, optimizer, steps=1, resumed=1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_whom_nothing_calls_is_told(whole, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(nncf_logger, "warning", said.append)
    model = model32()
    ctrl, _ = create_compressed_model(model, config({"algorithm": "recovery"}))
    run = model.train() if whole else model.train().forward
    for _ in range(2):
        ctrl.scheduler.epoch_step()
        ctrl.scheduler.step()
        (run(images(torch.float32)).square().mean() + ctrl.loss()).backward()
    assert any("taught nothing" in words for words in said) != whole
