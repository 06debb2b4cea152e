"""ONNX files as ONNX Runtime serves them."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from nncf_compactprune.errors import ExportError, nearest
from nncf_compactprune.export.prepared import Array
from nncf_compactprune.serving.server import LayerTime, Server, Serving, Tap, Weight

_PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_ON_THE_WAY = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity")
_NUMPY = {f"tensor({kind})": kind for kind in ("uint8", "int8", "int32", "int64", "bool")} | {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}


class OnnxServer(Server):
    """Opens a session as :class:`Serving` says; everything it does not say is ONNX Runtime's default."""

    def __init__(self, path: Path, serving: Serving, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        super().__init__(path, serving)
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        provider, available = _PROVIDERS.get(serving.device.upper()), onnxruntime.get_available_providers()
        if provider not in available:
            names = [name for name, one in _PROVIDERS.items() if one in available]
            hint = nearest(serving.device.upper(), names)
            msg = f"{path}: ONNX Runtime has no device '{serving.device}' here, it has {names}.{hint}"
            raise ExportError(msg)
        if serving.precision not in (None, "f32"):
            msg = f"{path}: ONNX Runtime computes in the precision of the file, so precision {serving.precision} "
            msg += "cannot be asked of it. Export the file in this precision, or leave it out."
            raise ExportError(msg)
        self._providers = [provider]
        self._proto = onnx.load(path, load_external_data=False)
        operations = {node.op_type for node in self._proto.graph.node}
        self.quantized = bool(operations & {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"})
        self.half_weights = any(t.data_type == onnx.TensorProto.FLOAT16 for t in self._proto.graph.initializer)
        self.precision = "f16" if self.half_weights else "f32"
        self._session = onnxruntime.InferenceSession(path, self._options(), providers=self._providers)
        ports = self._session.get_inputs()
        self.input_names = tuple(port.name for port in ports)
        self.input_shapes = tuple(tuple(d if isinstance(d, int) else None for d in port.shape) for port in ports)
        self.input_types = tuple(_NUMPY.get(port.type, "float32") for port in ports)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        return [np.asarray(one) for one in self._session.run(None, self._feed(arrays))]

    def request(self, arrays: Sequence[Array]) -> Callable[[], object]:
        feed, session = self._feed(arrays), self._session
        return lambda: session.run(None, feed)

    def flood(self, arrays: Sequence[Array], seconds: float) -> tuple[int, float]:
        feed, served = self._feed(arrays), [0] * (self.serving.streams or 2)
        self._session.run(None, feed)
        start = time.perf_counter()

        def client(which: int) -> None:
            while time.perf_counter() - start < seconds:
                self._session.run(None, feed)
                served[which] += 1

        clients = [threading.Thread(target=client, args=(which,)) for which in range(len(served))]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        return sum(served), time.perf_counter() - start

    def taps(self, arrays: Sequence[Array]) -> list[Tap]:
        proto = onnx.load(self.path)
        kinds = {name: (node.name, node.op_type) for node in proto.graph.node for name in node.output if name}
        there = {one.name for one in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kinds if name not in there)
        options = self._options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=self._providers)
        values = dict(
            zip([one.name for one in session.get_outputs()], session.run(None, self._feed(arrays)), strict=True)
        )
        return [
            Tap(operation or name, kind, np.asarray(values[name], np.float32))
            for name, (operation, kind) in kinds.items()
            if np.issubdtype(np.asarray(values[name]).dtype, np.floating)
        ]

    def weights(self) -> Iterator[Weight]:
        graph = self._proto.graph
        initializers = {one.name: one for one in graph.initializer}
        producers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type not in _PRODUCTS:
                continue
            for position, name in enumerate(node.input):
                stored, turned = _stored(name, producers)
                weight = initializers.get(stored)
                if weight is None or len(weight.dims) < 2:
                    continue
                shape = tuple(weight.dims)
                if node.op_type.startswith(("Gemm", "MatMul", "QLinearMatMul")):
                    transposed = any(one.name == "transB" and one.i for one in node.attribute) != turned
                    shape = shape if transposed or position == 0 else shape[::-1]
                yield Weight(node.name, stored, shape)

    def layer_times(self, arrays: Sequence[Array], runs: int, quantile: float = 0.5) -> list[LayerTime]:
        with tempfile.TemporaryDirectory() as directory:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(directory) / "profile")
            session = onnxruntime.InferenceSession(self.path, options, providers=self._providers)
            feed = self._feed(arrays)
            for _ in range(runs + 2):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        taken: dict[str, list[float]] = defaultdict(list)
        kinds: dict[str, tuple[str, str]] = {}
        for event in events:
            if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
                name = str(event["name"]).removesuffix("_kernel_time")
                taken[name].append(float(event["dur"]))
                kinds[name] = (str(event["args"]["op_name"]), _computes_in(event["args"]))
        return [LayerTime(name, *kinds[name], float(np.quantile(times[2:], quantile))) for name, times in taken.items()]

    def _options(self) -> Any:
        options = onnxruntime.SessionOptions()
        # Its worker threads would spin on between two requests, in the time of whoever is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.serving.threads is not None:
            options.intra_op_num_threads = self.serving.threads
        return options

    def _feed(self, arrays: Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self.input_names, arrays, strict=True))


def _stored(name: str, producers: dict[str, Any]) -> tuple[str, bool]:
    """The initializer behind a weight, and whether it is transposed on the way."""
    turned = False
    while name in producers and producers[name].op_type in _ON_THE_WAY:
        turned ^= producers[name].op_type == "Transpose"
        name = producers[name].input[0]
    return name, turned


def _computes_in(args: dict[str, Any]) -> str:
    """The type of an operation's first input, as the profile states it."""
    shapes = args.get("input_type_shape") or []
    kind = next(iter(shapes[0]), "") if shapes else ""
    return {"float": "f32", "float16": "f16", "uint8": "i8", "int8": "i8"}.get(kind, "")
