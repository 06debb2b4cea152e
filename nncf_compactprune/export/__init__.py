"""Files that compute what the model computes: ONNX, OpenVINO IR and what plugins add, verified and timed."""

from __future__ import annotations

from nncf_compactprune.export.formats import ExportFormat, Session
from nncf_compactprune.export.latency import Latency, measure_latency
from nncf_compactprune.export.model import ExportedFile, export_model
from nncf_compactprune.export.prepared import Prepared
from nncf_compactprune.export.verify import Verification, verify_export

__all__ = [
    "ExportFormat",
    "ExportedFile",
    "Latency",
    "Prepared",
    "Session",
    "Verification",
    "export_model",
    "measure_latency",
    "verify_export",
]
