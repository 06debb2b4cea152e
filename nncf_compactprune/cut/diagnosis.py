"""Why a cut model does not run, or computes something else: the first operation that departs from what channel analysis
predicts, and the groups that it touches.

Analysis takes views and splits at their word; a network that writes a width into its code (``x.view(b, 64, -1)``)
breaks once that width shrinks. The dense model is run once more with labels recorded, which
predicts the shape of every intermediate result of the cut model (and, from the masked model, what it holds); the cut
model is run beside that list, and the first operation that differs names module, line and groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.channels import ChannelGraph, Pin, ViewByNumber, trace
from nncf_compactprune.channels.labels import DimLabels, LabelSpace
from nncf_compactprune.channels.running_code import user_location
from nncf_compactprune.channels.tracer import Tracer
from nncf_compactprune.cut.masked_model import masked
from nncf_compactprune.cut.means import removed_labels
from nncf_compactprune.cut.self_check import in_double, prune_in_place, to_double
from nncf_compactprune.cut.surgery import cut
from nncf_compactprune.cut.transaction import for_a_while
from nncf_compactprune.cut.trials import check_inputs
from nncf_compactprune.errors import FixedAttributeError, SelfCheckError, TraceError, first_line
from nncf_compactprune.host.calls import call_model, evaluating, in_dict
from nncf_compactprune.host.tensors import named_modules
from nncf_compactprune.host.torch_internals import TorchDispatchMode, tensors_of, tree_map
from nncf_compactprune.plan import PruningPlan, kept_channels, make_plan
from nncf_compactprune.plugins import Plugins, default_plugins

SINGLE_TOLERANCE = 1e-3
DOUBLE_TOLERANCE = 1e-6


def analyse(
    model: nn.Module,
    example_inputs: Any,
    *,
    trial: bool = True,
    plugins: Plugins | None = None,
    allow_approximate: bool = False,
    pins: Sequence[Pin | ViewByNumber] = (),
) -> ChannelGraph:
    """Finds which channels of a model can be removed together, why the others stay, and what the model costs.

    The trial cuts a part of every group, checks the result and puts everything back. A group that the network's code
    does not let shrink is then pinned with operation, module and line; the others are proven to go together. The model
    is left as it was.

    :param model: any module; frozen parameters are analysed like others.
    :param example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. MACs are counted for one
        item of its leading dimension.
    :param trial: whether the groups are tried out. ``False`` is faster, takes views and splits at their word, and is
        enough for ``macs`` and ``params``.
    :param plugins: where the rules for operations come from; the installed plugins by default.
    :param allow_approximate: also offer channels that a LayerNorm normalises over.
    :param pins: what :func:`culprits` found in a cut before.
    :return: groups, pinned channels with reasons, exact MACs and parameters.
    :raises TraceError: the model does not run on the example input.
    :raises SelfCheckError: the cut fails and no operation could be named for it.
    """
    known = list(pins)
    example_inputs = in_dict(example_inputs)
    while True:
        graph = trace(model, example_inputs, plugins=plugins, allow_approximate=allow_approximate, pins=known)
        if not trial or not graph.groups:
            return graph
        plan = _trial_plan(graph)
        if plan.is_identity:
            return graph
        try:
            prune_in_place(model, plan, example_inputs, plugins=plugins, dry_run=True)
        except SelfCheckError:
            found = culprits(model, plan, graph, example_inputs, plugins=plugins)
            if not found:
                raise
            known += found
        else:
            return graph


def culprits(
    model: nn.Module, plan: PruningPlan, graph: ChannelGraph, example_inputs: Any, *, plugins: Plugins | None = None
) -> list[Pin | ViewByNumber]:
    """What to pin after a plan failed its self-check, so that the next trace leaves it whole.

    :param model: dense; left as it was.
    :param plan: the plan that failed.
    :param graph: the channels that it was made for.
    :param example_inputs: as the model is called.
    :param plugins: where rules and facts come from; the installed plugins by default.
    :return: the pins; empty where nothing was found. A reshape gets a second chance first, with sizes that follow the
        numbers which its code reads.
    """
    if plan.removed:  # they were tried out; what they leave must be found step by step
        keep = [mask if mask.any() else ~mask for mask in kept_channels(graph, plan)]
        plan = make_plan(graph, keep, algorithm=plan.algorithm)
    culprit = find_culprit(model, plan, graph, example_inputs, plugins=plugins)
    if culprit is None:  # a number that stands for something else may have been changed
        return [ViewByNumber("")] if graph.by_number - {""} else []
    if culprit.reshapes and culprit.location and not graph.by_number & {culprit.location, ""}:
        return [ViewByNumber(culprit.location)]
    nncf_logger.debug("Left whole: %s", culprit.reason)
    members = [graph.groups[index].members[0] for index in culprit.groups]
    return [
        Pin(m.parameter, m.dim, tuple(m.indices.ravel().tolist()), culprit.reason, culprit.location) for m in members
    ]


def _trial_plan(graph: ChannelGraph) -> PruningPlan:
    """Drops a random part of every group, of another share each: a constant in the code, or a width taken for another
    one, must not fit by chance."""
    generator = np.random.default_rng(0)
    keep = []
    for group in graph.groups:
        mask = np.zeros(group.size, bool)
        wanted, most = group.size * generator.uniform(0.35, 0.8) / group.multiple, group.size // group.multiple
        width = group.multiple * min(max(round(wanted), 1), max(most - 1, 1))
        mask[generator.permutation(group.size)[:width]] = True
        keep.append(mask)
    return make_plan(graph, keep)


_RESHAPES = ("aten.view", "aten._unsafe_view", "aten._reshape_alias")


@dataclass(frozen=True)
class Culprit:
    """What stands in the way of a cut.

    :param groups: indices of the groups to leave whole.
    :param reason: in words, naming operation and module.
    :param location: ``file.py:line`` of the code, or empty.
    :param reshapes: it is a reshape that writes a size.
    """

    groups: tuple[int, ...]
    reason: str
    location: str
    reshapes: bool = False


@dataclass
class _Record:
    """One operation of the dense run.

    :param shapes: of its results, before the cut.
    :param sizes: of the part of each result that is kept, in a run with arithmetic.
    """

    name: str
    module: str
    kind: str
    location: str
    inputs: list[DimLabels]
    outputs: list[DimLabels]
    shapes: list[tuple[int, ...]]
    sizes: list[float]


def find_culprit(
    model: nn.Module,
    plan: PruningPlan,
    graph: ChannelGraph,
    example_inputs: Any,
    *,
    plugins: Plugins | None = None,
) -> Culprit | None:
    """Looks for what stands in the way of a plan: first by shapes, which need no arithmetic, then by what operations
    compute, in double precision where the network runs in it.

    :param model: dense; it is masked and cut on the way, and left as it was.
    :param plan: the plan that failed.
    :param graph: the channels that it was made for.
    :param example_inputs: as the model is called.
    :param plugins: where rules and facts come from; the installed plugins by default.
    :return: the groups to leave whole, or None where the cut model follows the masked one to the end.
    """
    fixed = _fixed_attribute(model, plan, graph, plugins)
    if fixed is not None:
        return fixed
    for inputs in check_inputs(example_inputs):
        try:
            found = _find_culprit(model, plan, graph, inputs, plugins, None)
            if found is not None:
                return found
            with in_double(model):
                return _find_culprit(model, plan, graph, tree_map(to_double, inputs), plugins, DOUBLE_TOLERANCE)
        except TraceError:  # the network insists on another shape, or on single precision
            continue
    return _find_culprit(model, plan, graph, example_inputs, plugins, SINGLE_TOLERANCE)


def _fixed_attribute(
    model: nn.Module, plan: PruningPlan, graph: ChannelGraph, plugins: Plugins | None
) -> Culprit | None:
    """An attribute that does not let itself be set, with all groups that it counts in modules of the same kind."""
    try:
        with for_a_while() as log:
            cut(log, model, plan, plugins=plugins)
    except FixedAttributeError as error:
        modules = dict(named_modules(model))
        kind = type(modules.get(error.module))
        alike = {name for name, module in modules.items() if type(module) is kind}
        counted = [f.groups for f in graph.attributes if f.attribute == error.attribute and f.module in alike]
        groups = {int(g) for groups in counted for g in groups if g >= 0} or {
            index
            for index, group in enumerate(graph.groups)
            if any(member.parameter.rpartition(".")[0] in alike for member in group.members)
        }
        reason = f"'{error.attribute}' of {kind.__name__} '{error.module}' cannot be set: {error.__cause__}"
        return Culprit(tuple(sorted(groups)), reason, "") if groups else None
    return None


def _find_culprit(
    model: nn.Module,
    plan: PruningPlan,
    graph: ChannelGraph,
    example_inputs: Any,
    plugins: Plugins | None,
    tolerance: float | None,
) -> Culprit | None:
    """
    :param tolerance: of the size of results, relative; None compares shapes alone.
    """
    rules = (plugins or default_plugins()).op_rules
    with masked(
        model, plan, example_inputs, plugins
    ):  # where values choose the path, the masked model takes the cut one's
        first = _Recorder(model, LabelSpace(), rules, None)
        first.run(example_inputs)
        removed, group_of_label = _fates(first.space, plan, graph)
        records = first.records
        if tolerance is not None:  # once more: now every label's fate is known
            second = _Recorder(model, LabelSpace(), rules, removed)
            second.run(example_inputs)
            records = second.records
    follower = _Follower(records, removed, tolerance)
    with for_a_while() as log:
        cut(log, model, plan, plugins=plugins)
        try:
            with evaluating(model, example_inputs), follower:
                call_model(model, example_inputs)
        except Exception as error:
            follower.note_failure(error)
    if follower.found is None:
        return None
    at, what = follower.found
    for record in reversed(records[: at + 1]):  # the operation, or the nearest one before it that loses channels
        groups = _touched(record, removed, group_of_label)
        if groups.size:
            if record is records[at]:  # the same line of the same kind of module fails everywhere
                alike = [
                    r for r in records if (r.name, r.location, r.kind) == (record.name, record.location, record.kind)
                ]
                groups = np.unique(np.concatenate([_touched(r, removed, group_of_label) for r in alike]))
            where = f" in '{record.module}'" if record.module else ""
            reason = f"{record.name}{where} does not follow a smaller width: {what}"
            reshapes = record is records[at] and record.name in _RESHAPES
            return Culprit(tuple(groups.tolist()), reason, record.location, reshapes)
    return None


def _touched(
    record: _Record, removed: npt.NDArray[np.bool_], group_of_label: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Groups that lose channels among what an operation reads and writes."""
    labels = [a for dims in (*record.inputs, *record.outputs) for a in dims if a is not None]
    touched = np.concatenate(labels) if labels else np.empty(0, np.int64)
    groups = np.unique(group_of_label[touched[removed[touched]]])
    return groups[groups >= 0]


