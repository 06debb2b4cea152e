"""The first stage of a run: dataset, model, checks before any training; and room for results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nncf_compactprune.accuracy_aware.checkpoints import PREFIX
from nncf_compactprune.algorithms import ChannelPruningConfig
from nncf_compactprune.config import InputInfo
from nncf_compactprune.decide.labelled import class_scores
from nncf_compactprune.errors import ConfigError, Problem, ResolveError, first_line
from nncf_compactprune.export.model import check_formats
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.integrations.layouts import OPTIMUM_FILES, check_layout
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import ResolvedDataset, resolve_dataset
from nncf_compactprune.run.models import ExampleInputs, ResolvedModel, resolve_model
from nncf_compactprune.run.settings import Settings, unread_key_warnings
from nncf_compactprune.run.state import CHECKPOINTS, DENSE_FILE, SNAPSHOTS, Run, Say
from nncf_compactprune.run.warm_start import check_warm_start
from nncf_compactprune.storage.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from nncf_compactprune.storage.plan_file import PLAN_FILE
from nncf_compactprune.storage.snapshots import Snapshots
from nncf_compactprune.storage.writing import whole_files, write_whole

RESULTS = (
    *(DENSE_FILE, PLAN_FILE, WEIGHTS_FILE, "summary.json", "report.md", "report.html"),
    *("model_card.md", "widths.png", "training.png", "layers.png"),
    "report.json",  # of versions before 0.1.0
)
EXPORTED = (
    *("dense/model*", "pruned/model*"),
    *(f"optimum/{pattern}" for pattern in OPTIMUM_FILES),
    "ovms/model/1/model*",
)


def prepare(settings: Settings, plugins: Plugins, say: Say) -> Run:
    """Builds what the run works on, and checks it. What an earlier run left stays, see :func:`make_room`.

    :param settings: the config.
    :param plugins: where names are looked up.
    :param say: is given one line for every step.
    :raises CompactPruneError: whatever can be found wrong before training.
    """
    for warning in unread_key_warnings(settings.document):
        say(f"Warning: {warning}")
    torch.manual_seed(settings.run.seed)
    _check_search(settings, plugins)
    check_warm_start(settings)
    dataset = _dataset(settings, plugins)
    if dataset is None or not dataset.labelled:
        _check_without_labels(settings, dataset)
    if dataset is not None and not dataset.labelled:
        count = len(dataset.train)  # type: ignore[arg-type]
        say(f"{count} images of '{dataset.name}', without labels: nothing is trained and no accuracy measured")
    if dataset is not None:
        settings = _with_input_info(settings, dataset)
    config = settings.run
    resolved = resolve_model(
        config.model,
        sample_size=settings.compression.input_info[0].sample_size if dataset is None else (1, *dataset.input_shape),
        options=config.model_options,
        weights=config.weights,
        plugins=plugins,
    )
    quantized = any(entry.algorithm.endswith("quantization") for entry in settings.compression.compression)
    for one in {False, quantized}:  # the dense network and the pruned one
        check_formats(config.export.formats, config.export.precisions, quantized=one, plugins=plugins)
    if config.export.layout != "plain":
        check_layout(resolved.model, config.export.layout, quantized=quantized)
    example = resolved.example_inputs
    if dataset is not None:
        dataset = normalised_for(resolved, dataset)
        example = real_example(resolved, dataset)
        check_classes(resolved, example, dataset)
    resolved.model.to(training_device(config.device, settings.source))
    if dataset is not None and dataset.labelled:
        for warning in late_schedules(settings, plugins):
            say(f"Warning: {warning}")
    if settings.compression.accuracy_aware_training is not None and "epochs" in settings.document:
        say("Note: epochs is not read, as accuracy_aware_training says how long to train")
    directory = Path(config.output_dir)
    files = settings.file_digests()
    snapshots = Snapshots(directory / SNAPSHOTS, _identity(settings, files))
    found = snapshots.newest()
    if found is not None:
        say(f"Going on from {found.path}")
        snapshots.history += found.facts["history"]
    with whole_files(directory, []):
        pass  # the directory can be written, which is to be known before hours of training
    return Run(settings, plugins, say, resolved.model, example, dataset, files, snapshots, found)


def _dataset(settings: Settings, plugins: Plugins) -> ResolvedDataset | None:
    if settings.run.dataset is None:
        return None
    return resolve_dataset(settings.run.dataset, settings.run.dataset_options, plugins)


def late_schedules(settings: Settings, plugins: Plugins) -> Iterator[str]:
    """One sentence for every pruning schedule that leaves no epoch to fine-tune the network it ends with.

    :param settings: the config.
    :param plugins: where schedules are looked up.
    """
    epochs = epochs_of_schedule(settings)
    for entry in settings.compression.compression:
        if not isinstance(entry, ChannelPruningConfig):
            continue
        needed = _epoch_of_cut(entry, epochs, plugins)
        if needed is not None and needed <= epochs:
            continue
        if needed is None:
            cuts, remedy = "has not reached its budget when training ends", "Choose a schedule that ends earlier."
        else:
            cuts = f"cuts to its budget in epoch {needed}, but training ends"
            remedy = f"Set epochs to {needed} or more, or lower pruning_steps or num_init_steps."
        yield f"'{entry.algorithm}' {cuts} after epoch {epochs}. What is left is then cut without fine-tuning. {remedy}"


def epochs_of_schedule(settings: Settings) -> int:
    """How many epochs the compression's schedules have, before training ends or a search begins.

    :param settings: the config.
    """
    aware = settings.compression.accuracy_aware_training
    if aware is None:
        return settings.run.epochs
    return aware.params.initial_training_phase_epochs if aware.searches else aware.params.maximal_total_epochs


def _check_search(settings: Settings, plugins: Plugins) -> None:
    """A search moves the rate of one algorithm.

    :raises ConfigError: there is none or more than one, or it cuts at once.
    """
    aware = settings.compression.accuracy_aware_training
    if aware is None or not aware.searches:
        return
    entries = settings.compression.compression
    found = [entry for entry in entries if getattr(plugins.get_algorithm(entry.algorithm), "adjustable", False)]
    message = ""
    if len(found) != 1:
        names = ", ".join(entry.algorithm for entry in (found or entries))
        message = f'expected one algorithm with a compression rate, got {names}. Use "early_exit".'
    elif getattr(getattr(found[0], "params", None), "classes", None) is not None:
        message = "'classes' cuts the classifier at once, before any search. Leave one of them out."
    if message:
        raise ConfigError(settings.source, [Problem("accuracy_aware_training.mode", message)])


def _epoch_of_cut(entry: ChannelPruningConfig, epochs: int, plugins: Plugins) -> int | None:
    """The epoch, counted from 1, in which the schedule reaches its target; 0: before training; None: much too late."""
    params = entry.params
    if params.prunes_before_training:
        return 0
    schedule = plugins.resolve("schedules", params.schedule)
    target = (1 + params.pruning_init) / 2  # the true one is known only when the model was traced
    for at in range(epochs + params.pruning_steps + 1):
        if schedule(at, initial=params.pruning_init, target=target, steps=params.pruning_steps) >= target:
            return params.num_init_steps + at + 1
    return None


def make_room(run: Run) -> None:
    """The run can start, and its results take the place of those of an earlier one.

    :param run: its compression was begun, or tried out.
    """
    remove_old_results(run.directory, run.say)
    write_whole(run.directory / CONFIG_FILE, (json.dumps(run.settings.document, indent=2) + "\n").encode())


def remove_old_results(directory: Path, say: Say) -> None:
    """Removes what an earlier run wrote here, so that no old file stands beside a new one. Other files stay.

    :param directory: the run's; it need not exist.
    :param say: is told how many files go.
    """
    exported = (path for pattern in EXPORTED for path in sorted(directory.glob(pattern)))
    files = [directory / name for name in RESULTS]
    checkpoints = sorted((directory / CHECKPOINTS).glob(f"{PREFIX}*.pth"))
    old = [path for path in (*files, *exported, *checkpoints) if path.is_file()]
    if old:
        say(f"Removing {len(old)} files of an earlier run from {directory}")
    for path in old:
        path.unlink()


def _check_without_labels(settings: Settings, dataset: ResolvedDataset | None) -> None:
    """Without labels nothing can be trained. Without any dataset nothing else says what the input looks like.

    :raises ConfigError: with everything that labels, or a dataset, would be needed for.
    """
    config, problems = settings.run, []
    why = "there is no dataset" if dataset is None else f"'{dataset.name}' has no labels"
    if not config.has_weights:
        message = f"missing. Name a file of trained weights: {why}, so nothing can be trained."
        problems.append(Problem("weights", message))
    for key in ("epochs", "pretrain_epochs"):
        if getattr(config, key):
            message = f"expected 0, got {getattr(config, key)}: {why}, so nothing can be trained."
            problems.append(Problem(key, message))
    if settings.compression.accuracy_aware_training is not None:
        message = f"leave it out: {why}, so nothing can be trained or measured."
        problems.append(Problem("accuracy_aware_training", message))
    for at, entry in enumerate(settings.compression.compression):
        if entry.needs_labels:
            message = f"'{entry.algorithm}' needs labelled images for this, and {why}. Choose what needs none."
            problems.append(Problem(f"compression[{at}].{entry.needs_labels}", message))
    if dataset is None and not settings.compression.input_info:
        message = 'missing. Without a dataset, give an object such as {"sample_size": [1, 3, 32, 32]}.'
        problems.append(Problem("input_info", message))
    if problems:
        raise ConfigError(settings.source, problems)


def _with_input_info(settings: Settings, dataset: ResolvedDataset) -> Settings:
    """States the input's shape in the config, so that the checkpoint does not need the dataset; checks it if stated."""
    expected = list(dataset.input_shape)
    given = settings.compression.input_info
    if any(info.sample_size[1:] != expected for info in given):
        message = f"expected [n, {', '.join(map(str, expected))}], the shape of '{dataset.name}' images"
        message += f", got {given[0].sample_size}. Leave input_info out to take the dataset's, or set "
        message += "image_size in dataset_options where the dataset has it."
        raise ConfigError(settings.source, [Problem("input_info.sample_size", message)])
    if given:
        return settings
    sample_size = [1, *expected]
    return replace(
        settings,
        document={**settings.document, "input_info": {"sample_size": sample_size}},
        compression=settings.compression.model_copy(update={"input_info": [InputInfo(sample_size=sample_size)]}),
    )


