"""The exported files of a run as their runtimes serve them: right, and where their time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportedFile
from nncf_compactprune.export.prepared import FlatModel, evaluation_on_cpu
from nncf_compactprune.run.compress import Compressed
from nncf_compactprune.run.datasets import even_samples, only_classes
from nncf_compactprune.run.progress import tracked
from nncf_compactprune.run.state import Run
from nncf_compactprune.serving.departure import module_values
from nncf_compactprune.serving.layers import profile
from nncf_compactprune.serving.reference import TorchSide
from nncf_compactprune.serving.verify import verify_served

SAMPLES = 200


def torch_sides(run: Run, compressed: Compressed) -> dict[str, TorchSide]:
    """Both networks on test images, for files to be compared with.

    :param run: its dataset and example.
    :param compressed: the networks.
    """
    classes, images, labels = compressed.plan.output_classes, None, None
    if run.dataset is not None:
        images, labels = even_samples(only_classes(run.dataset, classes) if classes else run.dataset, SAMPLES)
    networks = {"dense": (compressed.dense.model, classes), "pruned": (compressed.pruned.model, ())}
    return {
        name: TorchSide(model, run.example, images, labels, classes=chosen)
        for name, (model, chosen) in networks.items()
    }


def served(
    run: Run, files: Mapping[str, Sequence[ExportedFile]], sides: Mapping[str, TorchSide]
) -> list[dict[str, Any]]:
    """How every file does as it is served, for the summary. What is wrong is said, and does not end the run.

    :param run: is told.
    :param files: by network.
    :param sides: the networks in torch.
    """
    found = []
    pairs = [(network, file) for network, exported in files.items() for file in exported]
    with tracked(pairs, "Verifying as served") as shown:
        for network, file in shown:
            check = verify_served(file.path, sides[network], plugins=run.plugins)
            name = f"{network}/{file.path.name}"
            for problem in check.problems:
                run.say(f"Warning: {name}: {problem}")
            found.append(
                {
                    "file": name,
                    **{key: getattr(check, key) for key in ("runtime", "arithmetic", "samples", "error", "tolerance")},
                    "batch_sizes": list(check.batch_sizes),
                    **{key: getattr(check, key) for key in ("agreement", "accuracy", "torch_accuracy")},
                    "problems": list(check.problems),
                }
            )
    return found


def layers(files: Mapping[str, Sequence[ExportedFile]], sides: Mapping[str, TorchSide]) -> list[dict[str, Any]]:
    """Cost and time of every layer of the first OpenVINO files, for the summary; none without such files.

    :param files: by network.
    :param sides: the networks in torch, for the names of layers.
    """
    first = {
        name: next((one for one in exported if one.format == "openvino"), None) for name, exported in files.items()
    }
    dense, pruned = first.get("dense"), first.get("pruned")
    if dense is None or pruned is None:
        return []
    try:
        found = profile(dense.path, pruned.path, names=_order(sides["pruned"]))
    except ExportError:  # open shapes, or other operations where the network was quantized
        return []
    return [
        {
            "name": one.name,
            "macs_dense": one.macs[0],
            "macs_pruned": one.macs[1],
            "us_dense": one.microseconds[0],
            "us_pruned": one.microseconds[1],
            "precision": one.precision,
            "note": one.note,
        }
        for one in found.layers
    ]


def _order(side: TorchSide) -> list[tuple[str, tuple[int, ...]]]:
    """Layers in the order in which they run, with the shapes of their weights."""
    shapes = side.widths()
    with evaluation_on_cpu(side.model) as model:
        values = module_values(FlatModel(model, side.inputs), side.inputs.tensors)
    ran = (one.module for one in values if f"{one.module}.weight" in shapes)
    return [(module, shapes[f"{module}.weight"]) for module in ran]
