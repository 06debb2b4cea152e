"""What multiples of 8, 16 and 32 give in time at the same MACs, computed in float32 and as OpenVINO serves by default.

Networks with their initial weights are pruned to 50 % of their MACs; the widths of all variants and the dense network
are timed in OpenVINO in turns, on one thread, batch 1. No accuracy is measured: coarser widths leave narrow layers less
choice, so the default asks for multiples of 16 and 32 in wide layers only.

    python examples/benchmarks/round_to.py
    pip install --no-deps ultralytics opencv-python-headless ultralytics-thop   # AGPL; then YOLOv8n is measured, too
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import torch
from pages import measured_on, write_page
from timm_import import let_torchvision_import
from torch import nn

let_torchvision_import()

import timm  # noqa: E402

from nncf_compactprune import export_model, prune  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {"auto": {}, "8": {"round_to": 8}, "16": {"round_to": 16}, "32": {"round_to": 32}}
RUNS, WARM_UP = 25, 4


def yolo() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False).eval()  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: timm.create_model("resnet18"), 224),
    "mobilenetv2_100": (lambda: timm.create_model("mobilenetv2_100"), 224),
    **({"yolov8n": (yolo, 320)} if importlib.util.find_spec("ultralytics") else {}),
}


def medians(files: dict[str, Path], size: int, precision: str) -> dict[str, float]:
    """Milliseconds of a request, all files in turns.

    :param files: by what they are called.
    :param size: height and width of the image.
    :param precision: what OpenVINO computes in.
    """
    core, image = openvino.Core(), torch.randn(1, 3, size, size).numpy()
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1,
    }  # fmt: skip
    requests = {name: core.compile_model(file, "CPU", settings).create_infer_request() for name, file in files.items()}
    taken: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(RUNS):
        for name, request in requests.items():
            started = time.perf_counter()
            request.infer([image])
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values[WARM_UP:]) for name, values in taken.items()}


def row(name: str, folder: Path, precisions: list[str]) -> str:
    """One network's row.

    :param name: a key of :data:`NETWORKS`.
    :param folder: for its files.
    :param precisions: what to compute in.
    """
    build, size = NETWORKS[name]
    files, image = {}, torch.randn(1, 3, size, size)
    for variant, options in {"dense": None, **VARIANTS}.items():
        torch.manual_seed(0)
        model = build().eval()
        if options is not None:
            prune(model, image, budget={"macs": 0.5}, **options)
        files[variant] = folder / name / f"{variant}.xml"
        export_model(model, image, files[variant], dynamic_batch=False)
    cells = [name, str(size)]
    for precision in precisions:
        found = medians(files, size, precision)
        cells += [f"{found['dense']:.2f} ms", *(f"{found[variant] / found['dense']:.2f}" for variant in VARIANTS)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    served_in = "bf16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    precisions = list(dict.fromkeys(["f32", served_in]))
    heads = [f"{p}: {word}" for p in precisions for word in ("dense", *(f"`{v}`" for v in VARIANTS))]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder), precisions) for name in NETWORKS]
    lines = [
        "# Time at half of the MACs, by `round_to`", "",
        "Written by `round_to.py`: time over that of the dense network, OpenVINO, one thread, batch 1, in turns. "
        f"OpenVINO serves in {served_in} here by default.", "",
        f"| network | pixels | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2), *rows, "",
        measured_on(),
    ]  # fmt: skip
    write_page(Path(__file__).with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
