"""What a run carries from stage to stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nncf_compactprune.algorithms.base import to_device
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run.datasets import ResolvedDataset
from nncf_compactprune.run.models import ExampleInputs
from nncf_compactprune.run.settings import RunConfig, Settings
from nncf_compactprune.run.training import EpochRecord, device_of, evaluate
from nncf_compactprune.storage.snapshots import Snapshot, Snapshots

Say = Callable[[str], None]

DENSE_FILE = "dense.safetensors"
SNAPSHOTS = "snapshots"
CHECKPOINTS = "accuracy_aware_training"
DENSE, FINE_TUNING = 0, 1  # the phases of a run


@dataclass(frozen=True)
class Network:
    """A network and how good it is.

    :param model: the network.
    :param accuracy: test top-1 in [0, 1]; None without labels.
    """

    model: nn.Module
    accuracy: float | None


@dataclass(frozen=True)
class Run:
    """A run under way.

    :param settings: the config, the input's shape included.
    :param plugins: where names are looked up.
    :param say: is given one line for every step.
    :param model: is trained and compressed in place.
    :param example: what checks and exports run on: a test image where there are any.
    :param dataset: None for a run without data.
    :param files: digests of the files that the config names, as they were when the run began.
    :param snapshots: where every epoch leaves one; keeps the history of epochs.
    :param found: the snapshot to go on from.
    """

    settings: Settings
    plugins: Plugins
    say: Say
    model: nn.Module
    example: ExampleInputs
    dataset: ResolvedDataset | None
    files: Mapping[str, str]
    snapshots: Snapshots
    found: Snapshot | None

    @property
    def config(self) -> RunConfig:
        """The training script's part of the config."""
        return self.settings.run

    @property
    def labelled(self) -> ResolvedDataset | None:
        """The dataset, if it has labels to train on and to measure by."""
        return self.dataset if self.dataset is not None and self.dataset.labelled else None

    @property
    def directory(self) -> Path:
        """Where the artefacts go."""
        return Path(self.config.output_dir)

    @property
    def inputs(self) -> ExampleInputs:
        """The example, on the model's device."""
        moved: ExampleInputs = to_device(self.example, device_of(self.model))
        return moved

    def resume(self, phase: int) -> Snapshot | None:
        """The snapshot to go on from, if it is of this phase."""
        return self.found if self.found is not None and self.found.phase == phase else None

    def measured(self, model: nn.Module, which: str) -> Network:
        """The network with its test accuracy, which is told.

        :param model: the network.
        :param which: what to call it.
        """
        if self.labelled is None:
            return Network(model, None)
        accuracy = evaluate(model, self.labelled.test_loader(self.config.batch_size))
        self.say(f"{which}: test accuracy {accuracy:.2%}")
        return Network(model, accuracy)

    def tell(
        self,
        record: EpochRecord,
        phase: str,
        epochs: int,
        compression_rate: float | None = None,
        test_accuracy: float | None = None,
    ) -> None:
        """Keeps an epoch's record in the history, and says what it came to.

        :param record: of the epoch.
        :param phase: ``dense`` or ``pruned``.
        :param epochs: how many there are.
        :param compression_rate: share of the cost removed, in [0, 1).
        :param test_accuracy: top-1 in [0, 1], where it was measured.
        """
        entry = {"phase": phase, **vars(record)}
        line = f"  epoch {record.epoch:>{len(str(epochs))}}/{epochs}"
        line += f"  loss {record.loss:.4f}  training accuracy {record.accuracy:.2%}"
        if compression_rate is not None:
            entry["compression_rate"] = compression_rate
            line += f"  removed {compression_rate:.{0 if test_accuracy is None else 1}%}"
        if test_accuracy is not None:
            entry["test_accuracy"] = test_accuracy
            line += f"  test accuracy {test_accuracy:.2%}"
        self.snapshots.history.append(entry)
        self.say(f"{line}  {record.seconds:.1f} s")
