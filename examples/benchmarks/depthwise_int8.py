"""A range for every channel of a depthwise convolution's input, as NNCF chooses, or one for all: what each is worth.

Networks: MobileNetV1-0.75 with its ImageNet weights, on Imagenette; the package's digits network, trained here; and
MobileNetV2 (timm) with initial weights, for times alone. Each is quantized by ``quantization`` with
``activations.per_channel`` null and false, and written to both formats.

    python examples/benchmarks/depthwise_int8.py --data ../shared/data --work runs/depthwise_int8

Accuracy is compared picture by picture; times are medians of single requests, files in turns. Prints Markdown. Needs
``make bench-deps``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from deployment import (  # torchvision comes first
    CALIBRATION,
    INT8,
    SIDE,
    calibration,
    compressed,
    mobilenet_v1,
    of_timm,
    pictures,
)
from torch import Tensor, nn

from nncf_compactprune.export import export_model
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.networks.digits_net import digits_net
from nncf_compactprune.run.training import fit
from nncf_compactprune.serving import Serving, open_server
from nncf_compactprune.serving.benchmark import benchmark

VARIANTS: dict[str, bool | None] = {"every channel": None, "one": False}
SERVED = {"OpenVINO": ("xml", Serving(precision="f32")), "ONNX Runtime": ("onnx", Serving())}
NETWORKS = ("digits", "mobilenet_v1_075", "mobilenetv2_100")

Samples = list[tuple[Tensor, int]]


def network(name: str, data: Path, count: int) -> tuple[nn.Module, list[Tensor], Samples]:
    """A trained network, what its ranges are measured on, and labelled test pictures."""
    if name == "mobilenet_v1_075":
        return mobilenet_v1(data), calibration(name, data), list(pictures(data, "val", count))
    if name == "mobilenetv2_100":
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(1, 3, SIDE, SIDE, generator=generator) for _ in range(16)]
        return of_timm(name)(data), noise, [(one, 0) for one in noise]
    torch.manual_seed(0)
    model, dataset = digits_net(), resolve_dataset("digits")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    fit(model, dataset.train_loader(64, seed=0), optimizer, epochs=12)
    seen = [image for images, _ in dataset.train_loader(1, seed=1) for image in images[None]][:CALIBRATION]
    tested = [(images, int(labels)) for images, labels in dataset.test_loader(1)]
    return model.eval(), seen, tested[:count]


def quantized(model: nn.Module, seen: list[Tensor], per_channel: bool | None) -> nn.Module:
    return compressed(model, {**INT8, "activations": {"per_channel": per_channel}}, seen)


def measure(name: str, data: Path, work: Path, count: int, seconds: float) -> dict[str, Any]:
    model, seen, tested = network(name, data, count)
    folder = work / name
    export_model(model, seen[0], folder / "float", precisions=["fp32"])
    for variant, per_channel in VARIANTS.items():
        export_model(quantized(model, seen, per_channel), seen[0], folder / variant)
    with torch.no_grad():
        expected = [model(image).numpy() for image, _ in tested]
    float_right = [one.argmax() == label for one, (_, label) in zip(expected, tested, strict=True)]
    found: dict[str, Any] = {"network": name, "pictures": len(tested), "torch": float(sum(float_right)) / len(tested)}
    for runtime, (suffix, serving) in SERVED.items():
        files = {"float": folder / "float" / f"model.{suffix}"}
        files |= {variant: folder / variant / f"model_int8.{suffix}" for variant in VARIANTS}
        timed = benchmark(
            list(files.values()), serving=serving, seconds=seconds, memory=False, sample_size=seen[0].shape[1:]
        )
        right = {}
        for variant, timing in zip(files, timed.timings, strict=True):
            server = open_server(files[variant], serving)
            outputs = [server.run([image.numpy()])[0] for image, _ in tested]
            right[variant] = [one.argmax() == label for one, (_, label) in zip(outputs, tested, strict=True)]
            noise = sum(float(((a - b) ** 2).sum()) for a, b in zip(expected, outputs, strict=True))
            found[f"{runtime}, {variant}"] = {
                "ms": timing.median_ms,
                "ratio": timing.ratio,
                "accuracy": float(sum(right[variant])) / len(tested),
                "error": (noise / sum(float((a**2).sum()) for a in expected)) ** 0.5,
            }
        pairs = list(zip(*(right[variant] for variant in VARIANTS), strict=True))
        found[f"{runtime}, won and lost by one range"] = [
            sum(bool(b and not a) for a, b in pairs),
            sum(bool(a and not b) for a, b in pairs),
        ]
    return found


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | runtime | ranges | ms | of float | top-1 | error | won : lost |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        for runtime in SERVED:
            for variant in ("float", *VARIANTS):
                one = row[f"{runtime}, {variant}"]
                trained = row["network"] != "mobilenetv2_100"
                won, lost = row[f"{runtime}, won and lost by one range"]
                lines.append(
                    f"| {row['network']} | {runtime} | {variant} | {one['ms']:.2f} | {one['ratio']:.2f} | "
                    f"{format(one['accuracy'], '.2%') if trained else '-'} | {one['error']:.1%} | "
                    f"{f'{won} : {lost}' if trained and variant == 'one' else '-'} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/depthwise_int8"))
    parser.add_argument("--net", action="append", choices=NETWORKS)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each file and runtime")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.net or NETWORKS:
        rows.append(measure(name, arguments.data, arguments.work, arguments.pictures, arguments.seconds))
        print(json.dumps(rows[-1]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
