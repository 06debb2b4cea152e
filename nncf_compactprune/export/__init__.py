"""Files that compute what the model computes: ONNX, OpenVINO IR and what plugins add, verified and timed."""

from __future__ import annotations

from nncf_compactprune.export.formats import ExportFormat, Session
from nncf_compactprune.export.latency import Latency, measure_latency
from nncf_compactprune.export.model import QUANTIZED, ExportedFile, export_model
from nncf_compactprune.export.options import ExportOptions, Pixels
from nncf_compactprune.export.prepared import Prepared, is_quantized
from nncf_compactprune.export.verify import Verification, verify_export

__all__ = [
    "QUANTIZED",
    "ExportFormat",
    "ExportOptions",
    "ExportedFile",
    "Latency",
    "Pixels",
    "Prepared",
    "Session",
    "Verification",
    "export_model",
    "is_quantized",
    "measure_latency",
    "verify_export",
]
