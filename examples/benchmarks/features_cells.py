"""The cells of the feature table: what each package is tried with, or where its source says so."""

from __future__ import annotations

import importlib.util
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

FEATURES = {
    "shrinks": "Removes channels: the PyTorch module itself gets smaller",
    "joins": "Follows residual sums and concatenations by itself",
    "reasons": "Says why a channel stays",
    "checks": "Compares the cut network with the masked one before it returns",
    "survives": "A network whose code states a width still runs afterwards",
    "macs": "Takes a budget of multiply-accumulates of the whole network, and meets it",
    "latency": "Takes a budget of measured time",
    "schedule": "Masks step by step while the network trains",
    "optimizer": "Cuts the optimizer's state along, so that training goes on",
    "norms": "Cuts the width that a LayerNorm normalises over",
    "data_free": "Makes up for what went, without any data",
    "distils": "Brings a teacher into the training loss",
    "accuracy_aware": "Searches for the smallest network that holds an accuracy",
    "nncf2": "Reads NNCF 2.x's `filter_pruning` config",
    "reloads": "Comes back from files that cannot run code",
    "exports": "Writes ONNX and OpenVINO, opens them again and compares",
    "weights": "Sets single weights to zero (masks)",
    "int8": "INT8 with calibration data",
    "int4": "4-bit weights, stored in 4 bits",
    "kernels": "Kernels that skip zeros, on a GPU",
    "float8": "float8 training",
}


@dataclass(frozen=True)
class Cell:
    """An answer (``yes``, ``partly``, ``no``, or ``none`` where the question does not arise), and what shows it."""

    answer: str
    evidence: str


@dataclass(frozen=True)
class Package:
    """One column.

    :param name: what it is called by.
    :param title: its heading.
    :param module: whose source is read.
    :param cells: for each feature a cell, or a function that makes one.
    :param peer: its environment in ``bench_list.PEERS``; None: the environment of ``bench.py``.
    :param packages: whose versions belong to its rows.
    :param variables: of the environment of its process.
    """

    name: str
    title: str
    module: str
    cells: dict[str, Cell | Callable[[], Cell]]
    peer: str | None = None
    packages: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


def probe(name: str) -> Iterator[dict[str, str]]:
    """Every cell of a package, in the environment of this process.

    :param name: a key of ``PACKAGES``.
    :raises AssertionError: a cell is not what it says.
    """
    torch.manual_seed(0)
    package = PACKAGES[name]
    for feature in FEATURES:
        cell = package.cells[feature]
        found = cell if isinstance(cell, Cell) else cell()
        yield {"package": name, "feature": feature, "answer": found.answer, "evidence": found.evidence}


# -- looked up -------------------------------------------------------------------------------------------------------


