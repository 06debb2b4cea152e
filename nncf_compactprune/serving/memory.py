"""What a file takes in memory. Run by its path as a process of its own, so it imports the runtime and nothing else.

``python memory.py FILE DEVICE PRECISION SHAPE...`` prints by how many bytes loading the file and serving one request
raises what the process holds. A shape is written as ``1x3x224x224``.
"""

from __future__ import annotations

import sys

import numpy as np
import psutil


def held_by_openvino(path: str, device: str, precision: str, shapes: list[list[int]]) -> int:
    """Bytes more than before, for an IR.

    :param path: the file.
    :param device: where it runs.
    :param precision: what is asked for; empty leaves it to OpenVINO.
    :param shapes: of the inputs.
    """
    import openvino

    before = _held()
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({port: openvino.PartialShape(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
    asked = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    compiled = core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY", **asked})
    del model
    compiled(
        [
            np.ones(shape, port.get_element_type().to_dtype())
            for port, shape in zip(compiled.inputs, shapes, strict=True)
        ]
    )
    return _held() - before


def held_by_onnxruntime(path: str, shapes: list[list[int]]) -> int:
    """Bytes more than before, for an ONNX file.

    :param path: the file.
    :param shapes: of the inputs.
    """
    import onnxruntime

    before = _held()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    feed = {
        port.name: np.ones(shape, kinds.get(port.type, port.type.removeprefix("tensor(").rstrip(")")))
        for port, shape in zip(session.get_inputs(), shapes, strict=True)
    }
    session.run(None, feed)
    return _held() - before


def _held() -> int:
    held: int = psutil.Process().memory_info().rss
    return held


if __name__ == "__main__":
    file, where, asked_for, *texts = sys.argv[1:]
    sizes = [[int(side) for side in text.split("x")] for text in texts]
    openvino_file = file.endswith(".xml")
    print(held_by_openvino(file, where, asked_for, sizes) if openvino_file else held_by_onnxruntime(file, sizes))
