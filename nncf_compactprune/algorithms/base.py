"""What an algorithm is: built on a model from one configuration entry, driven by the controller's schedule."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nncf_compactprune.config import AlgorithmConfig
from nncf_compactprune.host.calls import in_dict, is_image_list
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.host.tensors import device_of, place_of
from nncf_compactprune.host.torch_internals import tree_map
from nncf_compactprune.plugins import Plugins

MASKED_WEIGHTS = "masked weights"
"""Key of :attr:`Context.shared`: true where an algorithm of the list masks single weights and writes the zeros."""
TARGET_KEYS = ("labels", "label", "target", "targets")


class CompressionStage(IntEnum):
    """How far the compression is; names and meaning as in NNCF 2.x."""

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2


class Begins(IntEnum):
    """When an algorithm of a list begins: each waits until those before it, in this order, let it.

    Within one kind the order is that of the list. So NNCF's entries act rightly in whatever order they are written.
    """

    AT_ONCE = 0
    """It watches the model from the start, and settles at once."""
    IN_TURN = 1
    """It changes shapes, or acts on the shapes that those before it left."""
    AFTER_CUTS = 2
    """It acts on single weights, which move when channels go."""
    LAST = 3
    """It acts on the model as it will be."""


@dataclass
class Context:
    """What an algorithm works with.

    :param model: compressed in place.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
    :param plugins: installed criteria, rules, facts.
    :param train_loader: batches of ``(inputs, targets)`` or of keyword dicts, or None.
    :param optimizer: one or several, whose state follows when the model shrinks while training, or None.
    :param ema: a shadow copy that follows too, or None.
    :param teacher: what to distil from, or None: the model itself as it came.
    :param hold_masks: channels stay masked until the end, even where the schedule or an optimizer would let them be
        cut: a search for the compression rate goes back and forth.
    :param seconds: wall time by part of the work, for reports.
    :param shared: what algorithms of one list leave for those after them, by a key of their own.
    """

    model: nn.Module
    example_inputs: Any
    plugins: Plugins
    train_loader: Iterable[Any] | None = None
    optimizer: Optimizers | None = None
    ema: object | None = None
    teacher: nn.Module | None = None
    hold_masks: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.example_inputs = in_dict(self.example_inputs)
        self._placed = place_of(self.model)

    def follow_model(self) -> None:
        """Takes the example inputs where the model went since: to another device or another precision."""
        before, (device, dtype) = self._placed, place_of(self.model)

        def follow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.dtype == before[1] else leaf.dtype)

        if before != (device, dtype):
            self._placed = device, dtype
            self.example_inputs = tree_map(follow, self.example_inputs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def batches(self) -> Iterator[Any]:
        """Model inputs of the training loader, targets dropped, on the model's device."""
        for batch in self.train_loader or ():
            yield to_device(model_inputs(batch), self.device)

    def labelled_batches(self) -> Iterator[tuple[Any, Any]]:
        """Model inputs and targets of the training loader, on the model's device; targets are None where there are
        none."""
        for batch in self.train_loader or ():
            yield to_device((model_inputs(batch), targets(batch)), self.device)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the wall time of its body to ``seconds[what]``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def model_inputs(batch: Any) -> Any:
    """The inputs of a batch: ``(inputs, targets)`` gives inputs, a mapping loses its label keys. A list of pictures
    with a mapping of targets for each, as detectors are trained with, is one argument."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    if isinstance(batch, (tuple, list)):
        return (list(batch[0]),) if is_image_list(batch[0]) and _one_mapping_each(batch) else in_dict(batch[0])
    return batch


def _one_mapping_each(batch: Sequence[Any]) -> bool:
    found = targets(batch)
    if not isinstance(found, (tuple, list)) or len(found) != len(batch[0]):
        return False
    return all(isinstance(one, Mapping) for one in found)


def targets(batch: Any) -> Any:
    """The targets of a batch, or None: the second of ``(inputs, targets)``, or a mapping's label key."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in TARGET_KEYS if key in batch), None)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    return None


