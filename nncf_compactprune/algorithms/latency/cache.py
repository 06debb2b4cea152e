"""Measurements on disk: an interrupted search goes on where it was, and no network is measured twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nncf.common.logging import nncf_logger
from torch import nn

from nncf_compactprune.algorithms.latency.model import Measured
from nncf_compactprune.host.torch_internals import tensors_of
from nncf_compactprune.serving.meter import MeterOptions


def cache_folder() -> Path:
    """Where measurements are kept: ``nncf_compactprune/latency`` in the user's cache (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nncf_compactprune" / "latency"


def network_signature(model: nn.Module, example_inputs: Any) -> str:
    """What tells networks apart whose time may differ: the modules with their settings, all shapes, and the inputs.

    :param model: the dense network, without hooks.
    :param example_inputs: what it is called with.
    """
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    inputs = [(tuple(leaf.shape), str(leaf.dtype)) for leaf in tensors_of(example_inputs)]
    return repr((type(model).__module__, str(model), shapes, inputs))


class MeasurementCache:
    """Measured networks of one dense network on one device: a file of JSON lines.

    :param meter: identity of the meter.
    :param options: how networks are exported and served.
    :param network: see :func:`network_signature`.
    """

    def __init__(self, meter: str, options: MeterOptions, network: str) -> None:
        key = hashlib.sha256(repr((meter, options, network)).encode()).hexdigest()[:24]
        self.path = cache_folder() / f"{key}.jsonl"
        self._head = json.dumps({"meter": meter, **asdict(options)})
        self._known: dict[tuple[int, ...], Measured] = {}
        for line in self._lines():
            try:
                entry = json.loads(line)
                one = Measured(**{**entry, "widths": tuple(entry["widths"])})
            except (ValueError, TypeError, KeyError):  # the head, or a line that was not written to its end
                continue
            self._known[one.widths] = one

    def get(self, widths: Sequence[int]) -> Measured | None:
        """What was measured of a network, in this run or an earlier one."""
        return self._known.get(tuple(widths))

    def add(self, one: Measured) -> None:
        """Keeps a measurement. A folder that cannot be written costs a new measurement next time, and a warning."""
        self._known[one.widths] = one
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                file.write((self._head + "\n" if new else "") + json.dumps(asdict(one)) + "\n")
        except OSError as error:
            nncf_logger.warning(f"latency: the measurement is not kept for later runs: {error}.")

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
