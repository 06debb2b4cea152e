"""What a plugin may offer: the hook specifications and the shapes of what they return.

A plugin is any module or object with functions marked ``@hookimpl``, named by an entry point of the group
``nncf_compactprune`` or registered with :meth:`nncf_compactprune.plugins.Plugins.register`:

.. code-block:: python

    from nncf_compactprune import hookimpl

    @hookimpl
    def compactprune_importance():
        return {"l3": lambda context: ...}

Built-in parts enter by the same door. This module imports no other room of the package, so the graph and model types
that hooks exchange are :data:`~typing.Any` here and named in the docstrings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pluggy

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray
    from torch import Tensor, nn

PROJECT_NAME = "nncf_compactprune"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


class Algorithm(Protocol):
    """A compression algorithm that a ``"compression"`` entry can name.

    Subclass it explicitly if you use a type checker, which otherwise refuses a ``Config`` narrower than the one here.
    """

    #: what ``"algorithm"`` says in the configuration
    name: ClassVar[str]
    #: one line for ``nncf-compactprune algorithms``
    summary: ClassVar[str]
    #: validates the entry: a subclass of :class:`nncf_compactprune.config.AlgorithmConfig`
    Config: ClassVar[type[Any]]


class Importance(Protocol):
    """Scores the channels of one group; channels with larger scores are kept."""

    def __call__(self, context: Any, /) -> Tensor:
        """
        :param context: a :class:`nncf_compactprune.decide.criteria.CriterionContext`: group, tensors, data, gradients.
        :return: scores, ``[group.size]``, finite.
        """


class Allocation(Protocol):
    """Says how many channels each group keeps."""

    def __call__(self, problem: Any, scores: Any, /) -> NDArray[float64]:
        """
        :param problem: a :class:`nncf_compactprune.decide.budgets.AllocationProblem`: allowed widths, costs, budgets.
        :param scores: for each group one score a channel, an array ``[group.size]``, larger kept.
        :return: widths, ``[groups]``, each an allowed one; all budgets hold.
        """


class Schedule(Protocol):
    """Says how much is removed at each epoch."""

    def __call__(self, epoch: int, *, initial: float, target: float, steps: int) -> float:
        """
        :param epoch: counted from 0, where pruning starts.
        :param initial: share of the cost removed at epoch 0, in [0, 1).
        :param target: share removed in the end, in [0, 1). The channels are cut as soon as it is reached.
        :param steps: epochs from start to target.
        :return: share removed at this epoch.
        """


class OpRule(Protocol):
    """Says what one ATen operator does to channel labels."""

    def __call__(self, tracer: Any, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """
        :param tracer: the running trace; the rule passes labels on, unifies them, or pins them with a reason.
        :param func: the ATen overload that ran.
        :param args: its positional arguments.
        :param kwargs: its keyword arguments.
        :param out: what it returned.
        """


class FactsFn(Protocol):
    """Says which static facts of a module change when channels go."""

    def __call__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """
        :param module: the module, not to be changed here.
        :param shapes: the shape after the cut of each of its own parameters and buffers, by local name.
        :return: attribute updates, such as ``{"out_channels": 24}``.
        """


class ModelResolver(Protocol):
    """Builds a model from what follows the scheme of its name (``timm:fbnetv3_b``)."""

    def __call__(self, name: str, **options: Any) -> Any:
        """
        :param name: the part after ``scheme:``.
        :param options: further keys of the configuration's ``"model"`` section.
        :return: a :class:`nncf_compactprune.run.models.ResolvedModel`.
        """


class DatasetResolver(Protocol):
    """Builds data loaders from what follows the scheme of a data set's name."""

    def __call__(self, name: str, **options: Any) -> Any:
        """
        :param name: the part after ``scheme:``.
        :param options: further keys of the configuration's ``"dataset"`` section.
        :return: a data set as :mod:`nncf_compactprune.run.datasets` describes it.
        """


class LatencyMeter(Protocol):
    """Measures exported networks on a device: built once for a budget, by what that asks for."""

    def __call__(self, options: Any, /) -> Any:
        """
        :param options: a :class:`nncf_compactprune.serving.meter.MeterOptions`: device, precision and the like.
        :return: a :class:`nncf_compactprune.serving.meter.Meter`.
        """


@dataclass(frozen=True)
class Event:
    """Something happened in the life of a compression.

    :param kind: what, such as ``"traced"`` or ``"pruned"``.
    :param payload: its particulars, read-only.
    """

    kind: str
    payload: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "payload", MappingProxyType(dict(self.payload)))


@hookspec
def compactprune_algorithms() -> Iterable[type[Algorithm]]:  # type: ignore[empty-body]
    """Returns algorithm classes."""


@hookspec
def compactprune_importance() -> Mapping[str, Importance]:  # type: ignore[empty-body]
    """Returns importance criteria by name."""


@hookspec
def compactprune_allocations() -> Mapping[str, Allocation]:  # type: ignore[empty-body]
    """Returns allocations by name."""


@hookspec
def compactprune_schedules() -> Mapping[str, Schedule]:  # type: ignore[empty-body]
    """Returns schedules by name."""


@hookspec
def compactprune_op_rules() -> Mapping[str, OpRule]:  # type: ignore[empty-body]
    """Returns rules by ATen operator packet, such as ``"aten.convolution"``."""


@hookspec
def compactprune_module_facts() -> Mapping[type[nn.Module], FactsFn]:  # type: ignore[empty-body]
    """Returns facts functions by module class."""


@hookspec
def compactprune_models() -> Mapping[str, ModelResolver]:  # type: ignore[empty-body]
    """Returns model resolvers by scheme."""


@hookspec
def compactprune_datasets() -> Mapping[str, DatasetResolver]:  # type: ignore[empty-body]
    """Returns data set resolvers by scheme."""


@hookspec
def compactprune_export_formats() -> Iterable[type[Any]]:  # type: ignore[empty-body]
    """Returns subclasses of :class:`nncf_compactprune.export.ExportFormat`."""


@hookspec
def compactprune_latency_meters() -> Mapping[str, LatencyMeter]:  # type: ignore[empty-body]
    """Returns latency meters by the name that a budget's ``"runtime"`` says."""


@hookspec
def compactprune_event(event: Event) -> None:
    """Is called when something happened. What it returns is ignored; what it raises reaches the caller."""
