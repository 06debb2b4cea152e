"""What the package relies on in NNCF's hooks; a new NNCF that breaks one of these is told here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.networks import images, trained
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nncf_compactprune.host.nncf_hooks import (
    HookModule,
    hook_input,
    hook_output,
    hook_parameter,
    hooks,
    nncf_graph,
    operations,
    remove_hooks,
    unseen_by_nncf,
    unwrap_if_empty,
    without_function_mode,
)
from nncf_compactprune.host.tensors import NNCF_HOOKS, carries_hooks


class Scale(HookModule):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor, self.seen = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.factor

    def get_config(self) -> dict[str, Any]:
        return {"factor": self.factor}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> Scale:
        return cls(**state)


class Twice(nn.Module):
    """Uses one weight two times."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


def test_a_parameter_hook_sees_each_use() -> None:
    model, x, hook = Twice(), torch.randn(2, 3), Scale()
    expected = model(x)
    hook_parameter(model, "linear.weight", hook)
    assert torch.allclose(model(x), 4 * expected)
    assert hook.seen == 2
    assert [(h.operation, h.before, h.port) for h in hooks(model)] == [("linear.weight", False, 0)]
    assert hooks(model)[0].module is hook


class Joined(nn.Module):
    """Concatenates a parameter and a buffer, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.token = nn.Linear(3, 3), nn.Parameter(torch.ones(1, 3))
        self.register_buffer("other", torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.linear(x), self.token, self.other), 0)


def test_parameters_in_a_tuple_are_hooked_and_in_the_graph() -> None:
    model, x = Joined(), torch.randn(2, 3)
    assert {"token", "other"} < set().union(*(one.parameters for one in operations(model, x)))
    hook_parameter(model, "token", Scale())
    torch.testing.assert_close(model(x)[2:], torch.tensor([[2.0] * 3, [1.0] * 3]))


def test_operations_are_hooked_at_input_and_output() -> None:
    model, x = Twice(), torch.randn(2, 3)
    expected = model(x)
    names = [found.name for found in operations(model, x) if "linear.weight" in found.parameters]
    assert names == ["linear/linear/0", "linear/linear/1"]
    hook_input(model, names[0], 0, Scale())
    hook_output(model, names[1], 0, Scale(3.0))
    assert torch.allclose(model(x), 6 * expected)
    assert [(h.operation, h.before) for h in hooks(model)] == [(names[0], True), (names[1], False)]


@pytest.mark.parametrize("own_forward", [False, True])
def test_nothing_is_left_when_the_last_hook_goes(own_forward: bool) -> None:
    model = trained("plain", dtype=torch.float32)
    if own_forward:
        inner = model.forward
        model.forward = lambda x: inner(x) + 1
    before, x = dict(vars(model)), images(torch.float32)
    expected = model(x)
    hook_parameter(model, "features.0.0.weight", Scale())
    assert carries_hooks(model)
    assert not torch.equal(model(x), expected)
    remove_hooks(model, lambda hook: not isinstance(hook, Scale))
    assert carries_hooks(model), "another kind of hook was asked for"
    remove_hooks(model)
    assert vars(model).keys() == before.keys()
    assert NNCF_HOOKS not in model._modules
    assert torch.equal(model(x), expected)


def test_a_handle_takes_its_hook_off_and_the_wrapper_goes_when_asked() -> None:
    model = trained("plain")
    handle = hook_parameter(model, "features.0.0.weight", Scale())
    unwrap_if_empty(model)
    assert carries_hooks(model)
    handle.remove()
    assert not carries_hooks(model)
    unwrap_if_empty(model)
    assert "forward" not in vars(model)


def test_a_copy_carries_hooks_of_its_own() -> None:
    model = trained("plain")
    hook_parameter(model, "features.0.0.weight", Scale())
    other = copy.deepcopy(model)
    remove_hooks(other)
    assert carries_hooks(model)
    assert not carries_hooks(other)


def test_the_graph_leaves_no_wrapper() -> None:
    model, x = trained("plain").eval(), images()
    assert nncf_graph(model, x).get_nodes_count() > 3
    assert NNCF_HOOKS not in model._modules
    assert "forward" not in vars(model)


class Counts(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Quiet(Scale):
    def forward(self, x: Tensor) -> Tensor:
        with unseen_by_nncf():
            return x * self.factor


def multiplications(model: nn.Module, x: Tensor) -> list[str]:
    return [found.name for found in operations(model, x) if "mul" in found.name]


def test_nncf_need_not_see_a_hooks_arithmetic_but_others_do() -> None:
    model, x = Twice(), torch.randn(2, 3)
    hook_parameter(model, "linear.weight", Quiet())
    assert multiplications(model, x) == []
    with Counts() as mode, unseen_by_nncf():
        x * 2
    assert mode.calls > 0
    remove_hooks(model)
    hook_parameter(model, "linear.weight", Scale())
    assert multiplications(model, x) != [], "else the check above would prove nothing"


class Merged(Scale):
    def forward(self, x: Tensor) -> Tensor:
        with without_function_mode():
            return x * self.factor


def test_the_function_mode_can_be_off_with_gradients() -> None:
    model, x = Twice(), torch.randn(2, 3)
    hook_parameter(model, "linear.weight", Merged())
    assert multiplications(model, x) == []
    model(x).sum().backward()
    assert model.linear.weight.grad is not None
