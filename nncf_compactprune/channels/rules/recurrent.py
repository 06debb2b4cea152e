"""Recurrent layers, whole: the operations below them differ from device to device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nncf_compactprune.channels.labels import LabelArray
from nncf_compactprune.channels.rules.base import rule

if TYPE_CHECKING:
    from nncf_compactprune.channels.tracer import Tracer


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Layers over a sequence, in one direction or both.

    A channel of the hidden state has a row in every gate, and a column in what reads the state: in its own recurrence
    and in the layer above. All layers and directions of a module have one width, and keep the same channels.
    """
    in_steps = isinstance(args[1], Tensor) and not args[1].is_floating_point()  # packed: behind the data, their sizes
    x, (states, weights, _, count, _, _, both) = args[0], args[2:9] if in_steps else args[1:8]
    directions = 2 if both else 1
    per_cell = len(weights) // (count * directions)
    cells = [list(weights[at : at + per_cell]) for at in range(0, len(weights), per_cell)]
    if per_cell in (3, 5) or any(len(tracer.labels(cell[0])) != 2 for cell in cells):
        tracer.no_rule(func, args, kwargs, "projected states have no rule:")
        return
    hidden = tracer.labels(cells[0][1])[1]
    for at, cell in enumerate(cells):
        below = tracer.width(x, -1) if at < directions else _tiled(hidden, directions)
        _cell(tracer, cell, hidden, below, steps=x.numel() // x.shape[-1])
    results = out if isinstance(out, (tuple, list)) else (out,)
    for state in (*_tensors(states), *results[1:]):
        _state(tracer, state, hidden)
    tracer.set(results[0], [*tracer.labels(x)[:-1], _tiled(hidden, directions)])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """One step of one layer, see :func:`layers`."""
    x, states, *weights = args
    weights = [weight for weight in weights if isinstance(weight, Tensor)]
    hidden = tracer.labels(weights[1])[1]
    _cell(tracer, weights, hidden, tracer.width(x, -1), steps=x.numel() // x.shape[-1])
    for state in (*_tensors(states), *_tensors(out)):
        _state(tracer, state, hidden)


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """Sequences of different lengths, one behind the other, and back: their features pass on."""
    *places, features = tracer.labels(args[0])
    for labels in places:
        tracer.pin(labels, "steps and examples of sequences")
    tracer.set(out[0], [None] * (out[0].dim() - 1) + [features])


def _cell(
    tracer: Tracer, weights: Sequence[Tensor], hidden: LabelArray | None, below: LabelArray | None, *, steps: int
) -> None:
    """Gates of one cell: ``[gates * hidden, in]``, ``[gates * hidden, hidden]``, biases ``[gates * hidden]``."""
    for weight, inputs in zip(weights[:2], (below, hidden), strict=False):
        outer, inner = tracer.labels(weight)
        tracer.mark(outer, "producer")
        tracer.mark(inner, "consumer")
        tracer.same(inner, inputs, "consumes a fixed input")
        tracer.count_macs(steps * weight.numel(), outer, inner)
    for tensor in weights:
        outer = tracer.labels(tensor)[0]
        if outer is not None and hidden is not None:
            tracer.unify(outer.reshape(-1, hidden.size), hidden[None])
        tracer.mark(outer, "producer")


def _state(tracer: Tracer, state: Tensor, hidden: LabelArray | None) -> None:
    """A state that carries no labels is one of zeros, which the module makes as wide as it is; another one of that
    width, given from outside, ends the trial cut."""
    own = tracer.width(state, -1)
    if own is not None and hidden is not None:
        tracer.unify(own, hidden)
    tracer.set(state, [*tracer.labels(state)[:-1], hidden])


def _tensors(states: Any) -> tuple[Tensor, ...]:
    return tuple(states) if isinstance(states, (tuple, list)) else (states,)


def _tiled(hidden: LabelArray | None, directions: int) -> LabelArray | None:
    return None if hidden is None else np.tile(hidden, directions)
