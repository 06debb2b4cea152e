"""The second stage of a run: the dense network, trained here or given, and how good it is."""

from __future__ import annotations

import copy
from contextlib import suppress

from nncf_compactprune.controller import create_compressed_model
from nncf_compactprune.errors import UntrainedError
from nncf_compactprune.run.datasets import ResolvedDataset
from nncf_compactprune.run.models import load_weights
from nncf_compactprune.run.prepare import make_room
from nncf_compactprune.run.state import DENSE, DENSE_FILE, FINE_TUNING, Network, Run
from nncf_compactprune.run.training import fit


def train_dense(run: Run) -> Network:
    """Trains the model where the config says so, and returns a copy of it."""
    if run.resume(FINE_TUNING) is not None:
        load_weights(run.model, run.directory / DENSE_FILE)
    elif not run.config.has_weights and run.labelled is not None:
        _pretrain(run, run.labelled)
    return run.measured(copy.deepcopy(run.model), "Dense")


def _pretrain(run: Run, dataset: ResolvedDataset) -> None:
    config, say = run.config, run.say
    if not config.pretrain_epochs:
        say("Warning: neither weights nor pretrain_epochs are given: the dense model is untrained.")
        return
    # A budget out of reach or a scope without a match shows on the untrained model too, before the training.
    say("Trying the compression on a copy of the untrained model")
    with suppress(UntrainedError):  # which will be trained
        create_compressed_model(
            copy.deepcopy(run.model),
            run.settings.compression,
            dataset.train_loader(config.batch_size, seed=config.seed),
            example_inputs=run.inputs,
            plugins=run.plugins,
        )
    make_room(run)
    say(f"Training the dense model for {config.pretrain_epochs} epochs")
    fit(
        run.model,
        dataset.train_loader(config.batch_size, seed=config.seed),
        config.optimizer.build(run.model),
        epochs=config.pretrain_epochs,
        lr_schedule=config.lr_schedule,
        autocast=config.autocast,
        on_epoch=lambda record: run.tell(record, "dense", config.pretrain_epochs),
        snapshots=run.snapshots,
        phase=DENSE,
        resume=run.resume(DENSE),
    )
