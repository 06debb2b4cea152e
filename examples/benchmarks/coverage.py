"""Which networks can be pruned: this package and Torch-Pruning over timm's families and Hugging Face's vision models.

    python examples/benchmarks/coverage.py                      # everything: about an hour on two cores
    python examples/benchmarks/coverage.py --only resnet,vit    # some families
    python examples/benchmarks/coverage.py --report             # only writes the table and the picture anew

Every network is built without pretrained weights (nothing is downloaded), its BatchNorm statistics and scales drawn at
random so that no channel is trivially dead, and pruned to half of its MACs (or to the least that its pinned channels
allow) by L1 magnitude at the same share of every group. Where pinned channels keep more than 80 % of the MACs, channels
under a LayerNorm or behind standardised weights go too (``allow_approximate``, "by consent" in the table: exact against
a masked network whose norms see the kept channels alone). A network counts as *pruned* when MACs went, as *exact* when
the masked = compact check holds to 1e-5, and as *trains* when forward and backward run in training mode.

Torch-Pruning gets its recommended settings: group L1 importance, the classifier ignored, the heads of fused attention
named; channel ratio 0.3, which is half of the MACs. For it, *pruned* means that it ran, parameters went, and forward
and backward of the result run; equality is not asked of it. Where it ends, both are timed in turns on fresh copies in
the same process, three times where that takes a few seconds, and their medians compared; each process first prunes a
network of two layers with both, so that nobody pays for imports. A worker that takes longer than 60 s is ended.
Results are kept per network in ``coverage.jsonl``: a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
RESULTS = HERE / "coverage.jsonl"
LIMIT_SECONDS = 60.0


# -- the networks ---------------------------------------------------------------------------------------------------


def timm_families() -> dict[str, str]:
    """One small network of every family (the name up to its first digit), chosen once by parameter count; of families
    without a small one a few layers (``depth=4``)."""
    return json.loads((HERE / "coverage_models.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def build_timm(name: str) -> tuple[nn.Module, Any]:
    from timm_import import let_torchvision_import

    let_torchvision_import()
    import timm

    name, *options = name.split()
    model = timm.create_model(name, **{key: int(value) for key, value in (o.split("=") for o in options)})
    return model, torch.randn(2, *model.default_cfg["input_size"])


def hugging_face() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Vision classes on shrunken configurations."""
    from timm_import import let_torchvision_import

    let_torchvision_import()  # parts of transformers import it where it is installed
    import transformers as hf

    def classifier(config: Any, size: int = 64, wrap: Any = None) -> Callable[[], tuple[nn.Module, Any]]:
        kind = wrap or hf.AutoModelForImageClassification.from_config
        return lambda: (kind(config), {"pixel_values": torch.randn(2, 3, size, size)})

    tokens = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64,
        "patch_size": 16,
    }  # fmt: skip
    stages = {"depths": [1, 1], "hidden_sizes": [32, 64]}
    swin = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    backbone = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
                               out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    return {
        "ResNet": classifier(hf.ResNetConfig(embedding_size=16, **stages)),
        "RegNet": classifier(hf.RegNetConfig(embedding_size=16, groups_width=8, **stages)),
        "MobileNetV1": classifier(hf.MobileNetV1Config(depth_multiplier=0.5)),
        "MobileNetV2": classifier(hf.MobileNetV2Config(depth_multiplier=0.5)),
        "EfficientNet": classifier(hf.EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640)),
        "ConvNeXt": classifier(hf.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64])),
        "ConvNeXtV2": classifier(hf.ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64])),
        "ViT": classifier(hf.ViTConfig(**tokens)),
        "DeiT": classifier(hf.DeiTConfig(**tokens), 64, hf.DeiTForImageClassification),
        "BEiT": classifier(hf.BeitConfig(use_relative_position_bias=True, **tokens)),
        "Swin": classifier(hf.SwinConfig(**swin)),
        "SwinV2": classifier(hf.Swinv2Config(**swin)),
        "SegFormer": classifier(
            hf.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4])
        ),
        "MobileViT": classifier(
            hf.MobileViTConfig(hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 64]), 128
        ),
        "MobileViTV2": classifier(hf.MobileViTV2Config(width_multiplier=0.5), 128),
        "PoolFormer": classifier(hf.PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64])),
        "LeViT": classifier(
            hf.LevitConfig(image_size=64, hidden_sizes=[32, 48, 64], key_dim=[8, 8, 8], num_attention_heads=[2, 3, 4],
                           depths=[1, 1, 1]),
            64, hf.LevitForImageClassification,
        ),
        "CvT": classifier(hf.CvtConfig(embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3])),
        "DINOv2": classifier(hf.Dinov2Config(**{k: v for k, v in tokens.items() if k != "intermediate_size"})),
        "DETR": classifier(
            hf.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=backbone,
                          d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                          decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=10),
            128, hf.DetrForObjectDetection,
        ),
        "YOLOS": classifier(
            hf.YolosConfig(**{**tokens, "image_size": [64, 64]}, num_detection_tokens=10), 64,
            hf.YolosForObjectDetection
        ),
        "UPerNet": classifier(
            hf.UperNetConfig(backbone=None, use_pretrained_backbone=False, backbone_config=backbone, hidden_size=32,
                             auxiliary_channels=16, use_auxiliary_head=False),
            128, hf.UperNetForSemanticSegmentation,
        ),
    }  # fmt: skip


