"""From a config to a report: what ``nncf-compactprune run`` does, in order, and how its results are read back.

A run writes into one directory::

    config.json         the config it ran with
    dense.safetensors   weights before pruning
    plan.json           what was removed
    model.safetensors   weights after fine-tuning; with config and plan, the checkpoint
    dense/, pruned/     ONNX and OpenVINO files of both
    report.json, report.md, widths.png
    snapshots/          while it runs: the last two epochs; a run that was killed goes on from there
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nncf_compactprune.algorithms import ChannelPruningConfig
from nncf_compactprune.algorithms.channel_pruning import ChannelPruning
from nncf_compactprune.channels import trace
from nncf_compactprune.config import CompressionConfig, InputInfo, load_config, read_document
from nncf_compactprune.controller import CompressionController, create_compressed_model
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import ConfigError, Problem, ResolveError
from nncf_compactprune.export import ExportedFile, export_model, measure_latency
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.plan import PruningPlan, make_plan
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.report import Comparison, NetworkFigures, plot_widths, to_json, to_markdown
from nncf_compactprune.run.datasets import ResolvedDataset, only_classes, resolve_dataset
from nncf_compactprune.run.models import (
    ExampleInputs,
    ResolvedModel,
    load_weights,
    resolve_model,
    save_weights,
)
from nncf_compactprune.run.training import EpochRecord, RunConfig, class_scores, evaluate, fit, unread_key_warnings
from nncf_compactprune.storage.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_pruned, save_pruned
from nncf_compactprune.storage.plan_file import PLAN_FILE
from nncf_compactprune.storage.snapshots import Snapshot, Snapshots
from nncf_compactprune.storage.writing import write_whole
from nncf_compactprune.version import __version__

Say = Callable[[str], None]

DENSE_FILE = "dense.safetensors"
SNAPSHOTS = "snapshots"
RESULTS = (DENSE_FILE, PLAN_FILE, WEIGHTS_FILE, "report.json", "report.md", "widths.png")
DENSE, FINE_TUNING = 0, 1  # the phases of a run


@dataclass(frozen=True)
class Settings:
    """A config as a run reads it.

    :param source: its name, for messages.
    :param document: the config as plain JSON data, overrides included.
    :param compression: its part for the algorithms.
    :param run: its part for the training script.
    """

    source: str
    document: Mapping[str, Any]
    compression: CompressionConfig
    run: RunConfig


@dataclass(frozen=True)
class RunOutcome:
    """What a run came to.

    :param comparison: dense and pruned figures.
    :param plan: what was removed.
    :param directory: where the artefacts are.
    """

    comparison: Comparison
    plan: PruningPlan
    directory: Path


def read_settings(
    source: str | PathLike[str], overrides: Mapping[str, Any] | None = None, plugins: Plugins | None = None
) -> Settings:
    """Reads and validates a config file.

    :param overrides: values by dotted path, such as ``{"epochs": 3, "compression.budget.macs": 0.4}``.
    :raises ConfigError: with all problems of the compression part, or all of the training part.
    """
    document = read_document(source, overrides)
    compression = load_config(document, plugins)
    return Settings(document.name, document.data, compression, RunConfig.from_config(compression, document.name))


def run(
    source: str | PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    say: Say = print,
    plugins: Plugins | None = None,
) -> RunOutcome:
    """Builds or loads the dense model, prunes and fine-tunes it, exports both, compares them and writes the report.

    A run that was killed is continued by running the same config again: every epoch leaves a snapshot.

    :param source: a config file.
    :param overrides: see :func:`read_settings`.
    :param say: is given one line for every step.
    :raises CompactPruneError: as soon as anything is found wrong; what can be checked is checked before any training.
    """
    plugins = plugins or default_plugins()
    settings = read_settings(source, overrides, plugins)
    config = settings.run
    for warning in unread_key_warnings(settings.document):
        say(f"Warning: {warning}")
    directory = Path(config.output_dir)
    torch.manual_seed(config.seed)
    dataset = None
    if config.dataset is None:
        _check_without_data(settings)
    else:
        dataset = resolve_dataset(config.dataset, config.dataset_options, plugins)
        settings = _with_input_info(settings, dataset)
    resolved = resolve_model(
        config.model,
        sample_size=settings.compression.input_info[0].sample_size if dataset is None else (1, *dataset.input_shape),
        options=config.model_options,
        weights=config.weights,
        plugins=plugins,
    )
    example = resolved.example_inputs
    if dataset is not None:
        dataset = _normalised_for(resolved, dataset)
        example = _real_example(resolved, dataset)
        _check_classes(resolved, example, dataset)
    for warning in _late_schedules(settings):
        say(f"Warning: {warning}")
    history: list[dict[str, Any]] = []
    snapshots = Snapshots(directory / SNAPSHOTS, _identity(settings), history)
    found = snapshots.newest()
    if found is not None:
        say(f"Going on from {found.path}")
        history += found.facts["history"]
    else:
        _remove_old_results(directory, say)
    # The first file written also tells whether the directory can be written, before hours of training.
    write_whole(directory / CONFIG_FILE, (json.dumps(settings.document, indent=2) + "\n").encode())
    if found is None or found.phase == DENSE:
        _pretrain(resolved.model, dataset, settings, example, plugins, say, snapshots, found)
        save_weights(resolved.model, directory / DENSE_FILE)
    else:
        load_weights(resolved.model, directory / DENSE_FILE)
    resume = found if found is not None and found.phase == FINE_TUNING else None
    dense = copy.deepcopy(resolved.model)
    dense_accuracy = _accuracy(dense, dataset, config, "Dense", say)

    controller, model = create_compressed_model(
        resolved.model,
        settings.compression,
        None if dataset is None else _SameBatches(dataset, config),
        compression_state=None if resume is None else resume.facts["compression"],
        example_inputs=example,
        plugins=plugins,
    )
    classes = _subtask(model)
    if classes and dataset is not None:  # labels are counted anew from here on
        dataset = only_classes(dataset, classes)
        dense_accuracy = evaluate(_Scores(dense, classes), dataset.test_loader(config.batch_size))
        say(f"Classes {', '.join(dataset.class_names)}: dense test accuracy among them {dense_accuracy:.2%}")
    _fine_tune(controller, model, dataset, config, say, snapshots, resume)
    model = controller.strip()
    plan = plan_of(model) or _plan_of_whole(dense, example, settings, plugins)
    if carries_hooks(model):
        say("Quantized: the exported files hold the network; a checkpoint of weights and plan cannot, none is written")
    else:
        save_pruned(model, directory, config=settings.document)
    accuracy = _accuracy(model, dataset, config, "Compressed" if carries_hooks(model) else "Pruned", say)

    say("Exporting and verifying")
    networks = {"dense": dense, "pruned": model}
    files = {name: _export(network, example, directory / name, config) for name, network in networks.items()}
    latency = _latency(files, example)
    comparison = Comparison(
        _figures(plan.before.macs, plan.before.params, dense_accuracy, files["dense"], latency["dense"]),
        _figures(plan.after.macs, plan.after.params, accuracy, files["pruned"], latency["pruned"]),
    )
    checks = [algorithm.self_check for algorithm in controller.algorithms if isinstance(algorithm, ChannelPruning)]
    _write_report(directory, settings, comparison, plan, files, history, [str(c) for c in checks if c is not None])
    snapshots.remove()
    return RunOutcome(comparison, plan, directory)


def _late_schedules(settings: Settings) -> list[str]:
    """One sentence for every pruning schedule that leaves no epoch to fine-tune the network it ends with."""
    epochs, warnings = settings.run.epochs, []
    for entry in settings.compression.compression:
        if settings.run.dataset is None or not isinstance(entry, ChannelPruningConfig):
            continue
        params = entry.params
        steps = 0 if params.schedule == "one_shot" else params.pruning_steps
        needed = params.num_init_steps + steps + 1
        if (steps or params.num_init_steps) and epochs < needed:
            warnings.append(
                f"'{entry.algorithm}' cuts to its budget in epoch {needed}, but training ends after epoch {epochs}. "
                f"What is left is then cut without fine-tuning. Set epochs to {needed} or more, or lower pruning_steps "
                "or num_init_steps."
            )
    return warnings


def _remove_old_results(directory: Path, say: Say) -> None:
    """Removes what an earlier run wrote here, so that no old file stands beside a new one. Other files stay."""
    exported = (path for network in ("dense", "pruned") for path in sorted((directory / network).glob("model*")))
    files = [directory / name for name in RESULTS]
    old = [path for path in (*files, *exported) if path.is_file()]
    if old:
        say(f"Removing {len(old)} files of an earlier run from {directory}")
    for path in old:
        path.unlink()


def _subtask(model: nn.Module) -> tuple[int, ...]:
    """The classes that a cut classifier still knows; empty where it knows all."""
    plan = plan_of(model)
    return plan.output_classes if plan is not None else ()


class _Scores(nn.Module):
    """A classifier's scores of some classes only."""

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model, self.classes = model, list(classes)

    def forward(self, *args: Any) -> torch.Tensor:
        return class_scores(self.model(*args))[:, self.classes]


