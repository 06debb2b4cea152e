"""What INT8 sums of 16 bits cost on processors without VNNI, and what ``overflow_fix`` leaves of that.

    python examples/benchmarks/saturation.py --data FOLDER

FOLDER holds what ``data_free.py`` reads. ResNet-20 on CIFAR-10's test images and MobileNetV1-0.75 on 1,500 validation
pictures, among 1,000 classes; quantized on training images, by ``quantization`` and ``data_free_quantization``, and
judged in PyTorch, OpenVINO and ONNX Runtime. On a processor whose sums do not saturate all three agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data_free import MOBILE, Bench, Pictures
from pages import measured_on, write_page
from torch import Tensor

from nncf_compactprune import export_model
from nncf_compactprune.serving import Serving, open_server
from nncf_compactprune.serving.saturation import MOST, largest_sum
from nncf_compactprune.serving.server import Server

NETWORKS: dict[str, type[Bench]] = {"resnet20": Bench, MOBILE: Pictures}
CALIBRATION = 300
ENTRIES: dict[str, dict[str, Any]] = {
    "quantization": {"preset": "mixed", "params": {"start_epoch": None, "subset_size": CALIBRATION}},
    "data_free_quantization": {"generation": {"source": "dataset", "samples": CALIBRATION}},
}
RUNTIMES = {"OpenVINO": ".xml", "ONNX Runtime": ".onnx"}
FIXES = ("disable", "first_layer_only", "enable")


def rows(data: Path) -> Iterator[list[str]]:
    """Cells of the table, as they are measured."""
    for name, kind in NETWORKS.items():
        bench = kind(data, name)
        yield [name, "float", "", percent(bench.accuracy(bench.network())), "", ""]
        for algorithm in ENTRIES:
            for fix in FIXES:
                model = bench.by_entries({"algorithm": algorithm, "overflow_fix": fix, **ENTRIES[algorithm]}, real=True)
                cells = [name, f"`{algorithm}`", f'`"{fix}"`', percent(bench.accuracy(model.eval()))]
                with tempfile.TemporaryDirectory() as folder:
                    for suffix, precision in ((".xml", "f32"), (".onnx", None)):
                        (file,) = export_model(model, bench.example, Path(folder) / f"model{suffix}")
                        server = open_server(file.path, Serving(precision=precision))
                        cells.append(percent(bench.accuracy(partial(served, server))))
                yield cells


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def served(server: Server, images: Tensor) -> Tensor:
    return torch.from_numpy(server.run([images.numpy()])[0])


def main(data: Annotated[Path, typer.Option()] = Path("../shared/data")) -> None:
    sums = ", ".join(f"{name} {largest_sum(suffix, 'CPU'):.0f}" for name, suffix in RUNTIMES.items())
    lines = []
    for cells in rows(data):
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = [
        "# INT8 where sums saturate", "",
        "Top-1 in percent: ResNet-20 on 10,000 CIFAR-10 test images, MobileNetV1-0.75 on 1,500 ImageNet validation",
        f"pictures of ten classes among 1,000. Quantized on {CALIBRATION} training images. Written by `saturation.py`.",
        f"The largest sum of a convolution of {MOST} products of 1 on this processor: {sums}.", "",
        "| network | by | `overflow_fix` | PyTorch | OpenVINO | ONNX Runtime |", "|---|---|---|---:|---:|---:|",
        *lines, "", measured_on(),
    ]  # fmt: skip
    write_page(Path(__file__).with_suffix(".md"), "\n".join(text) + "\n")


if __name__ == "__main__":
    typer.run(main)
