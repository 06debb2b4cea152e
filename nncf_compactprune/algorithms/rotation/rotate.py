"""Rotates a network's streams in place, and proves that it computes what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nncf_compactprune.algorithms.base import Context
from nncf_compactprune.algorithms.batch_norm import first_batches
from nncf_compactprune.algorithms.rotation.basis import Basis, measured
from nncf_compactprune.algorithms.rotation.streams import streams_of
from nncf_compactprune.channels import ChannelGraph
from nncf_compactprune.config import Section
from nncf_compactprune.cut.self_check import in_double, to_double
from nncf_compactprune.cut.transaction import Transaction, for_a_while, transaction
from nncf_compactprune.errors import DataError, NothingPrunableError, SelfCheckError
from nncf_compactprune.host.calls import outputs
from nncf_compactprune.host.marks import memos
from nncf_compactprune.host.optimizers import Optimizers, with_inner
from nncf_compactprune.host.tensors import model_tensors, select, with_copy
from nncf_compactprune.host.torch_internals import tree_map
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins

ROTATION_TOLERANCE = 1e-8  # of outputs in double precision
ROUNDING_TOLERANCE = 1e-4  # where the network does not run in it


class RotateConfig(Section):
    """``initializer.rotate``: the streams that norms run over are rotated before the cut, so that their last channels
    hold least.

    :param num_samples: how many examples of the training loader the directions are measured on, at least.
    """

    num_samples: int = Field(default=128, ge=1)


@dataclass(frozen=True)
class RotatedStream:
    """A stream that was rotated.

    :param name: of its channel group.
    :param width: number of channels.
    :param scores: root of the mean share that each channel has in what the norms give, ``[width]``, falling.
    """

    name: str
    width: int
    scores: Tensor


@dataclass(frozen=True)
class Rotation:
    """What :func:`rotate` did.

    :param streams: what was rotated.
    :param refused: why other channels that norms run over were not, by the name of their group.
    :param error: largest difference of the outputs before and after, over the largest output, in double precision
        where the network runs in it.
    :param rounding: the same in the network's own precision.
    """

    streams: tuple[RotatedStream, ...]
    refused: Mapping[str, str]
    error: float
    rounding: float

    def __str__(self) -> str:
        widths = ", ".join(f"'{stream.name}' ({stream.width} channels)" for stream in self.streams)
        return f"{widths}, error {self.error:.0e}, {self.rounding:.0e} in the network's own precision"


def rotate(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    *,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
) -> Rotation:
    """Rotates the streams of a transformer in place: the network computes the same, and the last channels of what its
    blocks add to hold least.

    Weights of norms over a stream move into the layers behind them and become ones. Layers that write a stream, and
    those that read it, are multiplied by an orthogonal matrix: the principal directions of what the norms give on the
    batches (Ashkboos et al. 2024, "SliceGPT"). Deviations: one matrix for the whole stream in place of one for every
    block, which leaves the network's code as it is; and LayerNorms stay LayerNorms, as the matrix leaves the mean over
    channels alone.

    .. code-block:: python

        rotate(model, {"input_ids": words}, [{"input_ids": batch} for batch in texts])

    :param model: any module; changed in place.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param batches: model inputs, without labels, to measure the directions on.
    :param optimizer: one or several, whose state of rotated parameters starts anew.
    :param ema: a shadow copy of the model; it is rotated by the same matrices.
    :param plugins: where the rules of operations come from; the installed plugins by default.
    :return: what was rotated, and what was not and why.
    :raises NothingPrunableError: no stream can be rotated; the message says why.
    :raises DataError: there is no batch, or the model does not take the same way on it.
    :raises SelfCheckError: the rotated model computes something else. After any error the model is untouched.
    """
    return rotated(model, example_inputs, list(batches), optimizer=optimizer, ema=ema, plugins=plugins)[0]


def rotated(
    model: nn.Module,
    example_inputs: Any,
    batches: Sequence[Any],
    *,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
    within: Transaction | None = None,
) -> tuple[Rotation, list[Basis]]:
    """The same as :func:`rotate`, with the bases.

    :param model: see there.
    :param example_inputs: see there.
    :param batches: see there.
    :param optimizer: see there.
    :param ema: see there.
    :param plugins: see there.
    :param within: the transaction that the rotation is a part of; by default it is one of its own.
    """
    streams, refused = streams_of(model, example_inputs, plugins)
    if not streams:
        reasons = "\n  ".join(f"'{name}': {reason}" for name, reason in list(refused.items())[:10])
        msg = (
            f"rotate: no stream of {type(model).__name__} can be rotated:\n  {reasons or 'no norm runs over channels'}"
        )
        raise NothingPrunableError(msg)
    bases = measured(model, streams, batches)
    examples = [example_inputs, batches[0]]
    with transaction() if within is None else nullcontext(within) as log:
        before = [_outputs(model, inputs) for inputs in examples]
        error = _error_in_double(model, bases, examples)
        for module in with_copy(model, ema):
            _carry_out(log, module, bases)
        _forget(log, model, bases, optimizer)
        after = [_outputs(model, inputs) for inputs in examples]
        rounding = _difference(before, after)
        if error is None:
            _require(model, rounding, ROUNDING_TOLERANCE)
    found = tuple(RotatedStream(one.stream.name, one.stream.width, one.scores.cpu()) for one in bases)
    return Rotation(found, refused, rounding if error is None else error, rounding), bases


def _error_in_double(model: nn.Module, bases: Sequence[Basis], examples: Sequence[Any]) -> float | None:
    """None where the network does not run in double precision.

    :raises SelfCheckError: the rotated network computes something else.
    """
    wide = [tree_map(to_double, inputs) for inputs in examples]
    with in_double(model):
        try:
            before = [_outputs(model, inputs) for inputs in wide]
        except RuntimeError:  # operations of mixtures know single precision alone
            return None
        with for_a_while() as log:
            _carry_out(log, model, bases)
            after = [_outputs(model, inputs) for inputs in wide]
    error = _difference(before, after)
    _require(model, error, ROTATION_TOLERANCE)
    return error


def _require(model: nn.Module, error: float, tolerance: float) -> None:
    """:raises SelfCheckError: the error is larger, or no number."""
    if not error <= tolerance:
        msg = (
            f"rotate: the rotated {type(model).__name__} differs from the given one by {error:.1e} (largest difference "
            f"over largest output), expected at most {tolerance:.0e}. The model was restored. Please report the "
            "architecture."
        )
        raise SelfCheckError(msg)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return [tensor.double() for tensor in outputs(model, inputs) if tensor.is_floating_point()]


def _difference(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """Largest difference, each output relative to its largest absolute value; NaN where an output is."""
    pairs = [pair for one, other in zip(before, after, strict=True) for pair in zip(one, other, strict=True)]
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in pairs if a.numel()]
    return float(torch.stack(errors).max()) if errors else 0.0


def _carry_out(log: Transaction, model: nn.Module, bases: Sequence[Basis]) -> None:
    """Sets rotated weights, worked out in float64."""
    tensors = model_tensors(model).all()
    for live, key in memos(model):
        log.delete_item(live, key)
    new: dict[str, Tensor] = {}

    def now(name: str) -> Tensor:
        return new.get(name, tensors[name].data.double())

    for basis in bases:
        stream, matrix = basis.stream, basis.matrix
        for (name, dim), reading in stream.read.items():
            if (scale := reading.scale) is not None:
                rows = now(name).movedim(dim, -1)
                factor = tensors[scale.parameter].data.double() + scale.offset
                scaled = rows * factor.flatten()
                if scale.shift:
                    scaled = with_means(scaled, rows @ tensors[scale.shift].data.double() / stream.width)
                new[name] = scaled.movedim(-1, dim)
        for scale in stream.scales:
            new[scale.parameter] = torch.full_like(now(scale.parameter), 1 - scale.offset)
            if scale.shift:
                new[scale.shift] = torch.ones_like(now(scale.shift))
        for name, dim in stream.written | stream.read.keys():
            new[name] = (now(name).movedim(dim, -1) @ matrix).movedim(-1, dim)
    for name, data in new.items():
        old = tensors[name].data
        log.set_data(tensors[name], torch.empty_like(old).copy_(data))


def with_means(rows: Tensor, means: Tensor) -> Tensor:
    """A weight that reads what a LayerNorm gives, with other means over its inputs.

    What it gives sums to zero before its bias is added, so these means have no effect on it. With a bias of ones they
    are a bias of the layer behind it, whether that has one of its own or not: so the norm's bias is free of the basis.

    :param rows: the weight, ``[..., inputs]``.
    :param means: ``[...]``.
    """
    return rows + (means - rows.mean(-1))[..., None]


def _forget(log: Transaction, model: nn.Module, bases: Sequence[Basis], optimizer: Optimizers | None) -> None:
    """What optimizers remember of rotated parameters is of another basis."""
    tensors = model_tensors(model).all()
    for basis in bases:
        for name in {name for name, _ in basis.stream.written | basis.stream.read.keys()}:
            for one in with_inner(optimizer):
                if tensors[name] in one.state:
                    log.delete_item(one.state, tensors[name])


# -- before and after a cut ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RotatedModel:
    """A model that was rotated in order to be cut.

    :param context: the model.
    :param rotation: what was done.
    :param bases: the directions.
    :param biases: of the model and its EMA copy: by weight, what norms with a bias add through it, see
        :func:`with_means`.
    """

    context: Context
    rotation: Rotation
    bases: Sequence[Basis]
    biases: Sequence[Mapping[str, Tensor]]

    @classmethod
    def start(cls, context: Context, config: RotateConfig, log: Transaction) -> RotatedModel:
        """Rotates the model of a context in place.

        :param context: the model, and the training loader.
        :param config: the section.
        :param log: notes every change.
        """
        if context.train_loader is None:
            msg = "initializer.rotate: directions are measured on examples, but no train_loader was given. Give one."
            raise DataError(msg)
        with context.timed("rotation"):
            batches = first_batches(context.batches(), config.num_samples)
            rotation, bases = rotated(
                context.model,
                context.example_inputs,
                batches,
                optimizer=context.optimizer,
                ema=context.ema,
                plugins=context.plugins,
                within=log,
            )
        return cls(context, rotation, bases, [_biases(model, bases) for model in with_copy(context.model, context.ema)])

    def scores(self, graph: ChannelGraph) -> dict[int, Tensor]:
        """Scores of the rotated groups, by their index: what each direction holds.

        :param graph: of the rotated model.
        """
        found = {}
        for index, group in enumerate(graph.groups):
            slots = {(member.parameter, member.dim) for member in group.members}
            for basis in self.bases:
                if slots & basis.stream.written:
                    found[index] = basis.scores
        return found

    def rescale(self, plan: PruningPlan) -> None:
        """Layers behind norms over fewer channels get their inputs in the size that they had, on average.

        :param plan: what was cut.
        """
        models = with_copy(self.context.model, self.context.ema)
        for model, biases in zip(models, self.biases, strict=True):
            tensors = model_tensors(model).all()
            for basis in self.bases:
                for (name, dim), reading in basis.stream.read.items():
                    if reading.site is None or dim not in plan.kept.get(name, {}):
                        continue
                    kept = len(plan.indices(name, dim))
                    data = tensors[name].data
                    data.mul_(basis.factor(reading.site, kept))
                    if name in biases:  # of its outputs, some may be gone
                        others = {d: at for d, at in plan.selection(name).items() if d != dim}
                        means = select(biases[name], others).squeeze(dim) / kept
                        data.copy_(with_means(data.movedim(dim, -1), means).movedim(-1, dim))


def _biases(model: nn.Module, bases: Sequence[Basis]) -> dict[str, Tensor]:
    tensors = model_tensors(model).all()
    return {
        name: tensors[name].data.sum(dim, keepdim=True)
        for basis in bases
        for (name, dim), reading in basis.stream.read.items()
        if reading.scale is not None and reading.scale.shift
    }
