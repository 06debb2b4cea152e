"""The third stage of a run: the compression, and the fine-tuning during and after it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nncf_compactprune.algorithms.channel_pruning import ChannelPruning
from nncf_compactprune.algorithms.latency import LatencyResult
from nncf_compactprune.channels import trace
from nncf_compactprune.controller import CompressionController, create_compressed_model
from nncf_compactprune.cut.self_check import SelfCheck
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.export import ExportOptions, Pixels
from nncf_compactprune.host.tensors import carries_hooks
from nncf_compactprune.integrations.layouts import PROCESSOR, processor
from nncf_compactprune.integrations.pretrained import save_pruned_hf
from nncf_compactprune.plan import PruningPlan, make_plan
from nncf_compactprune.run.datasets import ResolvedDataset, only_classes
from nncf_compactprune.run.models import save_weights
from nncf_compactprune.run.prepare import make_room
from nncf_compactprune.run.settings import RunConfig
from nncf_compactprune.run.state import DENSE_FILE, FINE_TUNING, Network, Run
from nncf_compactprune.run.training import fit
from nncf_compactprune.run.watching import Watched, train_watching
from nncf_compactprune.storage.checkpoint import save_pruned
from nncf_compactprune.storage.writing import write_whole

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Compressed:
    """What the compression came to.

    :param dense: the network before; its accuracy is that among the classes that the pruned one still knows.
    :param pruned: the network after fine-tuning.
    :param plan: what was removed.
    :param checks: the self-check of every algorithm that cut, by the algorithm's name.
    :param latency: what budgets of latency came to, by the algorithm's name.
    :param watched: what training came to that watched the accuracy; None where it did not.
    """

    dense: Network
    pruned: Network
    plan: PruningPlan
    checks: dict[str, SelfCheck]
    latency: dict[str, LatencyResult]
    watched: Watched | None = None


def compress(run: Run, dense: Network) -> Compressed:
    """Compresses and fine-tunes the run's model, and stores both networks.

    :param run: its model is the dense one, and is compressed in place.
    :param dense: a copy of it.
    """
    resume = run.resume(FINE_TUNING)
    aware = run.settings.compression.accuracy_aware_training
    state = None if resume is None else resume.facts["compression"]
    if aware is not None and state is not None:
        state = state["controller"]
    controller, model = create_compressed_model(
        run.model,
        run.settings.compression,
        None if run.dataset is None else _SameBatches(_of_outputs(run.model, run.dataset), run.config),
        compression_state=state,
        example_inputs=run.inputs,
        plugins=run.plugins,
        # where this run starts from a smaller network, the dense one still teaches
        teacher=None if run.config.warm_start is None else copy.deepcopy(dense.model),
    )
    if resume is None:  # what an earlier run left was there until here: the compression could begin
        make_room(run)
        save_weights(dense.model, run.directory / DENSE_FILE)
    plan = plan_of(model)
    if run.labelled is not None and plan is not None and plan.output_classes:
        known = _of_outputs(model, run.labelled)  # labels are counted anew from here on
        run = replace(run, dataset=known)
        scores = _Scores(dense.model, plan.output_classes)
        measured = run.measured(scores, f"Dense, among classes {', '.join(known.class_names)}")
        dense = replace(dense, accuracy=measured.accuracy)
    watched = None
    if run.labelled is not None and aware is not None and dense.accuracy is not None:
        watched = train_watching(run, run.labelled, controller, model, dense.accuracy)
    elif run.labelled is not None:
        _fine_tune(run, run.labelled, controller, model)
    model = controller.strip()
    plan = plan_of(model) or _plan_of_whole(run, dense.model)
    save_pruned(model, run.directory, config=run.settings.document)
    _save_pretrained(run, model)
    checks = {a.name: a.self_check for a in controller.algorithms if isinstance(a, ChannelPruning) and a.self_check}
    for name, check in checks.items():
        run.say(f"Self-check of {name}: {check}")
    pruned = run.measured(model, "Compressed" if carries_hooks(model) else "Pruned")
    if watched is not None and pruned.accuracy is not None:
        before, watched = watched, watched.ended(100 * pruned.accuracy)
        if before.holds and not watched.holds:
            run.say(
                f"Warning: the accuracy held before the last entries came: {watched.final:.2f} % now, "
                f"{watched.allowed:.2f} % allowed. Allow more, or set accuracy_control in the quantization entry."
            )
    latency = {a.name: a.latency for a in controller.algorithms if isinstance(a, ChannelPruning) and a.latency}
    for name, result in latency.items():
        run.say(f"Latency of {name}: {result}")
    return Compressed(dense, pruned, plan, checks, latency, watched)


def _of_outputs(model: nn.Module, dataset: ResolvedDataset) -> ResolvedDataset:
    """The classes that a network has outputs for; an earlier run that this one goes on from may have cut some."""
    plan = plan_of(model)
    return only_classes(dataset, plan.output_classes) if plan is not None and plan.output_classes else dataset


def _save_pretrained(run: Run, model: nn.Module) -> None:
    """A Hugging Face model's own folder beside the checkpoint."""
    if not hasattr(model, "save_pretrained") or plan_of(model) is None or carries_hooks(model):
        return
    folder = save_pruned_hf(model, run.directory / PRETRAINED)
    if run.dataset is not None:
        shape = run.dataset.input_shape
        pixels = ExportOptions(pixels=Pixels(tuple(run.dataset.mean), tuple(run.dataset.std)))
        write_whole(folder / PROCESSOR, (json.dumps(processor(pixels, shape), indent=2) + "\n").encode())


def _fine_tune(run: Run, dataset: ResolvedDataset, controller: CompressionController, model: nn.Module) -> None:
    config = run.config
    run.say(f"Fine-tuning for {config.epochs} epochs")
    optimizer = config.optimizer.build(model)
    controller.attach(optimizer=optimizer)
    fit(
        model,
        dataset.train_loader(config.batch_size, seed=config.seed + 1),
        optimizer,
        epochs=config.epochs,
        lr_schedule=config.lr_schedule,
        autocast=config.autocast,
        controller=controller,
        on_epoch=lambda record: run.tell(record, "pruned", config.epochs, controller.compression_rate),
        snapshots=run.snapshots,
        phase=FINE_TUNING,
        resume=run.resume(FINE_TUNING),
    )


def _plan_of_whole(run: Run, dense: nn.Module) -> PruningPlan:
    """The plan of a run that removed no channels (quantization, sparsity): everything stays."""
    graph = trace(dense, run.inputs, plugins=run.plugins)
    algorithms = ", ".join(entry.algorithm for entry in run.settings.compression.compression)
    return make_plan(graph, [np.ones(group.size, bool) for group in graph.groups], algorithm=algorithms)


class _Scores(nn.Module):
    """A classifier's scores of some classes only."""

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model, self.classes = model, list(classes)

    def forward(self, *args: Any) -> torch.Tensor:
        return class_scores(self.model(*args))[:, self.classes]


class _SameBatches:
    """Training batches in the same order at every pass: what data-driven decisions see does not depend on whether an
    earlier pass was in this process or in one that was killed."""

    def __init__(self, dataset: ResolvedDataset, config: RunConfig) -> None:
        self._dataset, self._config = dataset, config

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset.train_loader(self._config.batch_size, seed=self._config.seed))