class UNet(nn.Module):
    """Two levels down and up with skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

        self.a, self.b, self.c = block(3, 32), block(32, 64), block(64, 128)
        self.up_b, self.up_a = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.join_b, self.join_a = block(128, 64), block(64, 32)
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.max_pool2d(a, 2))
        c = self.c(nn.functional.max_pool2d(b, 2))
        b = self.join_b(torch.cat([self.up_b(c), b], 1))
        return self.out(self.join_a(torch.cat([self.up_a(b), a], 1)))


class DeepLab(nn.Module):
    """Atrous spatial pyramid pooling on a small strided stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1))
        self.branches = nn.ModuleList(nn.Conv2d(64, 32, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.pool, self.project, self.out = nn.Conv2d(64, 32, 1), nn.Conv2d(128, 32, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        pooled = self.pool(y.mean((2, 3), keepdim=True)).expand(-1, -1, *y.shape[2:])
        y = self.project(torch.cat([*(branch(y) for branch in self.branches), pooled], 1)).relu()
        return nn.functional.interpolate(self.out(y), x.shape[2:], mode="bilinear")


def segmentation() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    return {net.__name__: lambda net=net: (net(), torch.randn(2, 3, 64, 64)) for net in (UNet, DeepLab)}


def networks() -> Iterator[tuple[str, str, str]]:
    """(library, family, name)"""
    yield from (("timm", family, name) for family, name in timm_families().items())
    yield from (("transformers", name, name) for name in hugging_face())
    yield from (("segmentation", name, name) for name in segmentation())


def build(library: str, name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if library == "timm":
        model, x = build_timm(name)
    else:
        model, x = (hugging_face() if library == "transformers" else segmentation())[name]()
    return with_varied_norms(model), x


def with_varied_norms(model: nn.Module) -> nn.Module:
    """BatchNorms that are not the identity, so that no channel is trivially dead."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return model.eval()


# -- one measurement --------------------------------------------------------------------------------------------------


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def loss_of(model: nn.Module, x: Any) -> Tensor:
    outputs = [t for t in tree_leaves(call(model, x)) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum(t.square().mean() for t in outputs)  # type: ignore[return-value]


def trains(model: nn.Module, x: Any) -> bool:
    """Forward and backward in training mode."""
    model.train()
    try:
        loss_of(model, x).backward()
    except Exception:
        return False
    finally:
        model.eval()
        model.zero_grad()
    return True


def kind_of(model: nn.Module, x: Any) -> str:
    """Convolutional, with attention, or other, by the operations that run."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            call(model, x)
    except AssertionError:  # its module tracker does not follow every network; the counts are there all the same
        pass
    flops = counter.get_flop_counts().get("Global", {})
    total = sum(flops.values())
    names = " ".join(type(module).__name__.lower() for module in model.modules())
    if re.search(r"attention|attn|mhsa|xca", re.sub(r"attentionpool|channelattn|spatialattn|splitattn", "", names)):
        return "attention"
    convolution = sum(count for op, count in flops.items() if "conv" in str(op))
    return "convolutional" if convolution > total / 2 else "other"


UNIFORM = {"importance": "l1", "allocation": "uniform", "round_to": 1, "max_ratio": 1.0}


def ours(model: nn.Module, x: Any, settings: dict[str, Any] = UNIFORM, training: Any = None) -> dict[str, Any]:
    """Prunes a network, and says what came of it.

    :param model: pruned in place.
    :param x: example inputs.
    :param settings: of the pruning.
    :param training: what it is called with in training; None: the same.
    """
    from nncf_compactprune import prune
    from nncf_compactprune.errors import BudgetError, CompactPruneError, NothingPrunableError

    training = x if training is None else training
    result: dict[str, Any] = {}
    try:
        # half of the MACs; or as far down as pinned channels allow; or the same with channels under a LayerNorm
        for by_consent, worth_it in ((False, 0.8), (True, 1.0)):
            started = time.perf_counter()
            try:
                done = prune(model, x, budget={"macs": 0.5}, allow_approximate=by_consent, **settings)
            except NothingPrunableError:
                if by_consent:
                    raise
                continue
            except BudgetError as error:
                least = float(re.search(r"the least is [\d,]+ \(([\d.]+)%\)", str(error))[1]) / 100  # type: ignore[index]
                if least > worth_it:
                    continue
                budget = {"macs": least + 0.1 * (1 - least)}
                started = time.perf_counter()
                done = prune(model, x, budget=budget, allow_approximate=by_consent, **settings)
            break
        result["by_consent"] = by_consent
        result["seconds"] = time.perf_counter() - started
        floor = done.graph.cost.macs([1] * len(done.graph.groups)), done.graph.cost.params([1] * len(done.graph.groups))
        result |= {
            "groups": len(done.graph.groups),
            "pinned": len(done.graph.pinned),
            "reasons": Counter(p.reason.split(" in '")[0] for p in done.graph.pinned if p.reason != "model output"),
            "macs_left": done.plan.after.macs / max(done.plan.before.macs, 1),
            "macs_reachable": 1 - floor[0] / max(done.graph.macs, 1),
            "params_reachable": 1 - floor[1] / max(done.graph.params, 1),
            "error": done.self_check.error,
            "check_seconds": done.self_check.seconds,
            "check": str(done.self_check),
            "trains": trains(model, training),
        }
        result["status"] = "exact" if result["macs_left"] < 0.99 and result["trains"] else "not smaller"
        if not result["trains"]:
            result["status"] = "does not train"
    except CompactPruneError as error:
        result |= {"status": "refused", "why": str(error).splitlines()[0][:300]}
    except Exception as error:
        result |= {"status": "crashed", "why": f"{type(error).__name__}: {error}"[:300]}
    return result


def theirs(model: nn.Module, x: Any, training: Any = None) -> dict[str, Any]:
    import torch_pruning

    training = x if training is None else training
    before = sum(p.numel() for p in model.parameters())
    ignored = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in
               ("classifier", "fc", "head", "head_dist", "head_drop")]  # fmt: skip
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is not None:
        found = get_classifier()
        ignored += [m for m in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(m, nn.Module)]
    heads = {
        module.qkv: module.num_heads
        for module in model.modules()
        if isinstance(getattr(module, "num_heads", None), int) and isinstance(getattr(module, "qkv", None), nn.Linear)
    }
    started = time.perf_counter()
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, x, importance=torch_pruning.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.3,
            ignored_layers=ignored, num_heads=heads, prune_num_heads=False, prune_head_dims=True,
        )  # fmt: skip
        pruner.step()
        seconds = time.perf_counter() - started
        for module in model.modules():
            if getattr(module, "qkv", None) in heads:  # as its own example for vision transformers does
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
                if hasattr(module, "attn_dim"):
                    module.attn_dim = module.head_dim * module.num_heads
        after = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            call(model, x)
        status = "pruned" if trains(model, training) else "does not train"
        if after > 0.99 * before:
            status = "not smaller"
        return {"status": status, "seconds": seconds, "params_left": after / before}
    except Exception as error:
        return {"status": "crashed", "why": f"{type(error).__name__}: {error}"[:300]}


def onnx_works(model: nn.Module, x: Any) -> bool:
    from tempfile import TemporaryDirectory

    from nncf_compactprune import export_model

    with TemporaryDirectory() as folder:
        try:
            export_model(model, x, Path(folder) / "model.onnx")
        except Exception:
            return False
    return True


def paired(model: nn.Module, x: Any) -> dict[str, Any]:
    """The peer's result, and where it ends the median times of both, in turns."""
    dense = copy.deepcopy(model)
    results = [(theirs(model, x), {})]
    if "seconds" not in results[0][0]:
        return {"theirs": results[0][0]}
    started = time.perf_counter()
    results[0] = (results[0][0], ours(copy.deepcopy(dense), x))
    while len(results) < 3 and time.perf_counter() - started < 4:
        mine = ours(copy.deepcopy(dense), x)
        results.append((theirs(copy.deepcopy(dense), x), mine))
    row: dict[str, Any] = {"theirs": results[0][0]}
    row["theirs"]["seconds"] = statistics.median(peer["seconds"] for peer, _ in results)
    if all("seconds" in mine for _, mine in results):
        row["paired_seconds"] = statistics.median(mine["seconds"] for _, mine in results)
        row["paired_check_seconds"] = statistics.median(mine["check_seconds"] for _, mine in results)
    return row


def warm_up() -> None:
    """Both sides once, on next to nothing."""
    for side in (ours, theirs):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        side(net.eval(), torch.randn(2, 3, 8, 8))


def measure(side: str, library: str, name: str, with_onnx: bool) -> dict[str, Any]:
    """One side's result on one network."""
    warnings.filterwarnings("ignore")
    model, x = build(library, name)
    if side == "theirs":
        return paired(model, x)
    row: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters()), "kind": kind_of(model, x)}
    row["dense_trains"] = trains(model, x)
    row["ours"] = ours(model, x)
    if with_onnx and row["ours"]["status"] == "exact":
        row["onnx"] = onnx_works(model, x)
        row["onnx_dense"] = row["onnx"] or onnx_works(*build(library, name))
    return row


