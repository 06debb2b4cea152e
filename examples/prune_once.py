"""Prunes a network at once, without a config or a training loop, and brings it back from disk.

    python examples/prune_once.py [--macs 0.5] [--directory out/prune_once]

The weights here are random; with a trained network, fine-tune between pruning and saving.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from nncf_compactprune import prune
from nncf_compactprune.checkpoint import load_pruned, save_pruned
from nncf_compactprune.integrations.digits_net import digits_net


def main(macs: float = 0.5, directory: Path = Path("out/prune_once")) -> None:
    model = digits_net()  # any torch.nn.Module
    images = torch.randn(2, 1, 16, 16)  # what it is run on
    result = prune(model, images, budget={"macs": macs}, importance="l2", round_to=8)

    before, after = result.plan.before, result.plan.after
    print(f"{before.macs:,} -> {after.macs:,} MACs, {before.params:,} -> {after.params:,} parameters")
    print(f"pruned and masked network differ by {result.self_check.error:.0e} of the largest output")

    save_pruned(model, directory)  # model.safetensors and plan.json, no pickles
    again = load_pruned(digits_net(), directory)  # a fresh dense model, cut and filled
    with torch.no_grad():
        assert torch.equal(model.eval()(images), again.eval()(images))

    table = Table("Group", "Channels before", "after")
    for group in result.plan.groups:
        table.add_row(group.name, str(group.before), str(group.after))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
