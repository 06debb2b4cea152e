"""What half the MACs are worth when they are served: bytes, latency and throughput, dense, pruned and INT8.

Networks: MobileNetV1-0.75 with its ImageNet weights, and MobileNetV2, ResNet-18, ResNet-50, FBNetV3-B (timm) and
YOLOv8n (ultralytics, AGPL, only where it is installed) with initial weights: times do not depend on their values. Each
is cut to half its MACs by ``fbnet_pruning`` and by Torch-Pruning (L1 norm, one ratio for all layers, found by
bisection). Dense networks and ours are quantized by the entry ``quantization``. MobileNetV1's layers are re-fitted on
300 training pictures after the cut, so that its accuracy in 8 bits says something; nothing is trained.

    python examples/benchmarks/deployment.py prepare --data ../shared/data --work runs/deployment
    python examples/benchmarks/deployment.py measure --work runs/deployment
    python examples/benchmarks/deployment.py accuracy --data ../shared/data --work runs/deployment
    python examples/benchmarks/deployment.py report --work runs/deployment

``prepare`` and ``measure`` go on where they were stopped: one network at a time, ``--net NAME`` does one alone. Needs
``make bench-deps``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import write_page
from timm_import import let_torchvision_import
from torch import Tensor, nn

let_torchvision_import()

import torch_pruning  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nncf_compactprune import create_compressed_model, plan_of  # noqa: E402
from nncf_compactprune.errors import ExportError  # noqa: E402
from nncf_compactprune.export import export_model  # noqa: E402
from nncf_compactprune.run.environment import environment  # noqa: E402
from nncf_compactprune.serving import Serving, open_server  # noqa: E402
from nncf_compactprune.serving.benchmark import NOISY, benchmark  # noqa: E402

HERE = Path(__file__).parent
HALF = 0.5
SIDE = 224
CALIBRATION = 300  # pictures
INT8 = {"algorithm": "quantization", "preset": "mixed", "params": {"start_epoch": None}}
#: ILSVRC's numbers of Imagenette's classes, in the order of their folders
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
MOBILENET_V1 = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = {2: 2, 4: 2, 6: 2, 12: 2}
SETTINGS = {
    "OpenVINO FP32": ("xml", "fp32", Serving(precision="f32")),
    "OpenVINO bf16": ("xml", "fp32", Serving(precision="bf16")),
    "OpenVINO INT8": ("xml", "int8", Serving(precision="f32")),
    "ONNX Runtime FP32": ("onnx", "fp32", Serving()),
    "ONNX Runtime INT8": ("onnx", "int8", Serving()),
}


HEADINGS = (
    *("network", "served", "dense", "pruned", "faster", "Torch-Pruning", "faster"),
    *("INT8 dense", "pruned + INT8", "faster", "bytes", "spread"),
)


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: at stride 2 and even sizes one row and column at the bottom and right only."""

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] == 2:
            input = nn.functional.pad(input, (0, 1, 0, 1))
        return self._conv_forward(input, self.weight, self.bias)


class MobileNetV1(nn.Module):
    """Howard et al. 2017, as Keras has it.

    :param width: multiplies all channels.
    """

    def __init__(self, width: float = 0.75) -> None:
        super().__init__()
        channels = [int(width * c) for c in MOBILENET_V1]
        self.conv1 = SameConv(3, channels[0], 3, 2, 0, bias=False)
        self.conv1_bn = nn.BatchNorm2d(channels[0], eps=1e-3)
        for i, (before, after) in enumerate(itertools.pairwise(channels), start=1):
            stride = STRIDES.get(i, 1)
            depthwise = SameConv(before, before, 3, stride, 2 - stride, groups=before, bias=False)
            self.add_module(f"conv_dw_{i}", depthwise)
            self.add_module(f"conv_dw_{i}_bn", nn.BatchNorm2d(before, eps=1e-3))
            self.add_module(f"conv_pw_{i}", nn.Conv2d(before, after, 1, bias=False))
            self.add_module(f"conv_pw_{i}_bn", nn.BatchNorm2d(after, eps=1e-3))
        self.conv_preds = nn.Conv2d(channels[-1], 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.conv1_bn(self.conv1(x)))
        for i in range(1, len(MOBILENET_V1)):
            for kind in ("dw", "pw"):
                name = f"conv_{kind}_{i}"
                x = nn.functional.relu6(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)