def folder_of(module: str) -> Path:
    """Where an installed module's source lies, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not installed"
    assert spec.origin is not None
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def says(answer: str, module: str, file: str, text: str, words: str = "") -> Callable[[], Cell]:
    """A cell that the package's own source shows.

    :param answer: of the cell.
    :param module: the package, or a module inside it.
    :param file: inside the module's folder; empty for the module's own file.
    :param text: what must stand there.
    :param words: what the reader is told beside it.
    """

    def look() -> Cell:
        folder = folder_of(module)
        source = (folder / file if file else folder).read_text(encoding="utf-8")
        assert text in source, f"{module}: {file} does not hold {text!r}"
        place = f"{module.replace('.', '/')}{'/' + file if file else '.py'}"
        return Cell(answer, f"{words} `{place}`: `{text.strip()}`.".strip())

    return look


def silent(
    module: str, pattern: str, within: str = "**/*.py", words: str = "", answer: str = "no"
) -> Callable[[], Cell]:
    """A cell that says no, as nothing in the package's source speaks of it.

    :param module: the package, or a module inside it.
    :param pattern: a regular expression that no line of code may match; comments count.
    :param within: which files.
    :param words: what the reader is told beside it.
    :param answer: of the cell.
    """

    def look() -> Cell:
        folder = folder_of(module)
        files = [folder] if folder.is_file() else sorted(folder.glob(within))
        assert files, f"{module}: no file like {within}"
        for file in files:
            found = re.search(pattern, file.read_text(encoding="utf-8", errors="ignore"), re.IGNORECASE)
            assert found is None, f"{module}: {file.name} speaks of {found[0]!r}"
        return Cell(answer, f"{words} None of {len(files)} files of `{module}` matches `{pattern}`.".strip())

    return look


# -- networks --------------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """A residual sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.norm, self.join, self.head = nn.BatchNorm2d(16), nn.Conv2d(32, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = x + self.two(self.norm(self.one(x)).relu())
        return self.head(self.join(torch.cat([x, y], 1)).relu().mean((2, 3)))


class Stated(nn.Module):
    """Its code states the width of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).reshape(len(x), 16, -1).mean(2))


class Normed(nn.Module):
    """A residual stream under norms of one kind, as in a transformer."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = (
            nn.Linear(8, 32),
            norm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.last, self.head = norm(32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(self.last(x + self.down(self.up(self.norm(x)).relu())))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def runs(model: nn.Module, inputs: torch.Tensor) -> bool:
    try:
        model(inputs)
    except Exception:
        return False
    return True


# -- this package ----------------------------------------------------------------------------------------------------


def _pruned(model: nn.Module, inputs: torch.Tensor = IMAGES, **options: Any) -> Any:
    from nncf_compactprune import prune

    return prune(model, inputs, budget=options.pop("budget", {"macs": 0.5}), round_to=1, **options)


def our_shrinks() -> Cell:
    model = Joined()
    _pruned(model)
    width = model.stem.weight.shape[0]
    assert width < 16
    return Cell(
        "yes", f"`prune(model, images, budget={{'macs': 0.5}})`: the first convolution went from 16 to {width} outputs."
    )


def our_joins() -> Cell:
    model = Joined()
    _pruned(model)
    assert runs(model, IMAGES)
    return Cell("yes", "A network with both was cut and runs.")


def our_reasons() -> Cell:
    from nncf_compactprune import analyse

    pinned = {one.name: f"{one.reason}" for one in analyse(Stated(), IMAGES).pinned}
    assert "two" in pinned
    return Cell("yes", f"`analyse` on a network whose code states a width: `{pinned['two'][:90]}…`.")


def our_checks() -> Cell:
    check = _pruned(Joined()).self_check
    assert check.error <= 1e-5
    return Cell("yes", f"`result.self_check`: largest difference {check.error:.0e} of the largest output.")


def our_survives() -> Cell:
    from nncf_compactprune.errors import CompactPruneError

    model = Stated()
    try:
        _pruned(model, budget={"params": 0.9})
    except CompactPruneError as error:
        return Cell("yes" if runs(model, IMAGES) else "no", f"Refused, with the model as it was: {str(error)[:80]}…")
    assert runs(model, IMAGES)
    return Cell(
        "yes", f"The stated width stayed {model.two.weight.shape[0]}, the other went to {model.one.weight.shape[0]}."
    )


def our_macs() -> Cell:
    plan = _pruned(Joined()).plan
    assert plan.after.macs <= 0.5 * plan.before.macs
    return Cell("yes", f"Asked for 50 %, got {plan.after.macs / plan.before.macs:.1%}.")


def our_schedule() -> Cell:
    from nncf_compactprune import create_compressed_model

    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"pruning_steps": 3, "round_to": 1}}
    ctrl, _ = create_compressed_model(Joined(), {"compression": entry}, example_inputs=IMAGES)
    rates = []
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        rates.append(ctrl.compression_rate)
    assert rates == sorted(rates)
    assert rates[1] < rates[-1]
    return Cell("yes", f"`ctrl.compression_rate` over four epochs: {', '.join(f'{rate:.0%}' for rate in rates)}.")


def our_optimizer() -> Cell:
    model = Joined()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    _pruned(model, optimizer=optimizer)
    state = optimizer.state[model.stem.weight]["momentum_buffer"]
    assert state.shape == model.stem.weight.shape
    return Cell("yes", f"`prune(..., optimizer=...)`: momentum and weight both have the shape {list(state.shape)}.")


