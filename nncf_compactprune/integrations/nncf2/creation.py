"""``create_compressed_model`` with NNCF 2.x's arguments in their order."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from torch import nn

from nncf_compactprune.algorithms import ChannelPruning, Context
from nncf_compactprune.config import CompressionConfig
from nncf_compactprune.controller import STATE_VERSION
from nncf_compactprune.controller import CompressionController as NativeController
from nncf_compactprune.controller import create_compressed_model as create_native
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.distributed import is_main_process, refuse_wrapped
from nncf_compactprune.host.nncf_hooks import write_graph
from nncf_compactprune.host.tensors import device_of
from nncf_compactprune.integrations.nncf2.checkpoints import Nncf2State, is_nncf2
from nncf_compactprune.integrations.nncf2.config import NNCFConfig, compression_config
from nncf_compactprune.integrations.nncf2.controller import CompressionController
from nncf_compactprune.integrations.nncf2.init_args import (
    BNAdaptationInitArgs,
    ModelEvaluationArgs,
    PTInitializingDataLoader,
    QuantizationRangeInitArgs,
    TrainingBatches,
    as_inputs,
    wrap_dataloader_for_init,
)
from nncf_compactprune.integrations.nncf2.loading import load_state
from nncf_compactprune.integrations.nncf2.ranking import ranking_training
from nncf_compactprune.plugins import default_plugins


def create_compressed_model(
    model: nn.Module,
    config: NNCFConfig | Mapping[str, Any],
    compression_state: Mapping[str, Any] | None = None,
    dummy_forward_fn: Callable[[nn.Module], Any] | None = None,
    wrap_inputs_fn: Callable[..., Any] | None = None,
    wrap_outputs_fn: Callable[..., Any] | None = None,
    dump_graphs: bool = True,
    *,
    resuming_state_dict: Mapping[str, Any] | None = None,
) -> tuple[CompressionController, nn.Module]:
    """Prepares a model for compression while it is trained; same arguments as in NNCF 2.x.

    The model is compressed in place and returned. Loaders come from :func:`register_default_init_args`.

    :param model: trained and dense, also where ``compression_state`` is given.
    :param config: the configuration. Keys of the training script's own are passed over.
    :param compression_state: what ``controller.get_compression_state()`` gave: masks are put back, a cut is made again.
        Load the weights after. That of NNCF 2.x is taken too; its masks come with the weights. A whole state dict,
        which NNCF 2.x also took here, is ``resuming_state_dict``.
    :param dummy_forward_fn: calls the model once; what it calls it with becomes the example input. Without it, that is
        built from ``input_info``, or taken from the registered loader.
    :param wrap_inputs_fn: not needed: nothing has to be marked as an input here.
    :param wrap_outputs_fn: as ``wrap_inputs_fn``.
    :param dump_graphs: write ``original_graph.dot`` and ``compressed_graph.dot`` into the configuration's ``log_dir``,
        or into the working directory.
    :param resuming_state_dict: weights to load at the end, masks among them.
    :return: controller and model.
    :raises ConfigError: every problem of the configuration at once.
    :raises CompactPruneError: what cannot be compressed as asked; the model is untouched.
    """
    refuse_wrapped(model)
    typed = compression_config(config)
    before: Nncf2State | None = None
    if compression_state is not None and is_nncf2(compression_state):
        before = Nncf2State.read(compression_state, [entry.algorithm for entry in typed.compression])
        compression_state = _begun(before, typed)
    elif compression_state is not None and "algorithms" not in compression_state:
        resuming_state_dict = _state_dict(compression_state, resuming_state_dict)
        compression_state = None
    loader = _loader(config)
    example = _example_inputs(model, typed, loader, dummy_forward_fn)
    logs = Path(config.get("log_dir") or os.curdir) if dump_graphs and is_main_process() else None
    if logs is not None:
        shown = example if example is not None else typed.example_inputs(device_of(model))
        _dump(model, shown, logs / "original_graph.dot")
    if not typed.compression:
        example = typed.example_inputs(device_of(model)) if example is None else example
        native = NativeController(Context(model, example, default_plugins()), [])
    else:
        batches = None if loader is None else TrainingBatches(loader, model)
        shared = ranking_training(config)
        native, model = create_native(model, typed, batches, compression_state, example_inputs=example, shared=shared)
    evaluate = None
    if isinstance(config, NNCFConfig) and config.has_extra_struct(ModelEvaluationArgs):
        evaluate = config.get_extra_struct(ModelEvaluationArgs).eval_fn
    controller = CompressionController(native, evaluate, before)
    if resuming_state_dict is not None:
        load_state(model, resuming_state_dict, is_resume=True)
    if logs is not None:
        _dump(model, native.example_inputs, logs / "compressed_graph.dot")
    return controller, model


def _begun(before: Nncf2State, config: CompressionConfig) -> dict[str, Any]:
    """The state of a run that is as far as one of NNCF 2.x was, and waits for its masks."""
    kinds: list[Any] = [default_plugins().get_algorithm(entry.algorithm) for entry in config.compression]
    return {
        "version": STATE_VERSION,
        "scheduler": {"current_epoch": before.epoch, "current_step": before.step},
        "algorithms": [
            {"name": kind.name, "state": kind.state_before() if issubclass(kind, ChannelPruning) else None}
            for kind in sorted(kinds, key=lambda kind: kind.begins)
        ],
    }


def _state_dict(state: Mapping[str, Any], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """NNCF 2.x took a state dict in place of a compression state."""
    found = state.get("state_dict", state)
    if given is not None or not all(isinstance(value, torch.Tensor) for value in found.values()):
        msg = f"compression_state: expected what get_compression_state() gave, got keys {sorted(map(str, state))[:5]}."
        raise CompactPruneError(msg)
    return found  # type: ignore[no-any-return]


def _loader(config: Mapping[str, Any]) -> PTInitializingDataLoader | None:
    """The registered loader: that for BatchNorm adaptation, else that for quantizer ranges."""
    if isinstance(config, NNCFConfig):
        for kind in (BNAdaptationInitArgs, QuantizationRangeInitArgs):
            if config.has_extra_struct(kind):
                return wrap_dataloader_for_init(config.get_extra_struct(kind).data_loader)
    return None


def _example_inputs(
    model: nn.Module,
    config: CompressionConfig,
    loader: PTInitializingDataLoader | None,
    dummy_forward_fn: Callable[[nn.Module], Any] | None,
) -> Any:
    """What the model is traced with; None where ``input_info`` says it."""
    if dummy_forward_fn is not None:
        return _inputs_of(model, dummy_forward_fn)
    if config.input_info:
        return None
    if loader is None:
        msg = (
            'expected to be told what the model is called with. Give "input_info" in the configuration, '
            "register a loader with register_default_init_args, or pass dummy_forward_fn."
        )
        raise CompactPruneError(msg)
    inputs, _ = next(iter(TrainingBatches(loader, model)))
    return inputs


def _inputs_of(model: nn.Module, dummy_forward_fn: Callable[[nn.Module], Any]) -> Any:
    """What the function calls the model with the first time."""
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(copy.deepcopy(as_inputs(module, args, kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(model):
            dummy_forward_fn(model)
    finally:
        handle.remove()
    if not seen:
        msg = (
            "dummy_forward_fn: expected it to call the model that it is given, model(...), and it did not. "
            'Give "input_info" instead, or call the model itself.'
        )
        raise CompactPruneError(msg)
    return seen[0]


def _dump(model: nn.Module, example: Any, path: Path) -> None:
    """Writes NNCF's graph of the model; a picture is an extra, so a failure is only told."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with evaluating(model):
            write_graph(model, example, path)
    except Exception as error:  # whatever NNCF's graph builder meets in a foreign model
        nncf_logger.warning("%s was not written: %s", path, error)
