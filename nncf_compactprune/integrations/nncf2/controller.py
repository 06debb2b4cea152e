"""The controller of NNCF 2.x over the native one: the same calls, on a network that really becomes smaller."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn

from nncf_compactprune.algorithms import CompressionAlgorithm, CompressionStage
from nncf_compactprune.controller import CompressionController as NativeController
from nncf_compactprune.controller import Scheduler, Statistics
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.export import ExportedFile, ExportOptions, export_model
from nncf_compactprune.export.formats import export_formats
from nncf_compactprune.export.options import OpsetError
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.optimizers import Optimizers
from nncf_compactprune.host.torch_internals import results_of, tensors_of
from nncf_compactprune.integrations.nncf2.checkpoints import Nncf2State

NO_COMPRESSION = "NoCompressionAlgorithm"


class CompressionLoss:
    """What the compression adds to the task's loss. Call it.

    :param compute: gives the loss.
    """

    def __init__(self, compute: Callable[[], Tensor | float]) -> None:
        self._compute = compute

    def calculate(self) -> Tensor:
        """The loss now, a scalar."""
        value = self._compute()
        return value if isinstance(value, Tensor) else torch.tensor(float(value))

    def __call__(self) -> Tensor:
        return self.calculate()

    def get_state(self) -> None:
        """It has no state of its own."""

    def load_state(self, state: Any) -> None:
        """It has no state of its own."""


class _Controller:
    """What a controller of all algorithms and one of a single algorithm share."""

    def __init__(self, native: NativeController, compute_loss: Callable[[], Tensor | float]) -> None:
        self._native = native
        self._loss = CompressionLoss(compute_loss)

    @property
    def model(self) -> nn.Module:
        """The model under compression."""
        return self._native.model

    @property
    def loss(self) -> CompressionLoss:
        """What to add to the task's loss: ``controller.loss()``."""
        return self._loss

    @property
    def scheduler(self) -> Scheduler:
        """Steps all algorithms: ``epoch_step()`` before every epoch, ``step()`` before every training step."""
        return self._native.scheduler

    def distributed(self) -> None:
        """Nothing needs preparing for distributed training: all ranks decide alike."""


class ChildController(_Controller):
    """One algorithm of a list.

    :param native: the controller of all.
    :param algorithm: the one.
    """

    def __init__(self, native: NativeController, algorithm: CompressionAlgorithm) -> None:
        super().__init__(native, algorithm.loss)
        self.algorithm = algorithm

    @property
    def name(self) -> str:
        """The algorithm's name."""
        return self.algorithm.name

    @property
    def compression_rate(self) -> float:
        """Share removed now, in [0, 1)."""
        return self.algorithm.compression_rate

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        self.algorithm.compression_rate = value

    @property
    def maximal_compression_rate(self) -> float:
        """The largest rate that can be set."""
        return self.algorithm.maximal_compression_rate

    def compression_stage(self) -> CompressionStage:
        """How far the algorithm is."""
        return self.algorithm.stage()

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """The algorithm's figures.

        :param quickly_collected_only: all figures here are quick; nothing changes.
        """
        return Statistics({self.name: self.algorithm.statistics()})

    def disable_scheduler(self) -> None:
        """The algorithm's schedule ends."""
        self.algorithm.disable_scheduler()


#: by the identity of the model, as long as somebody holds the controller
_AT_WORK: WeakValueDictionary[int, CompressionController] = WeakValueDictionary()


def controller_of(model: nn.Module) -> CompressionController | None:
    """The controller that compresses a model, if it still exists.

    :param model: as :func:`create_compressed_model` returned it.
    """
    found = _AT_WORK.get(id(model))
    return found if found is not None and found.model is model else None


