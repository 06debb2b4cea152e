"""Files that compute what the model computes: ONNX and OpenVINO IR, verified and timed in their runtimes."""

from __future__ import annotations

from nncf_compactprune.export.latency import Latency, measure_latency
from nncf_compactprune.export.model import ExportedFile, export_model
from nncf_compactprune.export.onnx import export_onnx
from nncf_compactprune.export.openvino import export_openvino
from nncf_compactprune.export.verify import Verification, verify_export

__all__ = [
    "ExportedFile",
    "Latency",
    "Verification",
    "export_model",
    "export_onnx",
    "export_openvino",
    "measure_latency",
    "verify_export",
]