def normalised_for(resolved: ResolvedModel, dataset: ResolvedDataset) -> ResolvedDataset:
    """The dataset with the mean and std that the model states, where the dataset leaves them to it.

    :param resolved: the model.
    :param dataset: any.
    """
    if not dataset.model_normalises or resolved.mean is None or resolved.std is None:
        return dataset
    return replace(dataset, mean=resolved.mean, std=resolved.std)


def training_device(asked: str, source: str) -> torch.device:
    """Where networks train.

    :param asked: ``"auto"``, or a name of PyTorch's.
    :param source: the config's name, for messages.
    :raises ConfigError: there is no such device here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = first_line(error) or type(error).__name__
        message = f'no such device here: {said} Write "auto", "cpu", or a device that PyTorch finds.'
        raise ConfigError(source, [Problem("device", message)]) from error
    return device


def real_example(resolved: ResolvedModel, dataset: ResolvedDataset) -> ExampleInputs:
    """The first test image, in the model's own kind of container: self-checks and exports are compared on real data.

    :param resolved: the model.
    :param dataset: where the image is from.
    """
    images, _ = next(iter(dataset.test_loader(1)))
    if isinstance(resolved.example_inputs, dict):
        return dict.fromkeys(resolved.example_inputs, images)
    return images if isinstance(resolved.example_inputs, torch.Tensor) else (images,)


def check_classes(resolved: ResolvedModel, example: ExampleInputs, dataset: ResolvedDataset) -> None:
    """Runs the model once on an image of the dataset.

    :param resolved: the model.
    :param example: the image, as the model is called.
    :param dataset: where it is from.
    :raises ResolveError: it does not run, or has another number of outputs than the dataset has classes.
    """
    try:
        with evaluating(resolved.model):
            output = call_model(resolved.model, example)
            if not dataset.labelled:
                return
            scores = class_scores(output)
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


def _identity(settings: Settings, files: Mapping[str, str]) -> str:
    """A digest of everything in the config but the place of the results, and of the files that it names."""
    document = {key: value for key, value in settings.document.items() if key != "output_dir"}
    return hashlib.sha256(json.dumps([document, files], sort_keys=True).encode()).hexdigest()