# -- the sweep -----------------------------------------------------------------


def _worker(pipe: Any, measure: Callable[..., dict[str, Any]]) -> None:
    warnings.filterwarnings("ignore")
    warm_up()
    while True:
        task = pipe.recv()
        try:
            pipe.send(measure(*task))
        except Exception as error:
            pipe.send({task[0]: {"status": "crashed", "why": f"{type(error).__name__}: {error}"[:300]}})


class Worker:
    """A process that is started anew when a network takes too long or takes it down.

    :param measure: what it does with a task.
    :param limit_seconds: how long one may take.
    """

    def __init__(self, measure: Callable[..., dict[str, Any]], limit_seconds: float) -> None:
        self._measure, self._limit = measure, limit_seconds
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_worker, args=(other, self._measure), daemon=True)
        self._process.start()
        other.close()

    def __call__(self, *task: Any) -> dict[str, Any]:
        self._pipe.send(task)
        why = f"no result in {self._limit:.0f} s"
        try:
            if self._pipe.poll(self._limit):
                return self._pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            why = "the process died"
        self._process.kill()
        self._process.join()
        self._start()
        return {task[0]: {"status": "crashed", "why": why}}


def sweep(only: set[str], onnx_every: int) -> None:
    """First what this package does with every network, then the peer, and both timed in turns."""
    wanted = [network for network in networks() if not only or network[1] in only]
    worker = Worker(measure, LIMIT_SECONDS)
    for side in ("ours", "theirs"):
        done = {(row["library"], row["family"]) for row in read() if side in row}
        missing = [network for network in wanted if network[:2] not in done]
        for index, (library, family, name) in enumerate(track(missing, side, console=Console(stderr=True))):
            row: dict[str, Any] = {"library": library, "family": family, "name": name}
            row |= worker(side, library, name, onnx_every > 0 and index % onnx_every == 0)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """One row a network, both sides merged."""
    if not path.exists():
        return []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault((row["library"], row["family"]), {}).update(row)
    return list(rows.values())