def mobilenet_v1(data: Path) -> nn.Module:
    model = MobileNetV1()
    model.load_state_dict(load_file(data / "mobilenet_v1_075_224_imagenet.safetensors"), strict=False)
    return model.eval()


def of_timm(name: str) -> Callable[[Path], nn.Module]:
    def build(data: Path) -> nn.Module:
        import timm

        torch.manual_seed(0)
        return timm.create_model(name).eval()

    return build


def yolov8n(data: Path) -> nn.Module:
    from ultralytics import YOLO

    model = YOLO("yolov8n.yaml").model.eval()
    model.model[-1].export, model.model[-1].format = True, "onnx"
    return model


NETWORKS: dict[str, tuple[Callable[[Path], nn.Module], str]] = {
    "mobilenet_v1_075": (mobilenet_v1, "conv_preds"),
    "mobilenetv2_100": (of_timm("mobilenetv2_100"), "classifier"),
    "resnet18": (of_timm("resnet18"), "fc"),
    "resnet50": (of_timm("resnet50"), "fc"),
    "fbnetv3_b": (of_timm("fbnetv3_b"), "classifier"),
    "yolov8n": (yolov8n, "model.22"),
}


def peers(model: nn.Module, x: Tensor, head: str, macs: float) -> tuple[nn.Module, float]:
    """Torch-Pruning's network at the MACs of ours or just below, and its own count."""
    dense = torch_pruning.utils.count_ops_and_params(copy.deepcopy(model), x)[0]
    low, high, best = 0.0, 0.9, None
    for _ in range(9):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        torch_pruning.pruner.MagnitudePruner(
            candidate,
            x,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[candidate.get_submodule(head)],
        ).step()
        share = torch_pruning.utils.count_ops_and_params(candidate, x)[0] / dense
        if share <= macs:
            best, high = (candidate, share), ratio
        else:
            low = ratio
    if best is None:
        msg = f"Torch-Pruning reaches no {macs:.0%} of the MACs"
        raise RuntimeError(msg)
    return best


def pictures(data: Path, part: str, count: int) -> Iterator[tuple[Tensor, int]]:
    """Pictures of Imagenette, evenly from the classes, as MobileNetV1 takes them, and their ILSVRC classes."""
    from PIL import Image

    folders = sorted((data / "imagenette" / part).iterdir())
    each = -(-count // len(folders))
    for label, folder in zip(IMAGENETTE, folders, strict=True):
        for path in sorted(folder.glob("*.JPEG"))[:each]:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"), np.float32)
            yield torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1)[None], label


def calibration(name: str, data: Path) -> list[Tensor]:
    if name == "mobilenet_v1_075":
        return [image for image, _ in pictures(data, "train", CALIBRATION)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, SIDE, SIDE, generator=generator) for _ in range(10)]


def compressed(model: nn.Module, entry: dict[str, Any], images: list[Tensor]) -> nn.Module:
    """A copy of a network, compressed at once.

    :param entry: of ``"compression"``.
    :param images: what a loader gives, one by one.
    """
    document = {"input_info": {"sample_size": list(images[0].shape)}, "compression": entry}
    loader = [(image, torch.zeros(1, dtype=torch.int64)) for image in images]
    return create_compressed_model(copy.deepcopy(model), document, loader)[0].strip()


