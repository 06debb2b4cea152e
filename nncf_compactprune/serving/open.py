"""Opens a file in the runtime that serves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.formats import ExportFormat, existing, not_loaded
from nncf_compactprune.export.prepared import Array
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.serving.onnx_server import OnnxServer
from nncf_compactprune.serving.openvino_server import OpenVinoServer
from nncf_compactprune.serving.server import Server, Serving, Weight


class _Opens(Protocol):
    def __call__(self, path: Path, serving: Serving, shapes: Sequence[tuple[int, ...]] | None = None) -> Server: ...


_SERVERS: dict[str, _Opens] = {"onnx": OnnxServer, "openvino": OpenVinoServer}


def open_server(
    path: Path,
    serving: Serving = Serving(),  # noqa: B008  # frozen
    shapes: Sequence[tuple[int, ...]] | None = None,
    plugins: Plugins | None = None,
) -> Server:
    """Opens a file as its runtime serves it.

    :param path: the file; its suffix says the format.
    :param serving: what to ask of the runtime.
    :param shapes: of the inputs, in the file's order, where the runtime shall fix them.
    :param plugins: where formats come from; the installed plugins by default.
    :raises ExportError: when there is no such file, it does not load, or the runtime has not what is asked.
    """
    kind = existing(path, plugins)
    try:
        if kind.name in _SERVERS:
            return _SERVERS[kind.name](path, serving, shapes)
        return _PluginServer(path, serving, kind)
    except ExportError:
        raise
    except Exception as error:
        raise not_loaded(path, kind, error) from error


class _PluginServer(Server):
    """A plugin's file, opened as its format opens it."""

    def __init__(self, path: Path, serving: Serving, kind: ExportFormat) -> None:
        super().__init__(path, serving)
        self._kind, self._session = kind, kind.open(path)
        self.runtime = kind.runtime
        self.precision = {"fp16": "f16"}.get(self._session.arithmetic, "f32")
        self.quantized = self._session.arithmetic == "int8"
        self.half_weights = self.precision == "f16"
        self.input_names = self._session.input_names
        self.input_shapes = self._session.input_shapes or ((None,),) * len(self.input_names)
        self.input_types = self._session.input_types or ("float32",) * len(self.input_names)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        return self._session.run(arrays)

    def weights(self) -> Iterator[Weight]:
        for name, shape in self._session.weights.items():
            if len(shape) > 1:
                yield Weight(name, name, shape)

    def request(self, arrays: Sequence[Array]) -> Callable[[], object]:
        named = dict(zip(self.input_names, arrays, strict=True))
        return self._kind.open_timed(self.path, named, self.serving.device)

    def flood(self, arrays: Sequence[Array], seconds: float) -> tuple[int, float]:
        request, served, start = self.request(arrays), 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            request()
            served += 1
        return served, time.perf_counter() - start
