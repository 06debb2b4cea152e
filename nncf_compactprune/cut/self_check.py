"""The proof of a cut: the compact model computes what the masked one computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.cut.inside import Inside, Probe
from nncf_compactprune.cut.masked_model import masked
from nncf_compactprune.cut.surgery import cut
from nncf_compactprune.cut.transaction import Transaction, for_a_while, transaction
from nncf_compactprune.cut.trials import Trial, trials
from nncf_compactprune.errors import SelfCheckError, first_line, shortened
from nncf_compactprune.host.calls import outputs
from nncf_compactprune.host.marks import written_arguments
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.host.tensors import model_tensors
from nncf_compactprune.host.torch_internals import TorchDispatchMode, tensors_of, tree_map
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins

SELF_CHECK_TOLERANCE = 1e-5
PROBE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SelfCheck:
    """Result of comparing the compact with the masked model.

    :param error: largest absolute difference over all outputs, relative to the largest absolute value of that output.
    :param dtype: the precision it was compared in.
    :param seconds: wall time of the extra forward passes.
    :param inside: the same for the outputs of the layers that were cut, each relative to its own largest value.
    :param worst: name of the layer where ``inside`` was found.
    :param compared: names of the cut layers that were compared.
    :param unseen: names of the cut layers that were not.
    :param silent: the outputs say nothing: there are none, or they hold one value only, which other inputs do not
        change.
    """

    error: float
    dtype: str
    seconds: float
    inside: float = 0.0
    worst: str = ""
    compared: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    silent: bool = False

    @property
    def is_proof(self) -> bool:
        """Whether something was compared that depends on every layer that was cut."""
        return not (self.silent and self.unseen)

    def __str__(self) -> str:
        layers = len(self.compared) + len(self.unseen)
        said = f"error {self.error:.0e} at the outputs"
        if self.silent:
            said = "the outputs say nothing"
        text = f"{said}, {self.inside:.0e} inside ({len(self.compared)} of {layers} cut layers compared)"
        return text if self.is_proof else f"{text}; no proof: {shortened(self.unseen)} not compared"


def prune_in_place(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    optimizer: Optimizers | None = None,
    ema: object | None = None,
    plugins: Plugins | None = None,
    self_check: bool = True,
    dry_run: bool = False,
    within: Transaction | None = None,
) -> SelfCheck | None:
    """Cuts a model to a plan and proves that it computes what the masked model computed.

    The masked model is the dense one with every removed slice set to zero, consumers included (a BatchNorm shift would
    turn a zero channel into a constant otherwise). Where a LayerNorm over channels was cut by consent, the masked
    model takes its statistics over the kept channels.

    :param model: dense, cut in place.
    :param plan: what stays.
    :param example_inputs: what both are run on, in eval mode: its first two examples, at less resolution where that is
        large and the model takes it (see :func:`~nncf_compactprune.cut.trials.trials`).
    :param optimizer: one or several, whose per-parameter state is cut alike.
    :param ema: a module with the same parameter names, or a holder with a ``module`` attribute; cut alike.
    :param plugins: where facts of modules come from; the installed plugins by default.
    :param self_check: whether both models are run and compared.
    :param dry_run: put everything back after the check.
    :param within: the transaction that the cut is a part of; by default it is one of its own.
    :return: the comparison, or None without ``self_check``.
    :raises PlanError: the plan does not fit.
    :raises SelfCheckError: the cut model does not run or computes something else. The model, optimizer and EMA copy are
        bit for bit what they were.
    """
    plan.validate(model)
    with transaction() if within is None else nullcontext(within) as log:
        probe = Probe(model, plan) if self_check else None
        cut(log, model, plan, optimizer=optimizer, ema=ema, plugins=plugins)
        check = None if probe is None else _proven(log, model, plan, probe, example_inputs)
        if dry_run:
            log.rollback()
    if check is not None and not check.is_proof and not dry_run:
        nncf_logger.warning(
            "The self-check of %s proves nothing: its outputs are empty or constant on the example input, and cut "
            "layers could not be compared: %s. Give an example input for which its outputs are neither empty nor "
            "constant.",
            type(model).__name__,
            shortened(check.unseen),
        )
    return check


def _proven(log: Transaction, model: nn.Module, plan: PruningPlan, probe: Probe, example_inputs: Any) -> SelfCheck:
    """:raises SelfCheckError: the compact model does not run, or differs in double precision too."""
    started = time.perf_counter()
    trial, error, silent, inside = _compared(log, model, plan, probe, example_inputs)
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
    if not _agree(error, inside) and dtype != "float64":
        # rounding of many float32 layers, or a wrong cut? float64 tells them apart
        error, silent, inside = _compare(log, model, plan, probe, trial, double=True)
        dtype = "float64"
    if not _agree(error, inside):
        layer = f", by {inside.error:.1e} in '{inside.worst}'" if inside.error > PROBE_TOLERANCE else ""
        msg = (
            f"self-check: the pruned {type(model).__name__} differs from the masked one by {error:.1e} (largest "
            f"difference over largest output, {dtype}){layer}, expected at most {SELF_CHECK_TOLERANCE:.0e}. "
            "The model was restored. Please report the architecture; ignored_scopes can leave the layer out."
        )
        raise SelfCheckError(msg)
    seconds = probe.seconds + time.perf_counter() - started
    return SelfCheck(error, dtype, seconds, inside.error, inside.worst, inside.compared, inside.unseen, silent)


def _agree(error: float, inside: Inside) -> bool:
    return error <= SELF_CHECK_TOLERANCE and inside.error <= PROBE_TOLERANCE


def _compared(
    log: Transaction, model: nn.Module, plan: PruningPlan, probe: Probe, example_inputs: Any
) -> tuple[Trial, float, bool, Inside]:
    """The first of the trials that both models run, and the comparison."""
    failure: SelfCheckError | None = None
    for trial in trials(example_inputs):
        try:
            return trial, *_compare(log, model, plan, probe, trial)
        except SelfCheckError as error:
            failure = error
    assert failure is not None
    raise failure


def _compare(
    log: Transaction, model: nn.Module, plan: PruningPlan, probe: Probe, trial: Trial, *, double: bool = False
) -> tuple[float, bool, Inside]:
    """Both models as they are, and with noise inside.

    The compact model comes first: where its code does not let it shrink, it fails early, and the dense one need not
    run at all.

    :return: difference of the outputs, whether these say nothing, difference inside.
    """
    precision = in_double if double else nullcontext
    inputs = tree_map(to_double, trial.inputs) if double else trial.inputs
    while True:
        with precision(model):
            compact, compact_failed = _runs(model, inputs, "after the cut", probe.compact, trial)
        log.rollback()
        try:
            with masked(model, plan, trial.inputs), precision(model):
                expected, masked_failed = _runs(model, inputs, "with masks", probe.masked, trial)
                silent = _says_nothing(expected) and not _changes(expected, model, inputs, trial)
        finally:
            log.replay()
        if compact_failed is not None and masked_failed is None:
            raise compact_failed
        if not probe.to_be_repeated:
            return _difference(expected, compact, plan.output_classes), silent, probe.result()


def _runs(
    model: nn.Module, inputs: Any, when: str, probe: Callable[..., AbstractContextManager[None]], trial: Trial
) -> tuple[list[Tensor], SelfCheckError | None]:
    """Runs a model, the probe looking.

    A detector may fail on the boxes that it finds in noise: what came before is compared all the same.

    :return: the outputs without noise, and the failure of a second run, with noise, where one was needed.
    """
    if trial.in_pairs:
        with probe(in_pairs=True):
            return [_first(out) for out in _run(model, inputs, when)], None
    outputs = _run(model, inputs, when)
    try:
        with probe(in_pairs=False):
            _run(model, inputs, when)
    except SelfCheckError as error:
        return outputs, error
    return outputs, None


def _first(out: Tensor) -> Tensor:
    """What belongs to the first of two examples; all where that cannot be told."""
    return out if out.dim() == 0 or len(out) % 2 else out[: len(out) // 2]


def _says_nothing(outputs: Sequence[Tensor]) -> bool:
    """Whether no output holds more than one value."""
    return not any(out.numel() > 1 and bool((out != out.reshape(-1)[0]).any()) for out in outputs)


def _changes(outputs: Sequence[Tensor], model: nn.Module, inputs: Any, trial: Trial) -> bool:
    """Whether other inputs change the one number that a network answers with, as a regressor does."""
    if not any(out.numel() for out in outputs):
        return False
    try:
        others = _run(model, tree_map(_another, inputs), "on other inputs")
    except SelfCheckError:
        return False
    if trial.in_pairs:
        others = [_first(out) for out in others]
    return _difference(outputs, others, ()) > SELF_CHECK_TOLERANCE


def _another(leaf: Any) -> Any:
    """A tensor of other values of the same kind, such that no norm and no mean hides the change. Masks stay masks."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    if leaf.is_floating_point():
        return leaf.roll(1, -1) / 2
    if leaf.dtype == torch.bool or leaf.is_complex() or len(set(leaf.flatten().tolist())) <= 2:
        return leaf.roll(1, -1)
    return leaf.max() + leaf.min() - leaf


