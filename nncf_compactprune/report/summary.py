"""What a run came to, as one document that programs read: ``summary.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nncf_compactprune.errors import CompactPruneError

SUMMARY_FILE = "summary.json"
SUMMARY_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Figures(_Part):
    """What one network costs and how good it is."""

    accuracy: float | None = Field(description="test top-1 in [0, 1]; null without labels")
    macs: int = Field(description="multiply-accumulates of one sample")
    params: int
    file_bytes: dict[str, int] = Field(description="bytes on disk by format")
    latency_ms: dict[str, float] = Field(
        description="time of one request, by file, and by the settings of a budget of latency"
    )


class Ratios(_Part):
    """Pruned over dense, an INT8 file over the dense float file of its format; null where one of them is missing."""

    macs: float | None
    params: float | None
    file_bytes: dict[str, float | None]
    latency_ms: dict[str, float | None]


class Width(_Part):
    """A channel group."""

    name: str
    before: int
    after: int


class Pinned(_Part):
    """Channels that stay."""

    name: str
    channels: int
    reason: str


class FileCheck(_Part):
    """An exported file, compared with torch in float32."""

    runtime: str
    max_rel_error: float
    tolerance: float
    batch_sizes: list[int]


class Served(_Part):
    """An exported file as its runtime serves it."""

    file: str
    runtime: str
    arithmetic: str = Field(description="what it computed in: f32, bf16, f16, int8 + f32")
    samples: int
    batch_sizes: list[int]
    error: float = Field(description="largest difference relative to the largest output")
    tolerance: float | None = Field(description="largest accepted error; null where something else decides")
    agreement: float | None = Field(description="share of samples with torch's first class")
    accuracy: float | None = Field(description="the file's own")
    torch_accuracy: float | None
    problems: list[str]


class Layer(_Part):
    """One layer of the exported files, before and after."""

    name: str
    macs_dense: int
    macs_pruned: int
    us_dense: float = Field(description="microseconds of one request")
    us_pruned: float
    precision: str = Field(description="what the pruned layer computes in")
    note: str = Field(description="why time is not saved as MACs are; empty where it is")


class Summary(_Part):
    """A finished run."""

    summary_version: int = SUMMARY_VERSION
    version: str = Field(description="of nncf_compactprune")
    torch: str
    created: str = Field(description="ISO 8601, UTC")
    command: list[str]
    environment: dict[str, str]
    config: dict[str, Any]
    files: dict[str, str] = Field(default={}, description="SHA-256 of the files that the config names")
    model: str
    dataset: str | None
    algorithm: str
    classes: list[int] | None = None
    dense: Figures
    pruned: Figures
    ratio: Ratios
    widths: list[Width]
    pinned: list[Pinned]
    verification: dict[str, FileCheck]
    served: list[Served]
    accuracy_aware_training: dict[str, Any] | None = Field(default=None, description="the search and what it found")
    self_check: dict[str, dict[str, Any]]
    latency_budget: dict[str, dict[str, Any]] | None = Field(
        default=None, description="by algorithm: what a budget of latency came to, with every network that was measured"
    )
    labels: list[str] = Field(default=[], description="of the classes, in order")
    pixels: dict[str, list[float]] | None = Field(default=None, description="mean and std that images are given with")
    epochs: list[dict[str, Any]]
    layers: list[Layer] = Field(description="of the OpenVINO files; empty without them")


def summary_schema() -> dict[str, Any]:
    """The JSON schema of ``summary.json``."""
    return Summary.model_json_schema()


def read_summary(directory: Path) -> Summary:
    """The summary of a finished run.

    :param directory: of the run.
    :raises CompactPruneError: there is none, or it is no summary.
    """
    path = directory / SUMMARY_FILE
    if not path.is_file():
        msg = f"{directory} is no directory of a finished run: {SUMMARY_FILE} not found there."
        raise CompactPruneError(msg)
    try:
        return Summary.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()
        msg = f"{path} is no summary of a run: {' '.join(line.strip() for line in first[:3])}. Run the config again."
        raise CompactPruneError(msg) from error


def summary_text(document: Mapping[str, Any]) -> str:
    """A checked summary as JSON text.

    :param document: all fields of :class:`Summary`.
    """
    return Summary.model_validate(document).model_dump_json(indent=2) + "\n"