def to_device(inputs: Any, device: torch.device) -> Any:
    """Moves every tensor.

    :param inputs: any nesting of tensors and other values.
    :param device: where to.
    :return: the same nesting.
    """
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


class CompressionAlgorithm(ABC):
    """One algorithm at work on one model.

    The controller calls :meth:`capture` on all algorithms of a list, then :meth:`prepare` once for each as soon as
    those before it (see :class:`Begins`) :meth:`let it begin <lets_begin>`, then :meth:`epoch_step` and :meth:`step` as
    training goes, and :meth:`strip` at the end. Everything else reads.

    :param config: the validated configuration entry, an instance of ``Config``.
    :param context: the model and what comes with it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[AlgorithmConfig]] = AlgorithmConfig
    #: whether :attr:`compression_rate` can be set, up and down: what a search for the rate needs
    adjustable: ClassVar[bool] = False
    #: its place in a list, whatever the order in which that is written
    begins: ClassVar[Begins] = Begins.IN_TURN

    def __init__(self, config: AlgorithmConfig, context: Context) -> None:
        self.config = config
        self.context = context

    def capture(self) -> None:  # noqa: B027
        """The model is dense, and no algorithm of the list has touched it yet: time to take a copy for a teacher."""

    @abstractmethod
    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        """Starts: analyses the model and installs what training needs.

        :param state: what :meth:`get_state` gave in an earlier run, to continue from; the model is the dense one.
        """

    @property
    def settled(self) -> bool:
        """The model will not change any more through this algorithm, but for the values of its parameters."""
        return True

    def lets_begin(self, other: Begins) -> bool:
        """Whether an algorithm behind this one in the list may begin.

        :param other: what kind of algorithm.
        """
        return self.settled

    @abstractmethod
    def strip(self) -> None:
        """Ends: the model is left compact, without hooks."""

    @abstractmethod
    def stage(self) -> CompressionStage:
        """How far the compression is."""

    @abstractmethod
    def statistics(self) -> Mapping[str, Any]:
        """Figures to report, by name."""

    def attached(self) -> None:  # noqa: B027
        """The context has an optimizer or an EMA copy now, or another one."""

    def epoch_step(self, epoch: int) -> None:  # noqa: B027  not every algorithm has a schedule
        """An epoch begins."""

    def step(self, step: int) -> None:  # noqa: B027
        """A training step begins."""

    @property
    def adds_to_loss(self) -> bool:
        """Whether a training loop has to ask for :meth:`loss`."""
        return type(self).loss is not CompressionAlgorithm.loss

    def loss(self) -> Tensor | float:
        """What to add to the task's loss."""
        return 0.0

    @property
    def shrinks_on_the_way(self) -> bool:
        """Whether the model is to be cut several times while it trains."""
        return False

    @property
    def compression_rate(self) -> float:
        """Share of the cost removed now, in [0, 1)."""
        return 0.0

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        msg = f"the compression rate of '{self.name}' cannot be set"
        raise NotImplementedError(msg)

    @property
    def maximal_compression_rate(self) -> float:
        """The largest rate that can be set."""
        return 1.0

    def disable_scheduler(self) -> None:  # noqa: B027
        """The schedule ends: from here on only :attr:`compression_rate` says how far to go, and it is the target. An
        :attr:`adjustable` algorithm implements it."""

    def get_state(self) -> dict[str, Any]:
        """JSON-able state to continue from."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of this run: what is removed, not where the schedule is. Weights are loaded after. An
        :attr:`adjustable` algorithm implements it.

        :param state: what :meth:`get_state` gave earlier.
        :raises CompactPruneError: there is no way back from where the algorithm is.
        """
        msg = f"'{self.name}' has no earlier states to go back to"
        raise NotImplementedError(msg)
