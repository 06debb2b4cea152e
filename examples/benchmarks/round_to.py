"""What multiples of 8, 16 and 32 give in time at the same MACs, in OpenVINO and ONNX Runtime.

Networks with their initial weights are pruned to 50 % of their MACs; the widths of all variants and the dense network
are timed in turns, on one thread, batch 1. OpenVINO computes in float32 and as it serves by default. No accuracy is
measured: coarser widths leave narrow layers less choice, so the default leaves every layer eight widths at least.

    python examples/benchmarks/round_to.py
    pip install --no-deps ultralytics opencv-python-headless ultralytics-thop   # AGPL; then YOLOv8n is measured, too
"""

from __future__ import annotations

import importlib.util
import tempfile
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
from nncf_compactprune.serving import Serving  # noqa: E402
from nncf_compactprune.serving.benchmark import benchmark  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "`1`": {"round_to": 1}, "`auto`": {}, "`8`": {"round_to": 8}, "`16`": {"round_to": 16}, "`32`": {"round_to": 32},
}  # fmt: skip
SECONDS = 4.0  # for each file


def yolo() -> nn.Module:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False).eval()  # type: ignore[no-any-return]


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (of_timm(name), 224) for name in ("resnet18", "mobilenetv2_100", "fbnetv3_b")},
    **({"yolov8n": (yolo, 320)} if importlib.util.find_spec("ultralytics") else {}),
}


def rows(name: str, folder: Path, precisions: list[str]) -> list[str]:
    """One network's rows, one for each way to serve it.

    :param name: a key of :data:`NETWORKS`.
    :param folder: for its files.
    :param precisions: what OpenVINO computes in.
    """
    build, size = NETWORKS[name]
    image = torch.randn(1, 3, size, size)
    for at, options in enumerate([None, *VARIANTS.values()]):
        torch.manual_seed(0)
        model = build().eval()
        if options is not None:
            prune(model, image, budget={"macs": 0.5}, **options)
        export_model(model, image, folder / str(at), precisions=["fp32"], dynamic_batch=False)
    lines = []
    ways = [(f"OpenVINO, {precision}", "xml", Serving(threads=1, precision=precision)) for precision in precisions]
    for served, suffix, serving in (*ways, ("ONNX Runtime", "onnx", Serving(threads=1))):
        files = [folder / str(at) / f"model.{suffix}" for at in range(len(VARIANTS) + 1)]
        dense, *found = benchmark(files, serving=serving, seconds=SECONDS, memory=False).timings
        cells = [name, str(size), served, f"{dense.median_ms:.2f} ms", *(f"{one.ratio:.2f}" for one in found)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    served_in = "bf16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    precisions = list(dict.fromkeys(["f32", served_in]))
    heads = ["network", "pixels", "served by", "dense", *VARIANTS]
    with tempfile.TemporaryDirectory() as folder:
        found = [line for name in NETWORKS for line in rows(name, Path(folder) / name, precisions)]
    lines = [
        "# Time at half of the MACs, by `round_to`", "",
        "Written by `round_to.py`: time over that of the dense network, one thread, batch 1, in turns. "
        f"OpenVINO serves in {served_in} here by default.", "",
        f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *found, "",
        measured_on(),
    ]  # fmt: skip
    write_page(Path(__file__).with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
