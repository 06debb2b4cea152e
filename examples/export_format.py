"""A file format of one's own: torch's ``.pt2``, written, reopened, verified and timed like the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nncf_compactprune import Plugins, export_model, hookimpl
from nncf_compactprune.export import ExportFormat, Prepared, Session, measure_latency


class Pt2(ExportFormat):
    name, title, runtime, suffix = "pt2", "PT2", "torch.export", ".pt2"

    def write(self, ready: Prepared, paths: Mapping[str, Path]) -> None:
        inputs, names = ready.trace_inputs.tensors, list(ready.input_names)
        batch = torch.export.Dim.AUTO if ready.dynamic_batch else None
        shapes = (tuple({0: batch} if x.dim() else {} for x in inputs),)
        program = torch.export.export(ready.flat, inputs, dynamic_shapes=shapes)
        for path in paths.values():
            torch.export.save(program, path, extra_files={"inputs": "\n".join([str(ready.dynamic_batch), *names])})

    def open(self, path: Path) -> Session:
        said = {"inputs": ""}
        module = torch.export.load(path, extra_files=said).module()
        dynamic, *names = said["inputs"].splitlines()

        def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                return [one.numpy() for one in module(*(torch.from_numpy(array) for array in arrays))]

        return Session(self.runtime, tuple(names), dynamic == "True", "fp32", run)


class Formats:
    @hookimpl
    def compactprune_export_formats(self) -> list[type[ExportFormat]]:
        return [Pt2]


plugins = Plugins()
plugins.load_entry_points()
plugins.register(Formats(), "my formats")
net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)), torch.randn(2, 3, 8, 8)
net(images)
(file,) = export_model(net, images, "runs/net.pt2", plugins=plugins)
latency = measure_latency({file.label: file.path}, images, plugins=plugins)[file.label]
print(f"{file.label}: error {file.verification.max_rel_error:.0e}, {latency.median_ms:.2f} ms")
