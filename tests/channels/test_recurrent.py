"""Recurrent layers: inputs and hidden states are channels, in every gate, layer and direction alike."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import Recurrent, images, model32
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, load_pruned, prune, save_pruned

X = images(torch.float32)


def pruned(model: nn.Module, x: Tensor = X, share: float = 0.5) -> nn.Module:
    result = prune(model.eval(), x, budget={"params": share}, round_to=1, allocation="uniform")
    assert result.self_check.error < 1e-5
    return model


class Rectified(nn.RNN):
    def __init__(self, *args: int, **options: bool) -> None:
        super().__init__(*args, nonlinearity="relu", **options)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, Rectified])
@pytest.mark.parametrize("options", [{}, {"num_layers": 1, "bidirectional": False, "bias": False}], ids=["two", "one"])
def test_inputs_and_states_are_cut_in_every_gate_layer_and_direction(kind, options, tmp_path) -> None:
    torch.manual_seed(0)
    model = pruned(Recurrent(kind, **options), share=0.35)
    layers = model.layers
    assert layers.input_size == 3 * model.features[1].out_channels < 48
    assert layers.hidden_size < 12
    sides = 2 if layers.bidirectional else 1
    gates = {nn.LSTM: 4, nn.GRU: 3}.get(kind, 1)
    assert layers.weight_ih_l0.shape == (gates * layers.hidden_size, layers.input_size)
    assert model.head.in_features == sides * layers.hidden_size
    if layers.num_layers > 1:
        assert layers.weight_ih_l1_reverse.shape == (gates * layers.hidden_size, sides * layers.hidden_size)
    save_pruned(model, tmp_path)
    again = load_pruned(Recurrent(kind, **options), tmp_path).eval()
    assert torch.equal(again(X), model(X))


def test_projected_states_are_pinned_and_their_inputs_too() -> None:
    model = pruned(Recurrent(nn.LSTM, proj_size=6, num_layers=1, bidirectional=False), share=0.9)
    assert (model.layers.hidden_size, model.layers.input_size) == (12, 48)
    assert any("projected states" in pin.reason for pin in analyse(model, X).pinned)


class Steps(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(3, 16), cell(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for column in x.mean(2).unbind(-1):
            state = self.cell(self.first(column).sigmoid(), state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class RectifiedCell(nn.RNNCell):
    def __init__(self, inputs: int, states: int) -> None:
        super().__init__(inputs, states, nonlinearity="relu")


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, RectifiedCell])
def test_cells_step_by_step(kind) -> None:
    torch.manual_seed(0)
    model = pruned(Steps(kind))
    assert model.cell.input_size == model.first.out_features < 16
    assert model.cell.hidden_size == model.head.in_features < 12


class Given(Recurrent):
    """A state from outside, of a width that is written in the code."""

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.features(x).flatten(1, 2).transpose(1, 2)
        start = torch.zeros(1, len(x), 12)
        return self.head(self.layers(sequence, (start, start))[0].mean(1))


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        sequence = self.features(x).flatten(1, 2).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(sequence, torch.tensor([12] + [7] * (len(x) - 1)), batch_first=True)
        out, (state, _) = self.layers(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0].mean(1) + state[-1].repeat(1, 2))


def test_a_state_of_fixed_width_stays_and_inputs_go() -> None:
    model = pruned(Given(num_layers=1, bidirectional=False), share=0.8)
    assert model.layers.hidden_size == 12
    assert model.layers.input_size < 48


def test_packed_sequences() -> None:
    model = pruned(Packed(), share=0.35)
    assert model.layers.hidden_size < 12
    assert model.layers.input_size < 48


def test_it_trains_under_masks_and_shrinks() -> None:
    """NNCF writes what a hook returns into the layer's own list of weights; they must be its parameters again."""
    model = model32("recurrent")
    entry = {"algorithm": "fbnet_pruning", "budget": {"params": 0.5}}
    entry["params"] = {"schedule": "exponential", "pruning_init": 0.2, "pruning_steps": 2, "round_to": 1}
    ctrl, _ = create_compressed_model(model, {"compression": entry}, example_inputs=X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    losses = []
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        model.train()
        for _ in range(3):
            ctrl.scheduler.step()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), torch.tensor([1, 3]))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            assert all(isinstance(weight, nn.Parameter) for weight in model.layers._flat_weights)
        copy.deepcopy(model)
    assert losses[-1] < losses[0]
    assert model.layers.hidden_size < 12
    ctrl.strip()
    assert not model.layers._forward_hooks
    assert not model.layers._forward_hooks_always_called