def _run(model: nn.Module, example_inputs: Any, when: str) -> list[Tensor]:
    try:
        return [tensor for tensor in outputs(model, example_inputs) if tensor.is_floating_point()]
    except Exception as error:
        msg = (
            f"self-check: {type(model).__name__} does not run {when}: {type(error).__name__}: "
            f"{first_line(error)}. The model was restored."
        )
        raise SelfCheckError(msg) from error


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """The model in double precision, and what its code makes, too; its tensors are back afterwards, bit for bit."""
    with for_a_while() as log:
        for _, tensor in model_tensors(model).named():
            if tensor.is_floating_point():
                log.set_data(tensor, tensor.data.double())
        with _NothingSingle():  # type: ignore[no-untyped-call]
            yield


class _NothingSingle(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Code that asks for float32 (a grid of positions, ``.float()``) gets float64; where an operation meets both, as
    with a constant of the code, the float32 one is converted."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        kinds = {tensor.dtype for tensor in tensors_of((args, kwargs))}
        if {torch.float32, torch.float64} <= kinds and not written_arguments(func):
            args, kwargs = tree_map(to_double, args), tree_map(to_double, kwargs)
        return func(*args, **kwargs)


def to_double(leaf: Any) -> Any:
    """A floating tensor in double precision; anything else as it is."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor], classes: Sequence[int]) -> float:
    """Largest difference over all outputs, each relative to its largest absolute value; inf where shapes differ.

    :param classes: what a cut classifier still tells apart: those of the expected scores are compared.
    """
    worst = 0.0
    if len(expected) != len(actual):
        return math.inf
    for a, b in zip(expected, actual, strict=True):
        if classes and a.shape != b.shape and a.dim() > 1 and a.shape[1] > max(classes):
            a = a[:, list(classes)]
        if a.shape != b.shape:
            return math.inf
        if a.numel() == 0:
            continue
        if not torch.isfinite(a).all():
            msg = "self-check: the model's outputs are not finite on the example input, so nothing can be compared."
            raise SelfCheckError(msg)
        scale = float(a.abs().max()) or 1.0
        error = float((a.double() - b.double()).abs().max()) / scale
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst
