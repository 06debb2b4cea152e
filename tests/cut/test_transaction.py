"""Whole or not at all: whatever fails, and wherever, everything is as before, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cuts import marks, random_plan
from support.networks import Attention, Classifier, images, model32
from torch import nn

from nncf_compactprune import analyse, apply_plan, prune
from nncf_compactprune.cut import transaction as transactions
from nncf_compactprune.cut.self_check import prune_in_place
from nncf_compactprune.cut.transaction import Transaction, transaction
from nncf_compactprune.errors import FixedAttributeError, RestoreError

TINY = images(torch.float32)[:1]


class Injected(RuntimeError):
    """A failure that a test causes."""


class FailsAt:
    """Every change and undo passes here; one of them fails, before or after it did its work."""

    def __init__(self, at: int | None, error: BaseException | None = None, *, late: bool = False) -> None:
        self.at, self.error, self.late, self.count = at, error, late, 0

    def __call__(self, step) -> None:
        now, self.count = self.count == self.at, self.count + 1
        if now and not self.late:
            raise self.error
        step()
        if now:
            raise self.error


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),  # entries are deleted
}


def training(name: str, optimizer_name: str):
    """A network in the midst of training: gradients, optimizer state, an EMA copy."""
    model = model32(name).train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    model(images(torch.float32)).square().sum().backward()
    optimizer.step()
    return model, optimizer, copy.deepcopy(model)


@pytest.mark.parametrize(
    ("name", "optimizer_name", "late"),
    [
        ("residual", "sgd", False),
        ("attention", "adamw", True),
        ("weight_norm", "sgd", False),
        ("weight_norm", "sgd", True),
        ("plain", "adafactor", False),
        ("plain", "adafactor", True),
        ("layer_norm", "sgd", False),
    ],
)
def test_every_change_may_fail(name, optimizer_name, late, monkeypatch):
    """Also those of the self-check: back to the dense model, masks on, masks off, cut again."""
    model, optimizer, ema = training(name, optimizer_name)
    plan = random_plan(model, TINY, allow_approximate=name == "layer_norm")
    before = marks(model, ema, optimizer)

    def cut(at: int | None, error: BaseException | None = None) -> int:
        hook = FailsAt(at, error, late=late)
        with monkeypatch.context() as patch:
            patch.setattr(transactions, "run_step", hook)
            prune_in_place(model, plan, TINY, optimizer=optimizer, ema=ema, dry_run=True)
        return hook.count

    steps = cut(None)
    assert marks(model, ema, optimizer) == before
    raised = 0
    for at in range(steps):
        error = Injected() if at % 2 else KeyboardInterrupt()
        try:
            cut(at, error)
        except (Injected, FixedAttributeError, KeyboardInterrupt):
            raised += 1
        assert marks(model, ema, optimizer) == before, at
    assert raised > steps / 3  # an undo that fails once and then works is no failure


def test_marks_notice_what_they_must():
    """The sweep's own ruler."""
    model, optimizer, ema = training("residual", "sgd")
    before = marks(model, ema, optimizer)
    block = model.features[1]
    changes = [
        lambda: block.conv1.weight.data.view(-1)[0].add_(1e-7),
        lambda: block.bn1.running_mean.view(-1)[0].add_(1e-7),
        lambda: setattr(block.conv1, "in_channels", 17),
        lambda: setattr(block, "new", None),
        lambda: block.conv1.weight.grad.view(-1)[0].add_(1e-7),
        lambda: setattr(block.conv1, "weight", nn.Parameter(block.conv1.weight.data.clone())),
        lambda: optimizer.state[block.conv2.weight]["momentum_buffer"].view(-1)[0].add_(1e-7),
        lambda: optimizer.state.update({block.conv2.weight: optimizer.state.pop(block.conv2.weight)}),
        lambda: ema.head.bias.data[0].add_(1e-7),
    ]
    for change in changes:
        change()
        after = marks(model, ema, optimizer)
        assert after != before
        before = after


def test_a_failing_undo_does_not_stop_the_others():
    class Stubborn:
        value = property(lambda self: self.number)

        @value.setter
        def value(self, number):
            if number == 1:
                raise Injected
            self.number = number

    def change_three_and_fail():
        with transaction() as log:
            log.set_attribute(plain, "a", 2)
            log.set_attribute(stubborn, "value", 2)
            log.set_attribute(plain, "b", 2)
            raise ValueError

    stubborn, plain = Stubborn(), nn.Identity()
    stubborn.number, plain.a = 1, 1
    with pytest.raises(RestoreError, match=r"(?s)1 changes could not be undone.*Stubborn.value: Injected") as caught:
        change_three_and_fail()
    assert (plain.a, hasattr(plain, "b"), stubborn.value) == (1, False, 2)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_class_attribute_is_not_left_on_the_instance():
    class Counted(nn.Module):
        num_heads = 4

    log, module = Transaction(), Counted()
    log.set_attribute(module, "num_heads", 2)
    assert module.num_heads == 2
    log.rollback()
    assert module.num_heads == 4
    assert "num_heads" not in vars(module)


class Derived(Attention):
    """Counts its heads by a property that has no setter."""

    num_heads = property(lambda self: self.attn_dim // self.head_dim)

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.attn_dim, self.fused = 4, 16, True
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList([Derived(), Derived()])
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.embed(x)
        y = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = y + block(y)
        y = y + self.outer(self.inner(y).relu())
        return y.transpose(1, 2).reshape(x.shape)


def test_heads_that_cannot_be_set_are_pinned_by_name_and_the_rest_goes():
    torch.manual_seed(0)
    model = Classifier(Tokens(), 16)
    before = marks(model)
    graph = analyse(model, TINY)
    assert marks(model) == before
    reasons = {p.reason for p in graph.pinned if "num_heads" in p.reason}
    assert len(reasons) == 1
    assert "'num_heads' of Derived 'features.blocks.0' cannot be set" in reasons.pop()
    assert "features.inner" in {g.name for g in graph.groups}
    result = prune(model, TINY, budget={"macs": 0.8}, round_to=1)
    assert result.self_check.error <= 1e-5
    assert model.features.inner.out_features < 32


def test_a_plan_for_heads_that_cannot_be_set_is_refused_and_leaves_no_mark():
    torch.manual_seed(0)
    model = Classifier(Tokens(), 16)
    plan = random_plan(model, TINY)
    assert plan.attributes
    before = marks(model)
    with pytest.raises(FixedAttributeError, match=r"'num_heads' of Derived 'features.blocks.0' cannot be set to"):
        apply_plan(model, plan)
    assert marks(model) == before


def test_an_attribute_that_a_property_sets_goes_back_through_it():
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._heads = 4

        @property
        def num_heads(self):
            return self._heads

        @num_heads.setter
        def num_heads(self, value):
            self._heads = value

    log, module = Transaction(), Stored()
    log.set_attribute(module, "num_heads", 2)
    assert module._heads == 2
    log.rollback()
    assert vars(module)["_heads"] == 4
