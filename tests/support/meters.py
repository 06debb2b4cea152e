"""A device whose time follows from the widths alone, as a plugin offers it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.plugins.hookspecs import hookimpl
from nncf_compactprune.serving.meter import LayerClock, LoadedNetwork, Meter, MeterOptions

VECTOR = 4
CALLED = 2.0  # microseconds of a layer beside its arithmetic


class Counting(LoadedNetwork):
    """Every convolution takes time for itself and for its weights, outputs in whole vectors."""

    def __init__(self, model: nn.Module, *, tells_layers: bool, drift: float = 0.0, luck: float = 1.0) -> None:
        self._luck = luck
        self._layers = [
            LayerClock(name, CALLED + math.ceil(m.out_channels / VECTOR) * VECTOR * m.weight[0].numel() / 100)
            for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d)
        ]
        self._tells_layers, self._drift, self._turn = tells_layers, drift, 0

    def request(self) -> float:
        self._turn += 1
        return self._luck * (1 + self._drift * self._turn) * sum(clock.microseconds for clock in self._layers) / 1e3

    def layers(self) -> Sequence[LayerClock]:
        return self._layers if self._tells_layers else ()


class FakeMeter(Meter):
    """Counts what it is asked to load."""

    identity = title = "a fake device"
    tells_layers = True
    drift = 0.0  # by a request
    luck = 1.0  # of every network

    def __init__(self, options: MeterOptions) -> None:
        super().__init__(options)
        self.identity = f"{self.identity} {type(self).__name__}"
        if options.device != "CPU":
            msg = f"budget.device: the fake has no device '{options.device}' here, it has ['CPU']."
            raise ExportError(msg)
        self.loaded.clear()

    loaded: list[int] = []  # noqa: RUF012  # of the last meter, for tests

    def load(self, model: nn.Module, example_inputs: Any) -> LoadedNetwork:
        assert not model.training
        self.loaded.append(sum(parameter.numel() for parameter in model.parameters()))
        drift = self.drift if self.loaded[-1] < self.loaded[0] else 0.0
        return Counting(model, tells_layers=self.tells_layers, drift=drift, luck=self.luck)


class Silent(FakeMeter):
    """Says nothing of layers."""

    tells_layers = False


class Noisy(FakeMeter):
    """A device that slows down, for small networks alone."""

    drift = 0.002


class Lucky(FakeMeter):
    """A device on which a pruned network seems faster than it is, the first time that it is measured."""

    forever = True

    def load(self, model: nn.Module, example_inputs: Any) -> LoadedNetwork:
        super().load(model, example_inputs)
        *before, last = self.loaded
        again = last in before[1:] or (not self.forever and len(set(before)) < len(before) - 1)
        return Counting(model, tells_layers=False, luck=1.0 if again or last == self.loaded[0] else 0.85)


class LuckyOnce(Lucky):
    """The same, until a network is measured anew."""

    forever = False


class Plugin:
    @hookimpl
    def compactprune_latency_meters(self) -> Mapping[str, Any]:
        return {"fake": FakeMeter, "silent": Silent, "noisy": Noisy, "lucky": Lucky, "lucky_once": LuckyOnce}


def with_fakes(plugins: Plugins) -> Plugins:
    """The same plugins and the fake devices ``fake``, ``silent``, ``noisy``, ``lucky`` and ``lucky_once``."""
    plugins.register(Plugin(), "fakes")
    return plugins
