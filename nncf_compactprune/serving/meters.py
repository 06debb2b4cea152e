"""The built-in latency meters: OpenVINO and ONNX Runtime."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nncf
import onnxruntime
import openvino
from torch import nn

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.formats import export_formats
from nncf_compactprune.export.options import ExportOptions
from nncf_compactprune.export.prepared import Array, Prepared, prepared
from nncf_compactprune.plugins.hookspecs import LatencyMeter, hookimpl
from nncf_compactprune.serving.departure import module_values
from nncf_compactprune.serving.layers import modules_of
from nncf_compactprune.serving.meter import LayerClock, LoadedNetwork, Meter, MeterOptions
from nncf_compactprune.serving.open import open_server
from nncf_compactprune.serving.server import LayerTime, Server, Serving

_FLOOD_SECONDS = 0.1
_FASTEST = 0.2  # quantile of the times of a layer: other processes only ever slow one down
_PROFILED = 30  # requests


class _Served(LoadedNetwork):
    """An exported file in its runtime; the file goes with it."""

    def __init__(
        self,
        folder: tempfile.TemporaryDirectory[str],
        server: Server,
        arrays: Sequence[Array],
        names: Sequence[tuple[str, tuple[int, ...]]],
    ) -> None:
        self._folder, self._server, self._arrays, self._names = folder, server, arrays, names
        self._request = server.request(arrays)

    def request(self) -> float:
        if self._server.serving.hint == "throughput":
            served, seconds = self._server.flood(self._arrays, _FLOOD_SECONDS)
            return 1e3 * seconds / served
        return 1e3 * _timed(self._request)

    def close(self) -> None:
        del self._request
        del self._server
        self._folder.cleanup()

    def layers(self) -> Sequence[LayerClock]:
        if not self._names:
            return ()
        modules = modules_of(list(self._server.weights()), self._names)
        return _clocks(modules, self._server.layer_times(self._arrays, _PROFILED, _FASTEST))


class _RuntimeMeter(Meter):
    """Exports to one format, and opens the file as it is served."""

    format: str
    suffix: str
    times_layers: bool

    def load(self, model: nn.Module, example_inputs: Any) -> LoadedNetwork:
        folder = tempfile.TemporaryDirectory(prefix="compactprune_")
        try:
            return self._loaded(folder, model, example_inputs)
        except BaseException:
            folder.cleanup()
            raise

    def _loaded(self, folder: tempfile.TemporaryDirectory[str], model: nn.Module, example_inputs: Any) -> LoadedNetwork:
        options = self.options
        path = Path(folder.name) / f"network{self.suffix}"
        precision = "fp16" if options.precision == "fp16" else "fp32"
        with prepared(model, example_inputs, dynamic_batch=False, options=ExportOptions(batch=options.batch)) as ready:
            export_formats()[self.format].write(ready, {precision: path})
            arrays = ready.trace_inputs.arrays()
            names = _run_order(ready) if self.times_layers else []
        path = self._quantized(path, arrays) if options.precision == "int8" else path
        serving = Serving(options.device, hint=options.hint, threads=options.threads)
        return _Served(folder, open_server(path, serving, [array.shape for array in arrays]), arrays, names)

    def _quantized(self, path: Path, arrays: Sequence[Array]) -> Path:
        raise NotImplementedError


class OpenVinoMeter(_RuntimeMeter):
    """OpenVINO, on any device that it has here. Layers are timed by its own clocks (``PERF_COUNT``).

    INT8 networks are quantized by ``nncf.quantize`` on one sample: scales do not change the time.
    """

    format, suffix, times_layers = "openvino", ".xml", True

    def __init__(self, options: MeterOptions) -> None:
        super().__init__(options)
        core = openvino.Core()
        device = options.device.split(":")[0].split(".")[0]
        if device not in {one.split(".")[0] for one in core.available_devices}:
            raise _no_device(options.device, core.available_devices, runtime="OpenVINO")
        self.title = f"OpenVINO {openvino.__version__.partition('-')[0]} on {options.device}"
        name = str(core.get_property(options.device, "FULL_DEVICE_NAME"))
        self.identity = f"OpenVINO {openvino.__version__}, {name}, {_processors()}"

    def _quantized(self, path: Path, arrays: Sequence[Array]) -> Path:
        model = openvino.Core().read_model(path)
        sample = arrays[0] if len(arrays) == 1 else list(arrays)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NNCF's, of one sample only
            quantized = nncf.quantize(model, nncf.Dataset([sample]), subset_size=1)
        target = path.with_name("quantized.xml")
        openvino.save_model(quantized, target, compress_to_fp16=False)
        return target


class OnnxRuntimeMeter(_RuntimeMeter):
    """ONNX Runtime, as a whole: layers are not timed, as it fuses them under other names."""

    format, suffix, times_layers = "onnx", ".onnx", False

    def __init__(self, options: MeterOptions) -> None:
        super().__init__(options)
        providers = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}
        available = onnxruntime.get_available_providers()
        devices = [device for device, provider in providers.items() if provider in available]
        if options.device.upper() not in devices:
            raise _no_device(options.device, devices, runtime="ONNX Runtime")
        if options.precision == "int8":
            msg = 'budget.precision: ONNX Runtime is measured in "fp32" or "fp16"; "openvino" in "int8" too.'
            raise ExportError(msg)
        self.title = f"ONNX Runtime {onnxruntime.__version__} on {options.device}"
        self.identity = f"ONNX Runtime {onnxruntime.__version__}, {options.device}, {_processors()}"


def _no_device(device: str, devices: Sequence[str], *, runtime: str) -> ExportError:
    hint = nearest(device.upper(), devices)
    return ExportError(f"budget.device: {runtime} has no device '{device}' here, it has {list(devices)}.{hint}")


def _processors() -> str:
    """The CPU and how much of it this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} x {count}"


def _timed(request: Any) -> float:
    start = time.perf_counter()
    request()
    return time.perf_counter() - start


def _run_order(ready: Prepared) -> list[tuple[str, tuple[int, ...]]]:
    """Modules with a weight and its shape, in the order in which they run."""
    weights = {name: tuple(tensor.shape) for name, tensor in ready.flat.model.named_parameters()}
    values = module_values(ready.flat, ready.trace_inputs.tensors)
    return [(one.module, weights[f"{one.module}.weight"]) for one in values if f"{one.module}.weight" in weights]


def _clocks(modules: Mapping[str, str], times: Sequence[LayerTime]) -> list[LayerClock]:
    """Time by layers with weights; what runs between two of them counts with the one before it.

    :param modules: by the layers' operations.
    :param times: of all operations, in the order in which they run.
    """
    clocks: list[LayerClock] = []
    for one in times:
        if one.operation in modules or not clocks:
            clocks.append(LayerClock(modules.get(one.operation, ""), one.microseconds))
        else:
            clocks[-1] = LayerClock(clocks[-1].module, clocks[-1].microseconds + one.microseconds)
    return clocks


@hookimpl
def compactprune_latency_meters() -> Mapping[str, LatencyMeter]:
    """Offers the built-in meters."""
    return {"openvino": OpenVinoMeter, "onnxruntime": OnnxRuntimeMeter}