# -- the report ----------------------------------------------------------------


def shares(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| networks | number | ours: pruned and exact | of these by consent | Torch-Pruning: pruned and runs |",
        "|---|---|---|---|---|",
    ]
    sets = {
        "timm, convolutional": [r for r in rows if r["library"] == "timm" and r.get("kind") == "convolutional"],
        "timm, with attention": [r for r in rows if r["library"] == "timm" and r.get("kind") == "attention"],
        "timm, other": [
            r for r in rows if r["library"] == "timm" and r.get("kind") not in ("convolutional", "attention")
        ],
        "timm, all families": [r for r in rows if r["library"] == "timm"],
        "transformers": [r for r in rows if r["library"] == "transformers"],
        "segmentation nets": [r for r in rows if r["library"] == "segmentation"],
    }
    for label, chosen in sets.items():
        if chosen:
            mine = sum(r["ours"]["status"] == "exact" for r in chosen) / len(chosen)
            peer = sum(r.get("theirs", {}).get("status") == "pruned" for r in chosen) / len(chosen)
            consent = sum(bool(r["ours"].get("by_consent")) and r["ours"]["status"] == "exact" for r in chosen)
            lines.append(f"| {label} | {len(chosen)} | {mine:.1%} | {consent / len(chosen):.1%} | {peer:.1%} |")
    return lines