def our_norms() -> Cell:
    inputs, widths = torch.randn(2, 5, 8), []
    for norm in (nn.LayerNorm, nn.RMSNorm):
        plain, consenting = Normed(norm), Normed(norm)
        _pruned(plain, inputs, budget={"params": 0.6})
        _pruned(consenting, inputs, budget={"params": 0.3}, allow_approximate=True)
        widths.append((plain.norm.weight.shape[0], consenting.norm.weight.shape[0]))
    (before, after), (before_rms, after_rms) = widths
    assert before == before_rms == 32
    assert max(after, after_rms) < 32
    return Cell(
        "partly",
        f"By consent only: {before} of 32 stay, with `allow_approximate=True` {after}, and {after_rms} of {before_rms} "
        "behind RMSNorms.",
    )


def our_data_free() -> Cell:
    from nncf_compactprune import create_compressed_model

    model = Joined()
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8))
    entry = {"algorithm": "data_free_layerwise", "budget": {"macs": 0.7}, "generation": {"samples": 64, "steps": 1}}
    ctrl, _ = create_compressed_model(model, {"compression": entry}, example_inputs=IMAGES[:1])
    ctrl.strip()
    return Cell(
        "yes", "`data_free_layerwise` cut a network to 70 % of its MACs and re-fitted its layers, with no image given."
    )


def our_distils() -> Cell:
    from nncf_compactprune import create_compressed_model

    entries = [
        {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"schedule": "one_shot", "round_to": 1}},
        {"algorithm": "recovery"},
    ]
    ctrl, model = create_compressed_model(Joined(), {"compression": entries}, example_inputs=IMAGES)
    model.train()(IMAGES)
    loss = float(ctrl.loss())
    assert loss > 0
    return Cell("yes", f"`recovery` behind a cut: `ctrl.loss()` is {loss:.1e}.")


def our_nncf2() -> Cell:
    from nncf_compactprune import create_compressed_model

    config = {"compression": {"algorithm": "filter_pruning", "params": {"schedule": "baseline", "pruning_target": 0.5}}}
    ctrl, model = create_compressed_model(Joined(), config, example_inputs=IMAGES)
    ctrl.strip()
    return Cell("yes", f"`filter_pruning` at 50 %: `one` has {model.one.weight.shape[0]} of 16 filters.")


def our_reloads() -> Cell:
    from nncf_compactprune import load_pruned, save_pruned

    model = Joined()
    _pruned(model)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(path.name for path in save_pruned(model, folder).iterdir())
        again = load_pruned(Joined(), folder)
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))
    return Cell("yes", f"`save_pruned` wrote {' and '.join(files)}; `load_pruned` gave the same outputs.")


def our_exports() -> Cell:
    from nncf_compactprune import export_model

    model = Joined()
    _pruned(model)
    with tempfile.TemporaryDirectory() as folder:
        files = export_model(model, IMAGES, folder, precisions=["fp32"])
    said = ", ".join(f"{file.label} {file.verification.max_rel_error:.0e}" for file in files)
    return Cell("yes", f"`export_model`: largest differences {said}.")


# -- Torch-Pruning ---------------------------------------------------------------------------------------------------


def _torch_pruned(model: nn.Module, inputs: torch.Tensor = IMAGES, **options: Any) -> nn.Module:
    import torch_pruning as tp

    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.MagnitudePruner(
        model, inputs, importance, pruning_ratio=0.5, ignored_layers=[model.head], **options
    ).step()
    return model


def tp_shrinks() -> Cell:
    width = _torch_pruned(Joined()).stem.weight.shape[0]  # type: ignore[union-attr, operator]
    assert width < 16
    return Cell(
        "yes",
        f"`MagnitudePruner(..., pruning_ratio=0.5).step()`: the first convolution went from 16 to {width} outputs.",
    )


def tp_joins() -> Cell:
    assert runs(_torch_pruned(Joined()), IMAGES)
    return Cell("yes", "A network with both was cut and runs.")


def tp_survives() -> Cell:
    model = _torch_pruned(Stated())
    works = runs(model, IMAGES)
    assert not works
    return Cell(
        "no",
        "`step()` returned, and the network's next forward raises an error: it reshapes to 16 channels, and has 8.",
    )


