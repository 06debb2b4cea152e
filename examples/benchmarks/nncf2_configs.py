"""NNCF 2.x's own configuration files: does each load, and does each network become a smaller file?

    .venv/bin/python examples/benchmarks/nncf2_configs.py [--folder ../shared/data/nncf2_configs] [--write]

Every file is read as it is. Each entry that prunes filters runs on the network that the file names (torchvision's
classifiers; narrow networks of the same kinds for the others), with random weights: one epoch at the start of its
schedule, one at the end, one training step each on two images; then the weights are written. Only what takes hours is
cut short: a learned ranking tries 4 rankings with one training step each. ``--side 64`` takes smaller pictures, for the
same shares in a tenth of the time.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nncf2_networks import network
from safetensors.torch import save_file
from torch import Tensor, nn

from nncf_compactprune import create_compressed_model, save_pruned
from nncf_compactprune.config import load_config, read_document
from nncf_compactprune.errors import ConfigError

FOLDER = Path("../shared/data/nncf2_configs")
SHORT_RANKING = {"generations": 4, "train_steps": 1, "population_size": 2, "num_samples": 2}


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    :param macs: left, and before; :param params: parameters left, and before; :param size: bytes of the weights' files.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    size: tuple[int, int] | None = None


def entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file, as they are written."""
    found = config.get("compression", [])
    return found if isinstance(found, list) else [found]


def prunes(config: Mapping[str, Any]) -> bool:
    """Whether filters go."""
    return any(entry.get("algorithm") == "filter_pruning" for entry in entries(config))


def shortened(config: Mapping[str, Any], side: int | None = None) -> dict[str, Any]:
    """The same configuration with a short ranking, and smaller pictures where a side is given."""
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for entry in entries(result):
        params = entry.get("params", {})
        if params.get("interlayer_ranking_type") == "learned_ranking":
            params["legr_params"] = {**params.get("legr_params", {}), **SHORT_RANKING}
    if side is not None:
        shape = result["input_info"]["sample_size"]
        result["input_info"] = {"sample_size": [*shape[:2], *(min(side, length) for length in shape[2:])]}
    return result


def labels_of(output: Any) -> Tensor:
    """Labels for a classifier's output; a batch of zeros for the others, which are trained on their mean square."""
    scores = output if isinstance(output, Tensor) else output[0]
    return torch.zeros(len(scores), dtype=torch.long)


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer, extra: Any) -> None:
    """One training step."""
    output = model(images)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    classifies = outputs[0].dim() == 2
    loss = F.cross_entropy(outputs[0], labels_of(output)) if classifies else sum(o.square().mean() for o in outputs)
    optimizer.zero_grad()
    (loss + extra()).backward()
    optimizer.step()


def run(config: Mapping[str, Any], *, side: int | None = None, export: Path | None = None) -> Outcome:
    """Compresses the network that a configuration names.

    :param config: as it was read.
    :param side: of the pictures, where they are to be smaller.
    :param export: where to write the weights of both networks; not at all, where None.
    """
    torch.manual_seed(0)
    short = shortened(config, side)
    model = network(short)
    shape = short["input_info"]["sample_size"]
    batches = [(torch.randn(2, *shape[1:]), torch.zeros(2, dtype=torch.long)) for _ in range(2)]
    dense = 0
    if export is not None:
        save_file(model.state_dict(), export / "dense.safetensors")
        dense = (export / "dense.safetensors").stat().st_size
    ctrl, model = create_compressed_model(model, short, batches, example_inputs=batches[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    params = next(entry.get("params", {}) for entry in entries(short) if entry["algorithm"] == "filter_pruning")
    for epoch in (0, params.get("num_init_steps", 0) + params.get("pruning_steps", 100)):
        ctrl.scheduler.epoch_step(epoch)
        ctrl.scheduler.step()
        model.train()
        step(model, batches[0][0], optimizer, ctrl.loss)
    ctrl.strip()
    plan = next(algorithm for algorithm in ctrl.algorithms if algorithm.name == "filter_pruning").final_plan
    size = None
    if export is not None:
        size = ((save_pruned(model, export) / "model.safetensors").stat().st_size, dense)
    return Outcome((plan.after.macs, plan.before.macs), (plan.after.params, plan.before.params), size)


_OUTCOMES: dict[str, Outcome] = {}


def outcome_of(path: Path, folder: Path, side: int | None) -> Outcome:
    """What becomes of a file; files that say the same once read are run once."""
    config, read = read_document(path).data, load_config(path)
    said = [config["model"], config["input_info"], [entry.model_dump(mode="json") for entry in read.compression]]
    key = json.dumps([*said, read.accuracy_aware_training is not None], default=str)
    if key not in _OUTCOMES:
        _OUTCOMES[key] = run(config, side=side, export=folder)
    return _OUTCOMES[key]


def row(path: Path, folder: Path, side: int | None) -> str:
    """One line of the table."""
    name = path.stem.removeprefix("openvinotoolkit-nncf__")
    config = read_document(path).data
    algorithms = ", ".join(str(entry.get("algorithm")) for entry in entries(config))
    try:
        load_config(path)
    except ConfigError as error:
        return f"| {name} | {algorithms} | refused: {error.problems[0].message} | | | |"
    if not prunes(config):
        return f"| {name} | {algorithms} | loads | | | |"
    outcome = outcome_of(path, folder, side)
    (macs, all_macs), (params, all_params), (size, dense) = outcome.macs, outcome.params, outcome.size or (0, 1)
    left = f"{macs / all_macs:.1%} | {params / all_params:.1%} | {size / dense:.1%}"
    return f"| {name} | {algorithms} | {config['model']}: smaller | {left} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are")
    parser.add_argument("--side", type=int, help="of the pictures, where they are to be smaller than the files say")
    parser.add_argument("--write", action="store_true", help="write the table beside this file")
    args = parser.parse_args()
    lines = [
        "| file | entries | outcome | MACs left | parameters left | bytes left |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(args.folder.glob("*.json")):
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(path, Path(folder), args.side))
        print(lines[-1], flush=True)
    if args.write:
        small = f" --side {args.side}" if args.side else ""
        command = f"Written by `.venv/bin/python examples/benchmarks/nncf2_configs.py{small} --write`"
        head = f"# NNCF 2.x's own configuration files\n\n{command}, which says what is run.\n\n"
        Path(__file__).with_suffix(".md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