def _fates(
    space: LabelSpace, plan: PruningPlan, graph: ChannelGraph
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which labels go, and which group each belongs to (-1: none)."""
    solution = space.solve()
    group_of_class = np.full(len(solution.pin), -1, np.int64)
    start = {(slot.parameter, slot.dim): slot.start for slot in space.slots}
    for index, group in enumerate(graph.groups):
        for member in group.members:
            group_of_class[solution.component[start[member.parameter, member.dim] + member.indices.ravel()]] = index
    return removed_labels(space, plan), group_of_class[solution.component]


class _Recorder(Tracer):  # type: ignore[no-untyped-call]
    """Notes every operation's labels and shapes and, once it is known what goes, the size of what is kept.

    It runs with arithmetic: results of another memory format would send torch other ways than the cut model's.

    :param removed: which labels go, shape ``[labels]``; None: not known yet, sizes are not noted.
    """

    def __init__(
        self,
        model: nn.Module,
        space: LabelSpace,
        rules: Mapping[str, Any],
        removed: npt.NDArray[np.bool_] | None,
    ) -> None:
        super().__init__(model, space, rules, shapes_only=False)
        self.records: list[_Record] = []
        self._removed = removed

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.inside_operation:  # the cut model's run sees the whole operation
            return super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [self.labels(leaf) for leaf in tensors_of((args, kwargs))]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        results = _results(out)
        self.records.append(
            _Record(
                str(func.overloadpacket),
                self.module,
                type(self.model.get_submodule(self.module)).__name__,
                user_location(1),
                inputs,
                [self.labels(tensor) for tensor in results],
                [tuple(tensor.shape) for tensor in results],
                [self._kept_size(tensor) for tensor in results] if self._removed is not None else [],
            )
        )
        return out

    def _kept_size(self, tensor: Tensor) -> float:
        assert self._removed is not None
        for dim, labels in enumerate(self.labels(tensor)):
            if labels is not None and self._removed[labels].any():
                keep = torch.from_numpy(np.flatnonzero(~self._removed[labels])).to(tensor.device)
                tensor = tensor.index_select(dim, keep)
        return _size(tensor)


def _results(out: Any) -> list[Tensor]:
    """What an operation passes on: of a tuple the first (the others are statistics, indices, sums for backward)."""
    if isinstance(out, tuple):
        out = out[:1]
    return tensors_of(out)


def _size(tensor: Tensor) -> float:
    """Sum of absolute values: what two runs of the same operation must agree on."""
    return float(tensor.detach().double().abs().sum()) if tensor.is_floating_point() else math.nan


class _Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the cut model beside the records and notes the first difference."""

    def __init__(self, records: Sequence[_Record], removed: npt.NDArray[np.bool_], tolerance: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._removed = removed
        self._tolerance = tolerance
        self._records = records
        self._at = 0
        self.found: tuple[int, str] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None:
            self._compare(func, _results(out))
            self._at += 1
        return out

    def note_failure(self, error: Exception) -> None:
        """The run ended early at the operation after the last one."""
        if self.found is None:
            what = f"{type(error).__name__}: {first_line(error)}"
            self.found = (min(self._at, len(self._records) - 1), what)

    def _compare(self, func: Any, tensors: Sequence[Tensor]) -> None:
        if self._at >= len(self._records):
            self.found = (len(self._records) - 1, "the network took another path")
            return
        record = self._records[self._at]
        expected = [self._kept_shape(shape, dims) for shape, dims in zip(record.shapes, record.outputs, strict=True)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if str(func.overloadpacket) != record.name:
            self.found = (self._at, f"the network took another path ({func.overloadpacket})")
        elif shapes != expected:
            self.found = (self._at, f"expected shape {expected[:1]}, got {shapes[:1]}")
        elif self._tolerance is not None and any(
            abs(_size(tensor) - size) > self._tolerance * max(size, 1e-6)
            for tensor, size in zip(tensors, record.sizes, strict=True)
            if not math.isnan(size) and not record.name.startswith("aten.empty")
        ):
            self.found = (self._at, "it computes something else on fewer channels")

    def _kept_shape(self, shape: Sequence[int], dims: DimLabels) -> tuple[int, ...]:
        return tuple(
            n if labels is None else n - int(self._removed[labels].sum()) for n, labels in zip(shape, dims, strict=True)
        )