def prepare(name: str, data: Path, work: Path) -> None:
    """Writes the files of a network: dense, pruned by us, pruned by the peer; the first two also as INT8."""
    folder = work / name
    if (folder / "macs.json").is_file():
        print(f"{name}: prepared")
        return
    build, head = NETWORKS[name]
    dense, images = build(data), calibration(name, data)
    entry: dict[str, Any] = {"algorithm": "fbnet_pruning", "budget": {"macs": HALF}, "params": {"schedule": "one_shot"}}
    if name == "mobilenet_v1_075":
        entry["initializer"] = {"refit": {"num_samples": CALIBRATION}}
    ours = compressed(dense, entry, images)
    plan = plan_of(ours)
    assert plan is not None
    macs: dict[str, Any] = {"dense": plan.before.macs, "ours": plan.after.macs}
    networks = {"dense": dense, "ours": ours}
    try:
        networks["peer"], macs["peer_share"] = peers(dense, images[0], head, plan.after.macs / plan.before.macs)
    except Exception as error:  # a network that the peer does not prune is a finding
        macs["peer_failed"] = f"{type(error).__name__}: {error}"
    dynamic = name != "yolov8n"
    for kind, model in networks.items():
        export_model(model, images[0], folder / kind, precisions=["fp32"], dynamic_batch=dynamic)
        if kind != "peer":
            export_model(compressed(model, INT8, images), images[0], folder / kind, dynamic_batch=dynamic)
    (folder / "macs.json").write_text(json.dumps(macs))
    print(f"{name}: {macs}", flush=True)


def measure(name: str, work: Path, seconds: float) -> None:
    """Times a network's files, dense, ours and the peer's in turns, once for every setting; keeps what is there."""
    folder = work / name
    rows = folder / "rows.jsonl"
    done = {json.loads(line)["setting"] for line in rows.read_text().splitlines()} if rows.is_file() else set()
    for setting, (suffix, precision, serving) in SETTINGS.items():
        if setting in done:
            continue
        tail = "" if precision == "fp32" else f"_{precision}"
        kinds = [k for k in ("dense", "ours", "peer") if (folder / k / f"model{tail}.{suffix}").is_file()]
        # The FP32 file of the dense network is what pruned and quantized ones are compared with.
        paths = [folder / kind / f"model{tail}.{suffix}" for kind in kinds]
        reference = folder / "dense" / f"model.{suffix}"
        try:
            found = benchmark(
                list(dict.fromkeys([reference, *paths])),
                serving=serving,
                seconds=seconds,
                memory=False,
                sample_size=(3, SIDE, SIDE),
            )
        except ExportError as error:  # a runtime that does not run a file is a finding
            print(f"{name}, {setting}: {error}")
            with rows.open("a") as file:
                file.write(json.dumps({"network": name, "setting": setting, "failed": str(error)[:300]}) + "\n")
            continue
        row = {"network": name, "setting": setting, "steadiness": found.steadiness}
        for one in found.timings:
            kind = one.path.parent.name + ("" if "_int8" not in one.path.name else " int8")
            row[kind] = {
                "ms": one.median_ms, "p90": one.p90_ms, "ratio": one.ratio, "spread": one.ratio_spread,
                "per_second": one.samples_per_second, "bytes": one.bytes, "in": one.arithmetic,
            }  # fmt: skip
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{name}, {setting}: " + ", ".join(f"{k} {v['ms']:.2f} ms" for k, v in row.items() if isinstance(v, dict))
        )