class CompressionController(_Controller):
    """Drives the compression of one model, with NNCF 2.x's calls. :func:`create_compressed_model` makes it.

    :param native: what does the work.
    :param evaluate: gives a model's metric, for :meth:`uncompressed_accuracy`; None where none was registered.
    :param from_nncf2: where the run of NNCF 2.x was that this one continues, or None.
    """

    def __init__(
        self,
        native: NativeController,
        evaluate: Callable[[nn.Module], float] | None = None,
        from_nncf2: Nncf2State | None = None,
    ) -> None:
        super().__init__(native, native.loss)
        self.from_nncf2 = from_nncf2
        self._evaluate = evaluate
        _AT_WORK[id(native.model)] = self

    @property
    def name(self) -> str:
        """The algorithms' names."""
        return "_".join(algorithm.name for algorithm in self._native.algorithms) or NO_COMPRESSION

    @property
    def child_ctrls(self) -> list[ChildController]:
        """One controller for every algorithm, in the order in which they act."""
        return [ChildController(self._native, algorithm) for algorithm in self._native.algorithms]

    @property
    def algorithms(self) -> Sequence[CompressionAlgorithm]:
        """The algorithms themselves."""
        return self._native.algorithms

    @property
    def started(self) -> Sequence[CompressionAlgorithm]:
        """The algorithms that have begun. One that needs the cut network begins with the cut, which may be last."""
        return self._native.started

    def attach(self, *, optimizer: Optimizers | None = None, ema: object | None = None) -> None:
        """Lets the model shrink while it trains, which NNCF 2.x did not have: see the native controller's method.

        :param optimizer: of the model's parameters.
        :param ema: a shadow copy of the model.
        """
        self._native.attach(optimizer=optimizer, ema=ema)

    def compression_stage(self) -> CompressionStage:
        """How far the compression is, over the algorithms that have begun."""
        stages = {algorithm.stage() for algorithm in self.started} or {CompressionStage.UNCOMPRESSED}
        return stages.pop() if len(stages) == 1 else CompressionStage.PARTIALLY_COMPRESSED

    @property
    def compression_rate(self) -> float:
        """Share removed now, in [0, 1)."""
        return self._native.compression_rate

    @compression_rate.setter
    def compression_rate(self, value: float) -> None:
        self._native.compression_rate = value

    @property
    def maximal_compression_rate(self) -> float:
        """The largest rate that can be set."""
        return self._native.maximal_compression_rate

    def disable_scheduler(self) -> None:
        """The schedules end: the rate that is set is the target."""
        self._native.disable_scheduler()

    def statistics(self, quickly_collected_only: bool = False) -> Statistics:
        """Figures of every algorithm.

        :param quickly_collected_only: all figures here are quick; nothing changes.
        """
        return self._native.statistics()

    def get_compression_state(self) -> dict[str, Any]:
        """What :func:`create_compressed_model` takes as ``compression_state``. Save it beside the weights."""
        return self._native.get_compression_state()

    def get_state(self) -> dict[str, Any]:
        """The same as :meth:`get_compression_state`."""
        return self.get_compression_state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to an earlier state, in place; load the weights after.

        :param state: what :meth:`get_compression_state` gave.
        :raises CompactPruneError: the model is cut, and the state is another one.
        """
        self._native.load_state(state)

    def uncompressed_accuracy(self) -> float:
        """The accuracy of the model as it came, by the registered ``model_eval_fn``. Masks are lifted for it.

        :raises CompactPruneError: none was registered, or the model is cut or trained already.
        """
        started = self._native.scheduler.current_step >= 0 or self._native.scheduler.current_epoch >= 0
        if self._evaluate is None or started:
            reason = "no model_eval_fn was registered" if self._evaluate is None else "the model was trained already"
            msg = f"accuracy-aware training: expected uncompressed_model_accuracy, as {reason}. Measure it before."
            raise CompactPruneError(msg)
        with torch.no_grad():
            if self.compression_rate == 0:
                return float(self._evaluate(self.model))
            state = self._native.get_compression_state()
            self._native.compression_rate = 0.0
            try:
                return float(self._evaluate(self.model))
            finally:
                self._native.load_state(state)

    def prepare_for_export(self) -> None:
        """Cuts what is still masked and takes all hooks off, in place: ``model`` is the small network then."""
        self._native.strip()

    def strip(self, do_copy: bool = True, strip_format: Any = None) -> nn.Module:
        """The small network.

        :param do_copy: leave the model under compression as it is, masks and all, and cut a copy; else cut it in place.
        :param strip_format: not read: quantizers stay what NNCF 3 makes of them.
        """
        return self._copy().strip() if do_copy else self._native.strip()

    def strip_model(self, model: nn.Module, do_copy: bool = False) -> nn.Module:
        """The small network.

        :param model: the model under compression.
        :param do_copy: cut a copy.
        :raises CompactPruneError: it is another model.
        """
        if model is not self.model:
            msg = "strip_model: expected the model of this controller. Pass what create_compressed_model returned."
            raise CompactPruneError(msg)
        return self.strip(do_copy)

    def export_model(
        self,
        save_path: str | Path,
        save_format: str | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> list[ExportedFile]:
        """Writes the small network, reopens the file in its runtime and compares. The model under compression stays as
        it is, so that training may go on.

        :param save_path: ends in ``.onnx``, ``.xml`` (OpenVINO IR) or as a plugin's format does; ``.onnx`` is added
            where ``save_format`` says ONNX.
        :param save_format: ``"onnx"``, ``"onnx_<opset>"`` or ``"openvino"``; default: by the path. Where the model
            cannot be written in that opset, a warning says so, and torch's exporter chooses it.
        :param input_names: default: ``input.0``, ``input.1``, ... as NNCF 2.x has them.
        :param output_names: default: ``output.0``, ``output.1``, ...
        :param model_args: positional arguments to append to the example input, and a dict of keyword arguments last.
        :raises ExportError: unknown format, or the file computes something else.
        :raises StorageError: the file cannot be written.
        """
        path, opset = _place_of(Path(save_path), save_format)
        small = self._copy()
        example = _with_more(small.example_inputs, model_args)
        model = small.strip()
        with evaluating(model):
            outputs = results_of(call_model(model, example))
        names: dict[str, Any] = {
            "input_names": input_names or [f"input.{at}" for at in range(len(tensors_of(example)))],
            "output_names": output_names or [f"output.{at}" for at in range(len(outputs))],
        }
        try:
            options = ExportOptions(opset=opset)
            return export_model(model, example, path, **names, options=options, plugins=small.plugins)
        except OpsetError as error:
            nncf_logger.warning("export_model: %s torch's exporter chooses the opset instead of %s.", error, opset)
            return export_model(model, example, path, **names, plugins=small.plugins)

    def _copy(self) -> NativeController:
        """A controller of a copy of the model; loader, plugins and optimizer are not copied."""
        return self._native.copied()


def _place_of(path: Path, save_format: str | None) -> tuple[Path, int | None]:
    """The path with its ending, and the opset of ``"onnx_<opset>"``."""
    numbered = re.fullmatch(r"onnx_(\d+)", save_format or "")
    name, opset = ("onnx", int(numbered[1])) if numbered else (save_format, None)
    known = {one.name: one.suffix for one in export_formats().values()}
    known["ir"] = known["openvino"]
    if name and name not in known:
        said = f"{', '.join(sorted(known))} or onnx_<opset>"
        msg = f"export_model: save_format: expected one of {said}, got '{save_format}'."
        raise CompactPruneError(msg)
    wanted = known.get(name or "", ".onnx")
    if path.suffix == wanted or (not name and path.suffix in known.values()):
        return path, opset
    return path.with_name(path.name + wanted), opset


def _with_more(example: Any, model_args: tuple[Any, ...] | None) -> Any:
    if not model_args:
        return example
    *positional, keywords = model_args if isinstance(model_args[-1], Mapping) else (*model_args, {})
    if isinstance(example, Mapping):
        return {**example, **keywords}
    if keywords:
        msg = "export_model: model_args: expected positional arguments only, as the example input is positional."
        raise CompactPruneError(msg)
    return (*(example if isinstance(example, (tuple, list)) else (example,)), *positional)


def tensorboard_figures(statistics: Statistics) -> dict[str, float]:
    """The numbers among the statistics, by ``algorithm/figure``: what NNCF 2.x's ``prepare_for_tensorboard`` gave.

    :param statistics: of a controller.
    """
    return {
        f"{name}/{figure.replace(' ', '_')}": float(value)
        for name, figures in statistics.algorithms.items()
        for figure, value in figures.items()
        if isinstance(value, (int, float))
    }