def tp_macs() -> Cell:
    import torch_pruning as tp

    known = set(inspect.signature(tp.pruner.BasePruner.__init__).parameters)
    assert not {one for one in known if re.search("mac|flop|latency|budget", one)}
    return Cell(
        "no",
        "`BasePruner` takes `pruning_ratio`, a share of channels; no parameter of it names MACs, FLOPs or a budget.",
    )


def tp_latency() -> Cell:
    tp_macs()
    return Cell(
        "no", "No parameter of `BasePruner` names a time. `tp.utils.benchmark.measure_latency` times a module in torch."
    )


def tp_schedule() -> Cell:
    import torch_pruning as tp

    assert "iterative_steps" in inspect.signature(tp.pruner.BasePruner.__init__).parameters
    return Cell(
        "partly", "`iterative_steps` cuts in several steps, for good; nothing is masked, so no channel comes back."
    )


def tp_optimizer() -> Cell:
    model = Joined()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(IMAGES).sum().backward()
    optimizer.step()
    _torch_pruned(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.stem.weight) not in held
    return Cell(
        "no", "After `step()` the optimizer holds parameters that the model has no more: it has to be built anew."
    )


def tp_norms() -> Cell:
    width = _torch_pruned(Normed(), torch.randn(2, 5, 8)).norm.weight.shape[0]  # type: ignore[union-attr, operator]
    assert width < 32
    return Cell("yes", f"A LayerNorm went from 32 to {width} channels. That its statistics change then is not said.")


def tp_reloads() -> Cell:
    import torch_pruning as tp

    model = _torch_pruned(Joined())
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tp.state_dict(model), Path(folder) / "pruned.pth")
        try:
            torch.load(Path(folder) / "pruned.pth", weights_only=True)
        except Exception as error:
            return Cell(
                "no",
                f"`tp.state_dict`, saved, is refused by `torch.load(weights_only=True)`: {type(error).__name__}.",
            )
    return Cell("yes", "`tp.state_dict` is read by `torch.load(weights_only=True)`.")


# -- NNCF ------------------------------------------------------------------------------------------------------------


def nncf219_shrinks() -> Cell:
    from nncf import NNCFConfig
    from nncf.torch import create_compressed_model

    config = NNCFConfig.from_dict(
        {
            "input_info": {"sample_size": [1, 3, 8, 8]},
            "compression": {
                "algorithm": "filter_pruning",
                "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
                "pruning_init": 0.5,
                "params": {"schedule": "baseline", "pruning_target": 0.5, "prune_first_conv": True},
            },
        }
    )
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    ctrl, model = create_compressed_model(model, config, dump_graphs=False)
    ctrl.scheduler.epoch_step()
    weight = dict(ctrl.strip().named_parameters())["0.weight"]
    zero = int((weight.flatten(1).abs().sum(1) == 0).sum())
    assert weight.shape[0] == 16
    assert zero == 8
    return Cell("no", f"`filter_pruning` at 50 %, then `strip`: 16 filters, {zero} of them zeros.")