def report(rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda r: (r["library"] != "timm", r["library"], r["family"]))
    both = [r for r in rows if r.get("paired_seconds")]
    ratios = [r["paired_seconds"] / r["theirs"]["seconds"] for r in both]
    lines = shares(rows)
    if ratios:
        checks = sum(r["paired_check_seconds"] for r in both)
        slower = [r["name"] for r in both if r["paired_seconds"] > max(r["theirs"]["seconds"], 0.5)]
        lines += ["", f"Time, ours over Torch-Pruning's, where both end ({len(ratios)} networks): geometric mean "
                      f"{statistics.geometric_mean(ratios):.2f}; ours includes the masked = compact check "
                      f"({checks / sum(r['paired_seconds'] for r in both):.0%} of "
                      "all) and, where the network's code stands in the way of a cut, its diagnosis. Slower than "
                      f"the peer and above 0.5 s: {', '.join(slower) or 'none'}."]  # fmt: skip
    exported = [r["onnx"] for r in rows if "onnx" in r]
    if exported:
        lines += ["", f"ONNX export of a sample, verified in ONNX Runtime: {sum(exported)} of {len(exported)}."]
        neither = [r["name"] for r in rows if not r.get("onnx_dense", True)]
        if neither:
            lines[-1] += f" The exporter does not take these before pruning either: {', '.join(neither)}."
    lines += ["", "| library | network | kind | groups | pinned | params reachable | MACs reachable | MACs left "
                  "| error | ours | s | Torch-Pruning | s |", "|" + "---|" * 13]  # fmt: skip
    for r in rows:
        mine, peer = r["ours"], r.get("theirs", {"status": "not run"})
        lines.append(
            f"| {r['library']} | {r['name']} | {r.get('kind', '')} | {mine.get('groups', '')} | "
            f"{mine.get('pinned', '')} | "
            f"{_percent(mine.get('params_reachable'))} | {_percent(mine.get('macs_reachable'))} | "
            f"{_percent(mine.get('macs_left'))} | {_number(mine.get('error'), '.0e')} | "
            f"{mine['status']}{' (by consent)' if mine.get('by_consent') else ''} | "
            f"{_number(mine.get('seconds'), '.2f')} | {peer['status']} | {_number(peer.get('seconds'), '.2f')} |"
        )
    lines += ["", "## What is not pruned, and why", ""]
    for r in rows:
        if r["ours"]["status"] != "exact":
            lines.append(f"- {r['name']}: {r['ours']['status']}: {r['ours'].get('why', '')}")
    lines += ["", "## Reasons for pinned channels", "", "| reason | networks |", "|---|---|"]
    counts = Counter(re.sub(r"\d+", "N", reason) for r in rows for reason in r["ours"].get("reasons", {}))
    lines += [f"| {reason.replace('|', '/')} | {count} |" for reason, count in counts.most_common(40)]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in ("convolutional", "attention", "other") if any(r.get("kind") == k for r in rows)]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for offset, (label, key, good, colour) in enumerate(
        [("nncf_compactprune: pruned and exact", "ours", "exact", "#0068b5"),
         ("Torch-Pruning: pruned and runs", "theirs", "pruned", "#b0b7bf")]
    ):  # fmt: skip
        values = [
            100 * statistics.mean(r.get(key, {}).get("status") == good for r in rows if r.get("kind") == kind)
            for kind in kinds
        ]
        bars = axes.bar([i + 0.38 * offset for i in range(len(kinds))], values, 0.36, label=label, color=colour)
        axes.bar_label(bars, fmt="%.0f %%", fontsize=9)
    axes.set_xticks([i + 0.19 for i in range(len(kinds))],
                    [f"{kind} ({sum(r.get('kind') == kind for r in rows)})" for kind in kinds])  # fmt: skip
    axes.set_ylim(0, 118)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    axes.set_title("Share of networks that each prunes, one of every family", fontsize=11)
    figure.savefig(path, dpi=150)


def main(only: str = "", onnx_every: int = 12, report_only: bool = typer.Option(False, "--report")) -> None:
    if not report_only:
        sweep({name for name in only.split(",") if name}, onnx_every)
    rows = read()
    (HERE / "coverage.md").write_text(report(rows), encoding="utf-8")
    write_csv(rows)
    picture(rows, HERE / "coverage.png")
    print("\n".join(shares(rows)))


def write_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    keys = ("status", "groups", "pinned", "params_reachable", "macs_reachable", "macs_left", "error", "seconds", "why")
    with (HERE / "coverage.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["library", "family", "network", "kind", "params", *(f"ours_{k}" for k in keys),
                         "theirs_status", "theirs_params_left", "theirs_seconds", "theirs_why"])  # fmt: skip
        for r in rows:
            writer.writerow(
                [r["library"], r["family"], r["name"], r.get("kind", ""), r.get("params", ""),
                 *(r["ours"].get(k, "") for k in keys),
                 *(r.get("theirs", {}).get(k, "") for k in ("status", "params_left", "seconds", "why"))]
            )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