def load_run(directory: str | PathLike[str], plugins: Plugins | None = None) -> ResolvedModel:
    """Rebuilds the pruned model of a run: the dense architecture from its config, cut to its plan, with its weights.

    :param directory: what a run wrote.
    :raises CompactPruneError: if a file is missing, or config, plan and weights do not belong together.
    """
    folder = Path(directory)
    missing = [name for name in (CONFIG_FILE, PLAN_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        msg = f"{folder} is no directory of a finished run: {', '.join(missing)} not found there."
        raise ResolveError(msg)
    settings = read_settings(folder / CONFIG_FILE, plugins=plugins)
    resolved = resolve_model(
        settings.run.model,
        sample_size=settings.compression.input_info[0].sample_size if settings.compression.input_info else None,
        options=settings.run.model_options,
        plugins=plugins,
    )
    load_pruned(resolved.model, folder, example_inputs=resolved.example_inputs, plugins=plugins)
    return resolved


def _check_without_data(settings: Settings) -> None:
    """Without a dataset nothing can be trained, and nothing else says what the input looks like.

    :raises ConfigError: with everything that a dataset would be needed for.
    """
    config, problems = settings.run, []
    if config.weights is None:
        problems.append(Problem("weights", "missing. Without a dataset, name a file of trained weights."))
    for key in ("epochs", "pretrain_epochs"):
        if getattr(config, key):
            message = f"expected 0 without a dataset, got {getattr(config, key)}. Nothing can be trained."
            problems.append(Problem(key, message))
    if not settings.compression.input_info:
        message = 'missing. Without a dataset, give an object such as {"sample_size": [1, 3, 32, 32]}.'
        problems.append(Problem("input_info", message))
    if problems:
        raise ConfigError(settings.source, problems)


def _accuracy(
    model: nn.Module, dataset: ResolvedDataset | None, config: RunConfig, which: str, say: Say
) -> float | None:
    if dataset is None:
        return None
    accuracy = evaluate(model, dataset.test_loader(config.batch_size))
    say(f"{which}: test accuracy {accuracy:.2%}")
    return accuracy


def _plan_of_whole(dense: nn.Module, example: ExampleInputs, settings: Settings, plugins: Plugins) -> PruningPlan:
    """The plan of a run that removed no channels (quantization, sparsity): everything stays."""
    graph = trace(dense, example, plugins=plugins)
    algorithms = ", ".join(entry.algorithm for entry in settings.compression.compression)
    return make_plan(graph, [np.ones(group.size, bool) for group in graph.groups], algorithm=algorithms)


def _with_input_info(settings: Settings, dataset: ResolvedDataset) -> Settings:
    """States the input's shape in the config, so that the checkpoint does not need the dataset; checks it if stated."""
    expected = list(dataset.input_shape)
    given = settings.compression.input_info
    if any(info.sample_size[1:] != expected for info in given):
        message = f"expected [n, {', '.join(map(str, expected))}], the shape of '{dataset.name}' images"
        message += f", got {given[0].sample_size}. Leave input_info out to take the dataset's."
        raise ConfigError(settings.source, [Problem("input_info.sample_size", message)])
    if given:
        return settings
    sample_size = [1, *expected]
    return replace(
        settings,
        document={**settings.document, "input_info": {"sample_size": sample_size}},
        compression=settings.compression.model_copy(update={"input_info": [InputInfo(sample_size=sample_size)]}),
    )


def _normalised_for(resolved: ResolvedModel, dataset: ResolvedDataset) -> ResolvedDataset:
    """The dataset with the mean and std that the model states, where the dataset leaves them to it."""
    if not dataset.model_normalises or resolved.mean is None or resolved.std is None:
        return dataset
    return replace(dataset, mean=resolved.mean, std=resolved.std)


def _real_example(resolved: ResolvedModel, dataset: ResolvedDataset) -> ExampleInputs:
    """The first test image, in the model's own kind of container: self-checks and exports are compared on real data."""
    images, _ = next(iter(dataset.test_loader(1)))
    if isinstance(resolved.example_inputs, dict):
        return dict.fromkeys(resolved.example_inputs, images)
    return images if isinstance(resolved.example_inputs, torch.Tensor) else (images,)


def _check_classes(resolved: ResolvedModel, example: ExampleInputs, dataset: ResolvedDataset) -> None:
    try:
        with evaluating(resolved.model):
            scores = class_scores(call_model(resolved.model, example))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        msg = (
            f"Model '{resolved.name}' does not run on images of '{dataset.name}', {list(dataset.input_shape)}: {error}"
        )
        raise ResolveError(msg) from error
    classes = len(dataset.class_names)
    if scores.shape != (1, classes):
        msg = f"Model '{resolved.name}' gives an output of shape {list(scores.shape)}, but '{dataset.name}' has "
        msg += f'{classes} classes. Set model_options, such as {{"num_classes": {classes}}}.'
        raise ResolveError(msg)


def _pretrain(
    model: nn.Module,
    dataset: ResolvedDataset | None,
    settings: Settings,
    example: ExampleInputs,
    plugins: Plugins,
    say: Say,
    snapshots: Snapshots,
    resume: Snapshot | None,
) -> None:
    config = settings.run
    if config.weights is not None or dataset is None:
        return
    if not config.pretrain_epochs:
        say("Warning: neither weights nor pretrain_epochs are given: the dense model is untrained.")
        return
    loader = dataset.train_loader(config.batch_size, seed=config.seed)
    # A budget out of reach or a scope without a match shows on the untrained model too, before the training.
    say("Trying the compression on a copy of the untrained model")
    create_compressed_model(copy.deepcopy(model), settings.compression, loader, example_inputs=example, plugins=plugins)
    say(f"Training the dense model for {config.pretrain_epochs} epochs")
    fit(
        model,
        dataset.train_loader(config.batch_size, seed=config.seed),
        config.optimizer.build(model),
        epochs=config.pretrain_epochs,
        lr_schedule=config.lr_schedule,
        on_epoch=lambda record: _tell(record, "dense", config.pretrain_epochs, snapshots.history, say),
        snapshots=snapshots,
        phase=DENSE,
        resume=resume,
    )


def _fine_tune(
    controller: CompressionController,
    model: nn.Module,
    dataset: ResolvedDataset | None,
    config: RunConfig,
    say: Say,
    snapshots: Snapshots,
    resume: Snapshot | None,
) -> None:
    if dataset is None:
        return
    say(f"Fine-tuning for {config.epochs} epochs")
    optimizer = config.optimizer.build(model)
    controller.attach(optimizer=optimizer)
    history = snapshots.history
    fit(
        model,
        dataset.train_loader(config.batch_size, seed=config.seed + 1),
        optimizer,
        epochs=config.epochs,
        lr_schedule=config.lr_schedule,
        controller=controller,
        on_epoch=lambda record: _tell(record, "pruned", config.epochs, history, say, controller.compression_rate),
        snapshots=snapshots,
        phase=FINE_TUNING,
        resume=resume,
    )


class _SameBatches:
    """Training batches in the same order at every pass: what data-driven decisions see does not depend on whether an
    earlier pass was in this process or in one that was killed."""

    def __init__(self, dataset: ResolvedDataset, config: RunConfig) -> None:
        self._dataset, self._config = dataset, config

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset.train_loader(self._config.batch_size, seed=self._config.seed))


def _identity(settings: Settings) -> str:
    """A digest of everything in the config but the place of the results."""
    document = {key: value for key, value in settings.document.items() if key != "output_dir"}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _tell(
    record: EpochRecord,
    phase: str,
    epochs: int,
    history: list[dict[str, Any]],
    say: Say,
    compression_rate: float | None = None,
) -> None:
    history.append({"phase": phase, **vars(record)})
    line = f"  epoch {record.epoch:>{len(str(epochs))}}/{epochs}"
    line += f"  loss {record.loss:.4f}  training accuracy {record.accuracy:.2%}"
    if compression_rate is not None:
        history[-1]["compression_rate"] = compression_rate
        line += f"  removed {compression_rate:.0%}"
    say(f"{line}  {record.seconds:.1f} s")


def _export(model: nn.Module, example: ExampleInputs, directory: Path, config: RunConfig) -> list[ExportedFile]:
    return export_model(model, example, directory, config.export.formats, config.export.precisions)


def _latency(files: Mapping[str, Sequence[ExportedFile]], example: ExampleInputs) -> dict[str, dict[str, float]]:
    """Median milliseconds by network and file label; dense and pruned of one kind are timed in turn."""
    result: dict[str, dict[str, float]] = {network: {} for network in files}
    for pair in zip(*files.values(), strict=True):
        timed = measure_latency({network: file.path for network, file in zip(files, pair, strict=True)}, example)
        for network, latency in timed.items():
            result[network][pair[0].label] = latency.median_ms
    return result


def _figures(
    macs: int, params: int, accuracy: float | None, files: Sequence[ExportedFile], latency_ms: Mapping[str, float]
) -> NetworkFigures:
    return NetworkFigures(macs, params, accuracy, {file.label: file.bytes for file in files}, latency_ms)


def _write_report(
    directory: Path,
    settings: Settings,
    comparison: Comparison,
    plan: PruningPlan,
    files: Mapping[str, Sequence[ExportedFile]],
    history: Sequence[Mapping[str, Any]],
    checks: Sequence[str],
) -> None:
    config = settings.run
    document = {
        "version": __version__,
        "torch": torch.__version__,
        "model": config.model,
        "dataset": config.dataset,
        "algorithm": plan.algorithm,
        **({"classes": list(plan.output_classes)} if plan.output_classes else {}),
        **json.loads(to_json(comparison)),
        "verification": {
            f"{network}/{file.path.name}": {
                "runtime": file.verification.runtime,
                "max_rel_error": file.verification.max_rel_error,
                "tolerance": file.verification.tolerance,
                "batch_sizes": list(file.verification.batch_sizes),
            }
            for network, exported in files.items()
            for file in exported
        },
        "self_check": list(checks),
        "epochs": list(history),
    }
    write_whole(directory / "report.json", (json.dumps(document, indent=2) + "\n").encode())
    lines = [
        f"# {config.model}, pruned",
        "",
        f"Dataset `{config.dataset}`, algorithm `{plan.algorithm}`, seed {config.seed}, version {__version__}.",
        "",
        *([f"For the classes {', '.join(map(str, plan.output_classes))} only.", ""] if plan.output_classes else []),
        to_markdown(comparison),
        *(line for check in checks for line in (f"Cut and masked model compared: {check}.", "")),
        "## Channel widths",
        "",
        "| group | dense | pruned |",
        "| --- | ---: | ---: |",
        *(f"| `{group.name}` | {group.before} | {group.after} |" for group in plan.groups),
    ]
    if plan.pinned:
        lines += ["", "## Not prunable", ""]
        lines += [f"- `{name}` ({size} channels): {reason}" for name, size, reason in plan.pinned]
    write_whole(directory / "report.md", ("\n".join(lines) + "\n").encode())
    with suppress(ResolveError):  # a picture is an extra; the figures are in report.md
        require_package("matplotlib", "nncf-compactprune[report]")
        plot_widths(plan.groups, directory / "widths.png")
