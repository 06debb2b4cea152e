"""Tensors of one value that the code makes as wide as it needs them: states of zeros, masks of ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nncf_compactprune import analyse, prune

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


class Scan(nn.Module):
    """A state space as Mamba's: a depthwise convolution whose weight goes through a squeeze, and a state of zeros."""

    def __init__(self, fixed: bool = False, write: bool = False) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(16, 64), nn.Conv1d(64, 64, 4, groups=64, padding=3), nn.Linear(64, 5)
        self.decay = nn.Parameter(torch.rand(64))
        self.fixed, self.write = fixed, write

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).transpose(1, 2)
        weight = self.conv.weight.squeeze(1).unsqueeze(1)
        x = nn.functional.conv1d(x, weight, self.conv.bias, padding=3, groups=x.shape[1])[..., : x.shape[2]].sigmoid()
        state = torch.zeros(len(x), 64 if self.fixed else x.shape[1])
        if self.write:
            states = torch.zeros(len(x), 2, x.shape[1])
            states[:, 0] = x[..., 0]
            state = states.sum(1)
        for step in x.unbind(-1):
            state = self.decay * state + step
        return self.down(state)


def test_a_state_of_zeros_is_as_wide_as_it_is_made() -> None:
    torch.manual_seed(0)
    model = Scan().eval()
    assert [group.size for group in analyse(model, X).groups] == [64]
    result = prune(model, X, budget={"params": 0.5}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.conv.groups == model.down.in_features == len(model.decay) < 64


@pytest.mark.parametrize(
    ("option", "reason"),
    [("fixed", "does not follow a smaller width"), ("write", "written into a tensor of fixed size")],
)
def test_a_width_in_the_code_and_a_state_that_is_written_into_stay(option, reason) -> None:
    graph = analyse(Scan(**{option: True}).eval(), X)
    assert not graph.groups
    assert any(reason in pin.reason for pin in graph.pinned)


class Grows(nn.Module):
    """Zeros in front of what was computed: they are no channels that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(torch.cat([torch.ones(*y.shape[:2], 8).cos(), y], -1))


def test_filled_channels_in_a_concatenation_stay() -> None:
    torch.manual_seed(0)
    model = Grows().eval()
    result = prune(model, X, budget={"params": 0.6}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.b.in_features == model.a.out_features + 8


class Steps(nn.Module):
    """A step of a recurrent network that is written by hand, on states of zeros that a method makes."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width, self.out = width, nn.Linear(2 * width, 5)

    def zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.width)


class AsWideAsItsInput(Steps):
    """The state is as wide as the input, which is another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.step = nn.Linear(16, self.width), nn.Linear(2 * self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        state = self.up(x[:, 0]).new_zeros(len(x), self.width)
        for step in self.up(x).unbind(1):
            state = self.step(torch.cat([step, state], 1)).tanh()
        return self.out(torch.cat([state, self.zeros(x)], 1))


class Joined(Steps):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(16 + self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        state = self.zeros(x)
        for step in x.unbind(1):
            state = self.step(torch.cat([step, state], 1)).tanh()
        return self.out(torch.cat([state, self.zeros(x)], 1))


class Apart(Steps):
    """What the state goes through comes before anything that tells its channels, and its width is a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.of_x, self.of_state = nn.Linear(16, self.width), nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.of_state.out_features)
        for step in x.unbind(1):
            state = (self.of_state(state) + self.of_x(step)).relu()
        return self.out(torch.stack([state, self.zeros(x)], 2).flatten(1))


class Decoder(Steps):
    """Attends to what an encoder gave; its own states and the first context are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(16, self.width, batch_first=True)
        self.cell = nn.LSTMCell(16 + self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        seen, _ = self.encoder(x)
        h, c, context = self.zeros(x), self.zeros(x), self.zeros(x)
        for step in x[:, :3].unbind(1):
            h, c = self.cell(torch.cat([step, context], 1), (h, c))
            context = ((seen @ h[..., None]).softmax(1) * seen).sum(1)
        return self.out(torch.cat([h, context], 1))


@pytest.mark.parametrize("network", [Joined, Apart, Decoder])
def test_states_of_networks_written_by_hand_go_with_their_layers(network) -> None:
    torch.manual_seed(0)
    model = network().eval()
    assert [group.size for group in analyse(model, X).groups] == [24]
    result = prune(model, X, budget={"params": 0.5}, round_to=1)
    assert result.self_check.error < 1e-5
    assert model.width == model.out.in_features // 2 < 24


def test_a_state_that_happens_to_be_as_wide_as_its_input_follows_the_number_of_its_code() -> None:
    torch.manual_seed(0)
    model = AsWideAsItsInput().eval()
    assert [group.size for group in analyse(model, X).groups] == [24, 24]
    assert prune(model, X, budget={"macs": 0.5}, round_to=1).self_check.error < 1e-5
    assert model.width == model.step.out_features < 24