def nncf3_shrinks() -> Cell:
    import nncf

    model = nncf.prune(Joined(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=0.5, examples_inputs=IMAGES)
    assert model.stem.weight.shape[0] == 16
    return Cell("no", "`nncf.prune(ratio=0.5)`: all shapes as before.")


def nncf3_weights() -> Cell:
    import nncf

    model = nncf.prune(Joined(), nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=0.5, examples_inputs=IMAGES)
    masks = [buffer for name, buffer in model.named_buffers() if "mask" in name]
    zeros = float(sum((mask == 0).sum() for mask in masks) / sum(mask.numel() for mask in masks))
    assert 0.4 < zeros < 0.6
    return Cell("yes", f"`nncf.prune(ratio=0.5)`: {zeros:.0%} of what its masks hold are zeros.")


# -- torch.nn.utils.prune, torchao -----------------------------------------------------------------------------------


def torch_shrinks() -> Cell:
    from torch.nn.utils import prune

    layer = nn.Conv2d(3, 16, 3)
    prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    prune.remove(layer, "weight")
    zero = int((layer.weight.flatten(1).abs().sum(1) == 0).sum())
    assert layer.weight.shape[0] == 16
    return Cell("no", f"`ln_structured(amount=0.5)`, then `remove`: 16 filters, {zero} of them zeros.")


def torch_schedule() -> Cell:
    from torch.nn.utils import prune

    layer, zeros = nn.Linear(8, 8), []
    for _ in range(2):
        prune.l1_unstructured(layer, "weight", 0.25)
        zeros.append(int((layer.weight_mask == 0).sum()))
    assert zeros[1] > zeros[0]
    return Cell(
        "partly",
        f"Masks add up when it is called again ({zeros[0]}, then {zeros[1]} zeros); when, is your loop's business.",
    )


def torch_weights() -> Cell:
    torch_schedule()
    return Cell("yes", "`l1_unstructured` masks single weights of any parameter.")


def torchao_shrinks() -> Cell:
    from torchao.prototype.sparsity.pruner import SaliencyPruner

    chain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(chain, [{"tensor_fqn": "0.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    width = pruner.prune().get_submodule("0").weight.shape[0]
    assert width == 8
    return Cell(
        "partly",
        f"The prototype `SaliencyPruner` cuts chains of layers: a linear layer went from 16 to {width} outputs.",
    )


def _torchao_pruned(model: nn.Module) -> nn.Module:
    from torchao.prototype.sparsity.pruner import SaliencyPruner

    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, [{"tensor_fqn": "two.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    return pruner.prune()  # type: ignore[no-any-return]


def torchao_survives() -> Cell:
    try:
        cut = _torchao_pruned(Stated())
    except Exception as error:
        return Cell("no", f"`prune()` raises {type(error).__name__}.")
    if runs(cut, IMAGES):
        return Cell(
            "yes", f"The layer has {cut.two.weight.shape[0]} of 16 outputs after `prune()`, and the network runs."
        )
    return Cell("no", "`prune()` returned, and the network's next forward raises an error.")


def torchao_joins() -> Cell:
    try:
        cut = _torchao_pruned(Joined())
    except Exception as error:
        return Cell("no", f"On the residual branch of a small network `prune()` raises {type(error).__name__}.")
    works = runs(cut, IMAGES) and cut.two.weight.shape[0] < 16
    return Cell(
        "yes" if works else "no", f"The residual branch has {cut.two.weight.shape[0]} of 16 outputs after `prune()`."
    )


OWN, TP, N2, N3, AO, UTILS = "nncf_compactprune", "torch_pruning", "nncf", "nncf", "torchao", "torch.nn.utils.prune"
NOTHING = Cell("none", "Nothing is cut.")

PACKAGES = {
    package.name: package
    for package in (
        Package(
            "nncf_compactprune",
            "this package",
            OWN,
            {
                "shrinks": our_shrinks,
                "joins": our_joins,
                "reasons": our_reasons,
                "checks": our_checks,
                "survives": our_survives,
                "macs": our_macs,
                "latency": says(
                    "yes", OWN, "config/budget.py", "latency: Time = None", '`{"latency": "4.5ms"}`, measured.'
                ),
                "schedule": our_schedule,
                "optimizer": our_optimizer,
                "norms": our_norms,
                "data_free": our_data_free,
                "distils": our_distils,
                "accuracy_aware": says("yes", OWN, "accuracy_aware/__init__.py", "AdaptiveCompressionTrainingLoop"),
                "nncf2": our_nncf2,
                "reloads": our_reloads,
                "exports": our_exports,
                "weights": says("yes", OWN, "algorithms/sparsity/magnitude.py", "magnitude_sparsity"),
                "int8": says("yes", OWN, "algorithms/quantization/algorithm.py", "nncf.quantize", "Through NNCF."),
                "int4": says(
                    "no", OWN, "algorithms/data_free/quantization.py", "ge=4, le=8", "4 to 8 bits, stored as INT8."
                ),
                "kernels": silent(OWN, "semi_?structured|cusparselt"),
                "float8": silent(OWN, "float8.{0,20}train|fp8"),
            },
        ),
        Package(
            "torch-pruning",
            "Torch-Pruning 1.6.1",
            TP,
            {
                "shrinks": tp_shrinks,
                "joins": tp_joins,
                "reasons": silent(TP, r"\breason\b"),
                "checks": silent(TP, "allclose|masked"),
                "survives": tp_survives,
                "macs": tp_macs,
                "latency": tp_latency,
                "schedule": tp_schedule,
                "optimizer": tp_optimizer,
                "norms": tp_norms,
                "data_free": silent(
                    TP, r"lstsq|least.squares|inversion", words="Norms need no data; nothing is re-fitted."
                ),
                "distils": silent(TP, "distil|teacher"),
                "accuracy_aware": silent(TP, "accuracy.aware|max_drop"),
                "nncf2": silent(TP, "nncf"),
                "reloads": tp_reloads,
                "exports": silent(TP, "onnx|openvino"),
                "weights": silent(TP, "unstructured"),
                "int8": silent(TP, "quantiz"),
                "int4": silent(TP, "int4"),
                "kernels": silent(TP, "semi_?structured|cusparselt"),
                "float8": silent(TP, "float8|fp8"),
            },
            "torch-pruning",
            ("torch-pruning",),
        ),
        Package(
            "nncf219",
            "NNCF 2.19.0",
            N2,
            {
                "shrinks": nncf219_shrinks,
                "joins": says(
                    "yes", N2, "common/pruning/mask_propagation.py", "class MaskPropagationAlgorithm", "Of zeros."
                ),
                "reasons": says(
                    "partly", N2, "common/pruning/utils.py", "class PruningAnalysisReason", "By layer, in the log."
                ),
                "checks": NOTHING,
                "survives": NOTHING,
                "macs": says(
                    "yes", N2, "config/schemata/algo/filter_pruning.py", "pruning_flops_target", "FLOPs, of zeros."
                ),
                "latency": silent(N2, "latency", "torch/pruning/**/*.py"),
                "schedule": says("yes", N2, "common/pruning/schedulers.py", "class ExponentialPruningScheduler"),
                "optimizer": NOTHING,
                "norms": NOTHING,
                "data_free": silent(N2, r"lstsq|least.squares|inversion", "torch/pruning/**/*.py"),
                "distils": says(
                    "yes", N2, "torch/knowledge_distillation/algo.py", "class KnowledgeDistillationController"
                ),
                "accuracy_aware": says(
                    "yes",
                    N2,
                    "common/accuracy_aware_training/training_loop.py",
                    "class AdaptiveCompressionTrainingLoop",
                ),
                "nncf2": Cell("yes", "Its own, as tried in the first row."),
                "reloads": NOTHING,
                "exports": says(
                    "partly", N2, "torch/exporter.py", "torch.onnx.export", "ONNX; nothing is opened again."
                ),
                "weights": says("yes", N2, "torch/sparsity/magnitude/algo.py", "class MagnitudeSparsityController"),
                "int8": says("yes", N2, "quantization/quantize_model.py", "def quantize("),
                "int4": says("yes", N2, "parameters.py", 'INT4_SYM = "int4_sym"', "`nncf.compress_weights`."),
                "kernels": silent(N2, "cusparselt|SemiStructured", "torch/**/*.py"),
                "float8": silent(N2, "float8.{0,20}training", "torch/**/*.py"),
            },
            "nncf219",
            ("nncf",),
            {"NNCF_TORCH_LEGACY_TRACING": "1"},
        ),
        Package(
            "nncf3",
            "NNCF 3.4.0",
            N3,
            {
                "shrinks": nncf3_shrinks,
                "joins": NOTHING,
                "reasons": NOTHING,
                "checks": NOTHING,
                "survives": NOTHING,
                "macs": silent(N3, "flops|macs_", "pruning/**/*.py", "A ratio of weights."),
                "latency": silent(N3, "latency", "pruning/**/*.py"),
                "schedule": says(
                    "partly",
                    N3,
                    "torch/function_hook/pruning/magnitude/schedulers.py",
                    "class ExponentialMagnitudePruningScheduler",
                    "Of single weights.",
                ),
                "optimizer": NOTHING,
                "norms": NOTHING,
                "data_free": silent(N3, "lstsq|least.squares|inversion", "torch/function_hook/pruning/**/*.py"),
                "distils": silent(N3, "distillation|teacher", "torch/**/*.py"),
                "accuracy_aware": silent(
                    N3,
                    "accuracy_aware_training",
                    words="`quantize_with_accuracy_control` looks for a layer set in INT8.",
                ),
                "nncf2": silent(N3, "filter_pruning"),
                "reloads": NOTHING,
                "exports": silent(N3, r"onnx\.export\(", "torch/**/*.py"),
                "weights": nncf3_weights,
                "int8": says("yes", N3, "quantization/quantize_model.py", "def quantize("),
                "int4": says("yes", N3, "parameters.py", 'INT4_SYM = "int4_sym"', "`nncf.compress_weights`."),
                "kernels": silent(N3, "cusparselt|SemiStructured", "torch/**/*.py"),
                "float8": silent(N3, "float8.{0,20}training", "torch/**/*.py"),
            },
            None,
            ("nncf",),
        ),
        Package(
            "torchao",
            "torchao 0.18.0",
            AO,
            {
                "shrinks": torchao_shrinks,
                "joins": torchao_joins,
                "reasons": silent("torchao.prototype.sparsity", r"\breason\b"),
                "checks": silent("torchao.prototype.sparsity", "allclose", "pruner/*.py"),
                "survives": torchao_survives,
                "macs": silent("torchao.prototype.sparsity", "flops|macs"),
                "latency": silent("torchao.prototype.sparsity", "latency", "pruner/*.py"),
                "schedule": says(
                    "partly",
                    AO,
                    "prototype/sparsity/scheduler/base_scheduler.py",
                    "class BaseScheduler",
                    "A prototype.",
                ),
                "optimizer": silent("torchao.prototype.sparsity", "optimizer", "pruner/*.py"),
                "norms": says(
                    "partly",
                    AO,
                    "prototype/sparsity/pruner/prune_functions.py",
                    "def prune_lstm_output_layernorm_linear",
                    "Between an LSTM and a linear layer.",
                ),
                "data_free": silent("torchao.prototype.sparsity", "lstsq|least.squares|inversion", "pruner/*.py"),
                "distils": silent("torchao.prototype.sparsity", "distil|teacher"),
                "accuracy_aware": silent("torchao.sparsity", "accuracy.aware|max_drop"),
                "nncf2": silent(AO, "nncf"),
                "reloads": says(
                    "yes", AO, "prototype/safetensors/safetensors_support.py", "safetensors", "A prototype."
                ),
                "exports": silent("torchao.sparsity", "onnx|openvino"),
                "weights": says("yes", AO, "sparsity/wanda.py", "class WandaSparsifier"),
                "int8": says("yes", AO, "quantization/quant_api.py", "class Int8DynamicActivationInt8WeightConfig"),
                "int4": says("yes", AO, "quantization/quant_api.py", "class Int4WeightOnlyConfig"),
                "kernels": says("yes", AO, "sparsity/sparse_api.py", "class SemiSparseWeightConfig"),
                "float8": says("yes", AO, "float8/__init__.py", "convert_to_float8_training"),
            },
            "torchao",
            ("torchao",),
        ),
        Package(
            "torch",
            "torch.nn.utils.prune 2.13",
            UTILS,
            {
                "shrinks": torch_shrinks,
                "joins": NOTHING,
                "reasons": NOTHING,
                "checks": NOTHING,
                "survives": NOTHING,
                "macs": silent(UTILS, "flops|macs"),
                "latency": silent(UTILS, "latency"),
                "schedule": torch_schedule,
                "optimizer": NOTHING,
                "norms": NOTHING,
                "data_free": silent(UTILS, "lstsq|least.squares"),
                "distils": silent(UTILS, "distil|teacher"),
                "accuracy_aware": silent(UTILS, "accuracy"),
                "nncf2": silent(UTILS, "nncf"),
                "reloads": NOTHING,
                "exports": silent(UTILS, "onnx|openvino"),
                "weights": torch_weights,
                "int8": silent(UTILS, "quantiz"),
                "int4": silent(UTILS, "int4"),
                "kernels": silent(UTILS, "semi_?structured|cusparselt"),
                "float8": silent(UTILS, "float8|fp8"),
            },
            None,
            ("torch",),
        ),
    )
}
