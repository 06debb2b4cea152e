"""Training runs that can be killed: one file an epoch with everything that the next epochs depend on.

A file holds the model (masks included), the optimizer's state, random states, and, as JSON in the header, the learning
rate schedule, the compression's state and the records so far. It is written beside its place, brought to the disk and
renamed, so that a kill leaves the previous one or the new one. The previous one is kept, and taken where the newest is
damaged. Nothing in it can run code.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from nncf_compactprune.errors import CompactPruneError, StorageError
from nncf_compactprune.storage.digests import tensors_digest
from nncf_compactprune.storage.weights import write_tensors
from nncf_compactprune.storage.writing import remove_leftovers, whole_file

logger = logging.getLogger("nncf")

KEPT = 2
HEADER = "snapshot"
DIGEST = "sha256"


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of an epoch.

    :param path: where it was read from.
    :param tensors: ``model.<name>``, ``optimizer.<number>.<key>``, ``random.<which>``.
    :param facts: ``phase``, ``epoch``, ``identity``, ``optimizer``, ``schedule``, ``compression``, ``history``.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @property
    def epoch(self) -> int:
        """Epochs of its phase that are done."""
        return int(self.facts["epoch"])

    @property
    def phase(self) -> int:
        """Which part of the run it is from."""
        return int(self.facts["phase"])

    def restore(self, model: nn.Module, optimizer: Optimizer, schedule: Any, batches: Iterable[Any]) -> None:
        """Puts everything back, in place, so that the next epoch is the one that would have followed.

        :param model: of the snapshot's shapes: built from its compression state.
        :param optimizer: over the model's parameters.
        :param schedule: of the learning rate, or None.
        :param batches: the loader; the state of its own generators comes back.
        :raises CompactPruneError: model or optimizer are not those of the run.
        """
        try:
            model.load_state_dict(dict(self._named("model.")))
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in self._named("optimizer."):
                number, _, key = name.partition(".")
                state.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": self.facts["optimizer"]})
        except (RuntimeError, ValueError, KeyError) as error:
            msg = f"{self.path}: is a snapshot of another run ({error}). Delete it to start anew."
            raise CompactPruneError(msg) from error
        if schedule is not None:
            schedule.load_state_dict(self.facts["schedule"])
        torch.set_rng_state(self.tensors["random.torch"])
        if torch.cuda.is_available() and "random.cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["random.cuda"])
        for name, generator in _generators(batches):
            generator.set_state(self.tensors[name])

    def _named(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        return ((name.removeprefix(prefix), t) for name, t in self.tensors.items() if name.startswith(prefix))


class Snapshots:
    """The snapshots of one run, in one directory.

    :param directory: is created with the first snapshot.
    :param identity: what must be equal for a snapshot to belong to the run, such as a digest of its configuration.
    :param history: JSON-able records of the epochs so far, which whoever trains keeps; saved along.
    """

    def __init__(self, directory: Path, identity: str, history: list[dict[str, Any]] | None = None) -> None:
        self.directory = directory
        self.identity = identity
        self.history: list[dict[str, Any]] = [] if history is None else history

    def newest(self) -> Snapshot | None:
        """The newest whole snapshot, or None. Damaged ones are reported and passed over.

        :raises CompactPruneError: it belongs to another run.
        """
        for path in reversed(self._files()):
            try:
                snapshot = _read(path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                logger.warning("%s is damaged and passed over (%s).", path, error)
                continue
            if snapshot.facts["identity"] != self.identity:
                msg = (
                    f"{path}: was left by a run with another configuration. Delete {self.directory} to start anew, or "
                    "choose another output directory."
                )
                raise CompactPruneError(msg)
            return snapshot
        return None

    def save(
        self,
        phase: int,
        epoch: int,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Any,
        batches: Iterable[Any],
        *,
        compression: Mapping[str, Any] | None,
    ) -> None:
        """Writes a snapshot and removes all but the last two. Where that fails (a full disk), training goes on: it is
        reported, and the earlier snapshots stay.

        :param phase: orders the parts of a run: 0 dense training, 1 fine-tuning.
        :param epoch: epochs of the phase that are done.
        :param model: masks included.
        :param optimizer: over its parameters.
        :param schedule: of the learning rate, or None.
        :param batches: the loader, for the state of its generators.
        :param compression: the compression's state as JSON data, or None.
        """
        numbered = optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {
            f"optimizer.{number}.{key}": torch.as_tensor(value)
            for number, state in numbered["state"].items()
            for key, value in state.items()
            if value is not None
        }
        tensors |= dict(_random_states(batches))
        facts = {
            "phase": phase,
            "epoch": epoch,
            "identity": self.identity,
            "optimizer": numbered["param_groups"],
            "schedule": None if schedule is None else _plain(schedule.state_dict()),
            "compression": compression,
            "history": self.history,
        }
        words = json.dumps(facts)
        try:
            with whole_file(self.directory / f"{phase}-{epoch:06d}.safetensors") as path:
                write_tensors(path, tensors, {HEADER: words, DIGEST: tensors_digest(tensors, words)})
        except StorageError as error:
            logger.warning("%s Training goes on; if it is ended now, it starts again from the snapshot before.", error)
            return
        for old in self._files()[:-KEPT]:
            old.unlink()

    def remove(self) -> None:
        """The run is done: the snapshots go."""
        for path in self._files():
            path.unlink()
        remove_leftovers(self.directory)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("*") if re.fullmatch(r"\d-\d{6}\.safetensors", path.name))


def _read(path: Path) -> Snapshot:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    facts = json.loads(metadata[HEADER])
    if tensors_digest(tensors, metadata[HEADER]) != metadata[DIGEST]:
        msg = "its content is not what was written"
        raise ValueError(msg)
    return Snapshot(path, tensors, facts)


def _generators(batches: Iterable[Any]) -> Iterator[tuple[str, torch.Generator]]:
    """A loader's own random generators: of its order, and of its augmentation."""
    for name, owner in (("order", batches), ("augmentation", getattr(batches, "collate_fn", None))):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield f"random.{name}", generator


def _random_states(batches: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    yield "random.torch", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "random.cuda", torch.cuda.get_rng_state()
    yield from ((name, generator.get_state()) for name, generator in _generators(batches))


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A learning rate schedule's state, as far as JSON holds it."""
    return {key: value for key, value in state.items() if isinstance(value, (int, float, bool, str, list, type(None)))}
