"""The unpruned networks beside a family: fine-tuned where asked for, measured and exported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from nncf_compactprune.export import export_model
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.report.families import Point
from nncf_compactprune.run.families.check import Network
from nncf_compactprune.run.families.settings import Family, Sibling
from nncf_compactprune.run.families.spent import Meter, spent_in
from nncf_compactprune.run.models import save_weights
from nncf_compactprune.run.prepare import training_device
from nncf_compactprune.run.state import DENSE_FILE, SNAPSHOTS, Say
from nncf_compactprune.run.training import EpochRecord, evaluate, fit
from nncf_compactprune.storage.digests import file_digest
from nncf_compactprune.storage.snapshots import Snapshots
from nncf_compactprune.storage.writing import write_whole

POINT_FILE = "sibling.json"


def sibling_point(
    family: Family, name: str, sibling: Sibling, network: Network, directory: Path, say: Say, plugins: Plugins
) -> Point:
    """What a sibling costs and how good it is. What is finished is read back; an interrupted training goes on.

    :param family: whose training the sibling gets.
    :param name: of the sibling.
    :param sibling: as the config says.
    :param network: the sibling, trained in place.
    :param directory: where its files go.
    :param say: is given one line for every step.
    :param plugins: where export formats come from.
    """
    identity = _identity(family, sibling)
    try:
        known = json.loads((directory / POINT_FILE).read_bytes())
        if known["identity"] == identity:
            say(f"{name}: finished already")
            return _point(name, known["accuracy"], network, directory)
    except (OSError, ValueError, KeyError):
        pass
    snapshots = Snapshots(directory / SNAPSHOTS, identity)
    found = snapshots.newest()
    meter = Meter(directory, anew=found is None)
    run, data = family.run, network.dataset
    model = network.resolved.model.to(training_device(run.device, family.source))
    if sibling.epochs:
        say(
            f"{name}: fine-tuning for {sibling.epochs} epochs"
            + ("" if found is None else f", going on from {found.path}")
        )
        torch.manual_seed(run.seed)

        def told(record: EpochRecord) -> None:
            say(f"  epoch {record.epoch}/{sibling.epochs}  loss {record.loss:.4f}  {record.seconds:.1f} s")
            meter.keep()

        fit(
            model,
            data.train_loader(run.batch_size, seed=run.seed + 1),
            run.optimizer.build(model),
            epochs=sibling.epochs,
            lr_schedule=run.lr_schedule,
            autocast=run.autocast,
            on_epoch=told,
            snapshots=snapshots,
            resume=found,
        )
    accuracy = evaluate(model, data.test_loader(run.batch_size))
    say(f"{name}: test accuracy {accuracy:.2%}")
    export_model(model, network.example, directory / "dense", run.export.formats, ["fp32"], plugins=plugins)
    save_weights(model, directory / DENSE_FILE)
    meter.keep()
    document = {"identity": identity, "accuracy": accuracy, "model": sibling.model}
    write_whole(directory / POINT_FILE, (json.dumps(document, indent=2) + "\n").encode())
    snapshots.remove()
    return _point(name, accuracy, network, directory)


def _point(name: str, accuracy: float, network: Network, directory: Path) -> Point:
    spent = spent_in(directory)
    cost = network.cost
    return Point(
        name, "sibling", accuracy, cost.macs, cost.params, None, spent.cpu_seconds / 3600, spent.gpu_seconds / 3600
    )


def _identity(family: Family, sibling: Sibling) -> str:
    """A digest of all that decides what becomes of it."""
    trained = ("dataset", "dataset_options", "batch_size", "optimizer", "lr_schedule", "seed", "export")
    document = {key: family.document.get(key) for key in trained if sibling.epochs or key != "optimizer"}
    weights = None if sibling.weights is None else file_digest(Path(sibling.weights))
    text = json.dumps([document, sibling.model_dump(mode="json", exclude={"name"}), weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
