"""From a config to a report: what ``nncf-compactprune run`` does, in order, and how its results are read back.

A run writes into one directory::

    config.json         the config it ran with
    dense.safetensors   weights before pruning
    plan.json           what was removed
    model.safetensors   weights after fine-tuning; with config and plan, the checkpoint
    pretrained/         of a Hugging Face model: what load_pruned_hf reads
    dense/, pruned/     ONNX and OpenVINO files of both
    summary.json, report.html, report.md, model_card.md, with pictures beside it
    snapshots/          while it runs: the last two epochs; a run that was killed goes on from there
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins, default_plugins
from nncf_compactprune.report import Comparison
from nncf_compactprune.report.summary import SUMMARY_FILE
from nncf_compactprune.run.compare import compare
from nncf_compactprune.run.compress import compress
from nncf_compactprune.run.dense import train_dense
from nncf_compactprune.run.models import ResolvedModel, resolve_model
from nncf_compactprune.run.prepare import prepare
from nncf_compactprune.run.settings import Settings, read_settings
from nncf_compactprune.run.state import Say
from nncf_compactprune.run.warm_start import warm_started
from nncf_compactprune.storage.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_pruned
from nncf_compactprune.storage.plan_file import PLAN_FILE


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
    :param overrides: see :func:`~nncf_compactprune.run.settings.read_settings`.
    :param say: is given one line for every step.
    :param plugins: where names are looked up; the installed plugins by default.
    :raises CompactPruneError: as soon as anything is found wrong; what can be checked is checked before any training.
    """
    plugins = plugins or default_plugins()
    return run_settings(read_settings(source, overrides, plugins), say=say, plugins=plugins)


def run_settings(settings: Settings, *, say: Say = print, plugins: Plugins | None = None) -> RunOutcome:
    """The same for a config that was read.

    :param settings: the config.
    :param say: is given one line for every step.
    :param plugins: where names are looked up; the installed plugins by default.
    :raises CompactPruneError: see :func:`run`.
    """
    this_run = prepare(settings, plugins or default_plugins(), say)
    dense = train_dense(this_run)
    this_run = warm_started(this_run, dense)
    compressed = compress(this_run, dense)
    comparison = compare(this_run, compressed)
    this_run.snapshots.remove()
    return RunOutcome(comparison, compressed.plan, this_run.directory)


def described_by(directory: Path) -> ExportOptions:
    """What the summary of a run says of the network's images and classes.

    :param directory: what a run wrote.
    """
    try:
        report = json.loads((directory / SUMMARY_FILE).read_bytes())
        pixels = report["pixels"]
        said = None if pixels is None else Pixels(tuple(pixels["mean"]), tuple(pixels["std"]))
        return ExportOptions(labels=report["labels"], pixels=said)
    except (OSError, ValueError, KeyError, TypeError):  # of another version, or copied without it
        return ExportOptions()


def load_run(directory: str | PathLike[str], plugins: Plugins | None = None) -> ResolvedModel:
    """Rebuilds the pruned model of a run: the dense architecture from its config, cut to its plan, with its weights
    and, of a quantized one, its quantizers.

    :param directory: what a run wrote.
    :param plugins: where names are looked up; the installed plugins by default.
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
