"""An algorithm that only adds to the loss, for the tests of training loops."""

from __future__ import annotations

from typing import Any

import torch

from nncf_compactprune import hookimpl
from nncf_compactprune.algorithms import CompressionAlgorithm, CompressionStage
from nncf_compactprune.plugins import Plugins


class Pull(CompressionAlgorithm):
    """A loss on the weights, as regularisers have; counts the steps it is told of."""

    name = "pull"
    summary = "for the tests"
    told: tuple[int, ...] = ()

    def prepare(self, state: Any = None) -> None:
        pass

    def strip(self) -> None:
        pass

    def stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self) -> dict[str, Any]:
        return {}

    def step(self, step: int) -> None:
        self.told = (*self.told, step)

    def loss(self) -> torch.Tensor:
        return 0.1 * torch.stack([p.square().sum() for p in self.context.model.parameters()]).sum()


def with_pull() -> Plugins:
    """The built-in plugins and ``"pull"``."""

    class Algorithms:
        @hookimpl
        def compactprune_algorithms(self) -> list[type[CompressionAlgorithm]]:
            return [Pull]

    plugins = Plugins()
    plugins.load_entry_points()
    plugins.register(Algorithms(), "pull")
    return plugins
