"""The files of a run in their real consumers: which there are, and which network each was exported from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from nncf_compactprune.errors import ExportError, ResolveError
from nncf_compactprune.export.formats import NotLoadedError, export_formats, format_of
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import even_samples, only_classes, resolve_dataset
from nncf_compactprune.run.models import ResolvedModel, load_weights, resolve_model
from nncf_compactprune.run.pipeline import load_run
from nncf_compactprune.run.prepare import normalised_for
from nncf_compactprune.run.settings import Settings, read_settings
from nncf_compactprune.run.state import DENSE_FILE
from nncf_compactprune.serving.reference import TorchSide
from nncf_compactprune.serving.server import Serving
from nncf_compactprune.serving.verify import MAX_DROP, ServedCheck, not_served, verify_served
from nncf_compactprune.storage.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from nncf_compactprune.storage.plan_file import PLAN_FILE

SAMPLES = 500
DENSE_FOLDER = "dense"


def verify(
    path: str | PathLike[str],
    *,
    serving: Serving = Serving(),  # noqa: B008  # frozen
    samples: int = SAMPLES,
    batch_size: int = 32,
    sample_size: Sequence[int] | None = None,
    tolerance: float | None = None,
    max_drop: float = MAX_DROP,
    say: Callable[[str], None] = print,
    plugins: Plugins | None = None,
) -> list[ServedCheck]:
    """Serves every exported file as a user would, and compares it with the torch model that it came from.

    :param path: the directory of a run, or any with exported files in it, or one file. A file in the directory of a run
        is compared with the run's network on the run's test images; one from elsewhere with itself in float32 on noise.
    :param serving: how the files are served; by default as the runtime chooses.
    :param samples: how many test images, evenly from all of them.
    :param batch_size: of the requests; single images are compared too.
    :param sample_size: the shape of a sample, where a file without a run leaves it open.
    :param tolerance: largest accepted error relative to the largest output; default: by what is computed in.
    :param max_drop: largest accepted loss of accuracy against torch, in [0, 1].
    :param say: is given a line when something is left out.
    :param plugins: where names are looked up.
    :return: what was found, a file each.
    :raises CompactPruneError: there is no file to verify, or the run cannot be read.
    """
    where = Path(path)
    files = exported_files(where, plugins)
    run = run_directory(where)
    sides = {} if run is None else _sides_of(run, samples, batch_size, say, plugins)
    checks = []
    for file in files:
        side = None if run is None else sides.get(network_of(file, run))
        limits: Any = {"tolerance": tolerance, "max_drop": max_drop, "plugins": plugins, "sample_size": sample_size}
        try:
            checks.append(verify_served(file, side, serving, **limits))
        except NotLoadedError as error:  # the others are looked at all the same
            checks.append(not_served(file, error))
    return checks


def exported_files(where: Path, plugins: Plugins | None = None) -> list[Path]:
    """The exported files in a directory and below it, or the one file.

    :param where: a directory or a file.
    :param plugins: where formats come from.
    :raises ExportError: there is none.
    """
    if not where.exists():
        msg = f"{where}: no such file or directory."
        raise ExportError(msg)
    if where.is_file():
        format_of(where, plugins)
        return [where]
    suffixes = {one.suffix for one in export_formats(plugins).values()}
    found = sorted(
        path
        for path in where.rglob("*")
        if path.suffix in suffixes
        and path.is_file()
        and not any(p.startswith(".") for p in path.relative_to(where).parts)
    )
    if not found:
        msg = f"{where}: holds no exported file (looked for {', '.join(sorted(suffixes))}, in all folders below)."
        raise ExportError(msg)
    return found


def run_directory(where: Path) -> Path | None:
    """The directory of the run that a path belongs to: itself or the nearest one above."""
    start = where.resolve()
    for folder in [start, *start.parents][:4]:
        if (folder / CONFIG_FILE).is_file() and (folder / PLAN_FILE).is_file():
            return folder
    return None


def network_of(file: Path, run: Path) -> str:
    """``dense`` or ``pruned``, by the folder that a file is in.

    :param file: an exported file.
    :param run: the directory of its run.
    """
    return "dense" if file.resolve().relative_to(run).parts[0] == DENSE_FOLDER else "pruned"


def _sides_of(
    run: Path, samples: int, batch_size: int, say: Callable[[str], None], plugins: Plugins | None
) -> dict[str, TorchSide]:
    """The torch models that a run's directory holds, on its test images, by ``"dense"`` and ``"pruned"``."""
    settings = read_settings(run / CONFIG_FILE, plugins=plugins)
    models = dict(_networks(run, settings, plugins))
    classes = PruningPlan.from_json((run / PLAN_FILE).read_bytes()).output_classes
    images = labels = None
    dataset = None
    if settings.run.dataset is not None:
        try:
            dataset = resolve_dataset(settings.run.dataset, settings.run.dataset_options, plugins)
        except ResolveError as error:
            say(f"Warning: the run's dataset is not there, so files are compared on noise. {error}")
    sides = {}
    for name, resolved in models.items():
        if dataset is not None:
            known = normalised_for(resolved, only_classes(dataset, classes) if classes else dataset)
            images, labels = even_samples(known, samples)
        sides[name] = TorchSide(
            resolved.model,
            resolved.example_inputs,
            images,
            labels,
            batch_size,
            classes if name == "dense" else (),
        )
    return sides


def _networks(run: Path, settings: Settings, plugins: Plugins | None) -> list[tuple[str, ResolvedModel]]:
    """The torch models of a run that its directory still holds."""
    found = []
    if (run / WEIGHTS_FILE).is_file():
        found.append(("pruned", load_run(run, plugins)))
    if (run / DENSE_FILE).is_file():
        info = settings.compression.input_info
        dense = resolve_model(
            settings.run.model,
            sample_size=info[0].sample_size if info else None,
            options=settings.run.model_options,
            plugins=plugins,
        )
        load_weights(dense.model, run / DENSE_FILE)
        found.append(("dense", dense))
    return found
