"""A file format of one's own: ONNX Runtime's ``.ort`` for phones, written, reopened, verified and timed like the
built-in ones."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from nncf_compactprune import Plugins, export_model, hookimpl
from nncf_compactprune.export import ExportFormat, Prepared, Session, measure_latency
from nncf_compactprune.export.onnx import OnnxFormat


class Ort(ExportFormat):
    name, title, runtime, suffix = "ort", "ORT", "ONNX Runtime", ".ort"

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        for precision, path in paths.items():
            with tempfile.TemporaryDirectory() as directory:
                onnx_file = Path(directory) / "model.onnx"
                OnnxFormat().write(ready, {precision: onnx_file})
                options = onnxruntime.SessionOptions()
                options.optimized_model_filepath = str(path)
                options.add_session_config_entry("session.save_model_format", "ORT")
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # for any CPU
                onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])

    def open(self, path: Path) -> Session:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        ports = session.get_inputs()
        names = tuple(port.name for port in ports)

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            return session.run(None, dict(zip(names, arrays, strict=True)))

        shapes = tuple(tuple(side if isinstance(side, int) else None for side in port.shape) for port in ports)
        return Session(self.runtime, names, shapes[0][0] is None, "fp32", run, input_shapes=shapes)


class Formats:
    @hookimpl
    def compactprune_export_formats(self) -> list[type[ExportFormat]]:
        return [Ort]


plugins = Plugins()
plugins.load_entry_points()
plugins.register(Formats(), "my formats")
net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)), torch.randn(2, 3, 8, 8)
net(images)
(file,) = export_model(net, images, "runs/net.ort", plugins=plugins)
latency = measure_latency({file.label: file.path}, images, plugins=plugins)[file.label]
print(f"{file.label}: error {file.verification.max_rel_error:.0e}, {latency.median_ms:.2f} ms")