def accuracy(data: Path, work: Path, count: int) -> str:
    """Top-1 of MobileNetV1's files among 1,000 classes, on Imagenette's validation pictures, as Markdown."""
    folder = work / "mobilenet_v1_075"
    samples = list(pictures(data, "val", count))
    lines = [
        "# MobileNetV1-0.75 at half of its MACs, in 8 bits",
        "",
        f"Top-1 in percent among 1,000 classes, {len(samples):,} validation pictures of ten. Cut by `fbnet_pruning`,",
        f"re-fitted and quantized on {CALIBRATION} training pictures of these ten, nothing trained. Written by",
        "`python examples/benchmarks/deployment.py accuracy`.",
        "",
        "| file | computed in | dense | half of the MACs |",
        "| --- | --- | ---: | ---: |",
    ]
    for name, serving in (
        ("model.xml", Serving(precision="f32")),
        ("model.xml", Serving()),
        ("model_int8.xml", Serving()),
        ("model_int8.onnx", Serving()),
    ):
        shares = []
        for kind in ("dense", "ours"):
            server = open_server(folder / kind / name, serving)
            right = sum(int(server.run([image.numpy()])[0].argmax()) == label for image, label in samples)
            shares.append(f"{100 * right / len(samples):.2f}")
        lines.append(f"| {name} | {server.arithmetic} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def report(work: Path) -> str:
    """What was measured, as Markdown."""
    lines = [
        "# Half the MACs, served",
        "",
        *(f"{k}: {v}  " for k, v in environment().items()),
        "",
    ]
    lines += [
        "Median milliseconds of one request, batch 1, files in turns. Above 1 is faster than the dense network, in the",
        "same rounds: in the same precision, and for INT8 in FP32. The last column is the spread of a fixed piece of",
        "work meanwhile.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{' --- |' * 2}{' ---: |' * (len(HEADINGS) - 2)}",
    ]
    gains: dict[str, list[float]] = {}
    noisy, unable = 0, []
    for name in NETWORKS:
        rows = work / name / "rows.jsonl"
        for line in rows.read_text().splitlines() if rows.is_file() else ():
            row = json.loads(line)
            if "failed" in row:
                lines.append(f"| {name} | {row['setting']} | does not run |{' - |' * (len(HEADINGS) - 3)}")
                continue
            noisy += row["steadiness"] > NOISY
            cells = [name, row["setting"], _ms(row, "dense")]
            for kind in ("ours", "peer"):
                cells += [_ms(row, kind), _faster(row, kind)]
            cells += [_ms(row, "dense int8"), _ms(row, "ours int8"), _faster(row, "ours int8")]
            key = "ours int8" if "ours int8" in row else "ours"
            cells += [f"{row[key]['bytes'] / row['dense']['bytes']:.0%}", f"{row['steadiness']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
            gains.setdefault(f"{row['setting']}, {key}", []).append(1 / row[key]["ratio"])
            if "peer" in row:
                gains.setdefault(f"{row['setting']}, peer", []).append(1 / row["peer"]["ratio"])
                gains.setdefault(f"{row['setting']}, ours, where the peer runs", []).append(1 / row[key]["ratio"])
        told = work / name / "macs.json"
        failed = json.loads(told.read_text()).get("peer_failed") if told.is_file() else None
        if failed:
            unable.append(f"Torch-Pruning does not prune {name}: {failed}")
    lines += [line for sentence in unable for line in ("", sentence)]
    if noisy:
        lines += ["", f"In {noisy} rows the spread was above {NOISY:.0%}: the machine did other work."]
    lines += ["", "Geometric means:", ""]
    for what, values in gains.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append(f"- {what}: {mean:.2f} times faster than dense ({len(values)} networks)")
    return "\n".join(lines) + "\n"


def _ms(row: dict[str, Any], kind: str) -> str:
    return f"{row[kind]['ms']:.2f}" if kind in row else "-"


def _faster(row: dict[str, Any], kind: str) -> str:
    return f"{1 / row[kind]['ratio']:.2f}" if kind in row else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "measure", "accuracy", "report"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/deployment"))
    parser.add_argument("--net", action="append", choices=NETWORKS)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each file and setting")
    parser.add_argument("--pictures", type=int, default=1500)
    arguments = parser.parse_args()
    if arguments.step == "accuracy":
        write_page(HERE / "deployment_accuracy.md", accuracy(arguments.data, arguments.work, arguments.pictures))
    elif arguments.step == "report":
        write_page(HERE / "deployment.md", report(arguments.work))
    else:
        for name in arguments.net or NETWORKS:
            if arguments.step == "prepare":
                prepare(name, arguments.data, arguments.work)
            elif (arguments.work / name / "macs.json").is_file():
                measure(name, arguments.work, arguments.seconds)


if __name__ == "__main__":
    main()
