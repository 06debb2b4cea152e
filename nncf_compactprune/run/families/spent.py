"""What a network's training costs, added up over interruptions."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nncf_compactprune.storage.writing import write_whole

SPENT_FILE = "spent.json"


@dataclass(frozen=True)
class Spent:
    """Time.

    :param wall_seconds: by the clock.
    :param cpu_seconds: of all threads of the process.
    :param gpu_seconds: by the clock, where a GPU was in use.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0


def spent_in(directory: Path) -> Spent:
    """What was spent on the network of a directory so far; nothing where it is not known.

    :param directory: of the network.
    """
    try:
        return Spent(**json.loads((directory / SPENT_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Spent()


class Meter:
    """Counts from now on.

    :param directory: of the network.
    :param anew: forget what was spent there before.
    """

    def __init__(self, directory: Path, *, anew: bool) -> None:
        self._directory = directory
        self._before = Spent() if anew else spent_in(directory)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def keep(self) -> Spent:
        """Writes down what was spent; called at every line that a run says, so that a kill loses an epoch at most."""
        wall, before = time.perf_counter() - self._wall, self._before
        gpu = wall if torch.cuda.is_available() and torch.cuda.is_initialized() else 0.0  # type: ignore[no-untyped-call]
        now = Spent(
            before.wall_seconds + wall,
            before.cpu_seconds + time.process_time() - self._cpu,
            before.gpu_seconds + gpu,
        )
        write_whole(self._directory / SPENT_FILE, (json.dumps(asdict(now)) + "\n").encode())
        return now
