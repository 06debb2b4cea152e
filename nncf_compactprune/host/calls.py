"""How a model is called: its inputs, its mode, and what must be as before afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_compactprune.host.marks import Marks, Writes, forget_tables
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import one_way_of_attention, results_of, tensors_of, tree_map


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """Calls a model.

    :param model: in the mode that it is in.
    :param example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
    :return: what the model returns.
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def in_dict(inputs: Any) -> Any:
    """Keyword inputs in a plain dict. Torch's trees know no other mapping, such as what a tokenizer gives.

    :param inputs: as a model is called.
    """
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def with_rows(inputs: Any) -> list[Tensor]:
    """The tensors in a model's inputs that have a first dimension, which counts examples in most of them.

    :param inputs: any nesting.
    """
    return [tensor for tensor in tensors_of(inputs) if tensor.dim() > 0]


def has_rows(leaf: Any, count: int) -> bool:
    """Whether a value holds an example a row; other values belong to all examples.

    :param leaf: of a model's inputs.
    :param count: number of examples.
    """
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count


def is_image_list(value: Any) -> bool:
    """Whether it is a list of pictures ``[1, 3 or 4 channels, h, w]``, each of its own size, as torchvision's detectors
    take them: then every item is an example.

    :param value: a part of a model's inputs.
    """
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Tensor) for one in value):
        return False
    channels = {one.shape[0] for one in value if one.dim() == 3 and one.is_floating_point()}
    return all(one.dim() == 3 for one in value) and len(channels) == 1 and channels <= {1, 3, 4}


def image_lists(inputs: Any) -> list[Sequence[Tensor]]:
    """The lists of pictures among a model's inputs.

    :param inputs: as a model is called: a tuple at the outside holds its arguments.
    """
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return [part for part in parts if is_image_list(part)]


def one_of(parts: Sequence[Any]) -> Callable[[Any], bool]:
    """Whether something is one of these very objects.

    :param parts: which.
    """
    known = {id(part) for part in parts}
    return lambda part: id(part) in known


def count_of(inputs: Any) -> int:
    """Number of examples in a model's inputs: pictures of the first list of them, otherwise rows of the first tensor
    that has any; 0 where none has.

    :param inputs: any nesting.
    """
    return next(map(len, image_lists(inputs) or with_rows(inputs)), 0)


def shape_of_one(inputs: Any) -> tuple[int, ...]:
    """The shape of the first example of a model's inputs.

    :param inputs: with at least one tensor that has rows.
    """
    pictures = image_lists(inputs)
    return tuple(pictures[0][0].shape if pictures else with_rows(inputs)[0].shape[1:])


def rows_of(inputs: Any, begin: int, end: int) -> Any:
    """A model's inputs with some of the examples.

    :param inputs: any nesting.
    :param begin: the first one.
    :param end: one behind the last one.
    :return: the same nesting.
    """
    count, is_pictures = count_of(inputs), one_of(image_lists(inputs))

    def take(part: Any) -> Any:
        return part[begin:end] if is_pictures(part) or has_rows(part, count) else part

    return tree_map(take, inputs, is_leaf=is_pictures)


@contextmanager
def evaluating(
    model: nn.Module,
    inputs: Any = None,
    *,
    changes: bool = False,
    mode: Writes | None = None,
    in_training_mode: bool = False,
) -> Iterator[None]:
    """The one way to run a model that leaves no mark: eval mode, no gradients, no autocast.

    Afterwards training flags and random states (torch, numpy, Python) are as before, and so is all that
    :mod:`~nncf_compactprune.host.marks` lists: a memo that the forward pass fills is gone again.

    :param model: what the body runs.
    :param inputs: what the model runs on; what it writes into these tensors is taken back too.
    :param changes: the body changes the model on purpose. Then only mode, flags and random states are taken back; put
        each run in an :func:`unmarked` of its own.
    :param mode: sees the operations in place of one that only looks for writes: two modes cost twice the time.
    :param in_training_mode: run the model as it trains, to see the branches that it takes then alone.
    """
    modules = [module for _, module in named_modules(model)]
    forget_tables(modules)  # first: weights that are merged then stay apart
    with nullcontext() if changes else unmarked(model, inputs, mode=mode):
        flags: list[tuple[nn.Module, bool]] = []
        if any(module.training != in_training_mode for module in modules):
            flags = [(module, module.training) for module in model.modules()]  # those of NNCF's hooks too
            model.train(in_training_mode)
            forget_tables(modules)
        try:
            with torch.no_grad(), _without_autocast(model), _same_random_states(model), one_way_of_attention():
                yield
        finally:
            for module, training in flags:
                module.training = training


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """What a model computes in eval mode, every tensor of it.

    :param model: it is only run.
    :param example_inputs: as the model is called.
    :return: copies, in the order of the output.
    """
    with evaluating(model, example_inputs):
        return [tensor.clone() for tensor in results_of(call_model(model, example_inputs))]


@contextmanager
def unmarked(
    model: nn.Module, inputs: Any = None, *, contents: bool = True, mode: Writes | None = None
) -> Iterator[None]:
    """Takes back what runs inside leave in a model (see :mod:`~nncf_compactprune.host.marks`), in whatever mode.

    :param model: what the body runs.
    :param inputs: what the model runs on; what it writes into these tensors is taken back too.
    :param contents: take back what is written into tensors. Without it, a hook may change weights while the model runs.
    :param mode: a mode that the body enters itself, and that saves what operations write into; None: one is entered.
    """
    marks = Marks(model, inputs, contents=contents)
    writes = mode if mode is not None else Writes()
    writes.memory = marks.memory
    try:
        with writes if mode is None else nullcontext():
            yield
    finally:
        marks.undo()


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    device = next((p.device.type for p in model.parameters()), "cpu")
    on = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if on else nullcontext():
        yield
    torch.clear_autocast_cache()  # the model may have used autocast itself, on masked weights


@contextmanager
def _same_random_states(model: nn.Module) -> Iterator[None]:
    parameters = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
