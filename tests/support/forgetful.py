"""Small networks that keep something of a forward pass, each in a way of its own."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gated(nn.Module):
    """Two convolutions; between them a gate that is computed from the first one's weights, ``[1, 8, 1, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.probe = nn.Parameter(torch.randn(1, 27))

    def compute(self) -> Tensor:
        return torch.sigmoid(F.linear(self.first.weight.flatten(1), self.probe)).view(1, -1, 1, 1)

    def gate(self) -> Tensor:
        return self.compute()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.gate())


class InAttribute(Gated):
    memo = None

    def gate(self) -> Tensor:
        if self.memo is None:
            self.memo = self.compute()
        return self.memo


class InDict(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[str, Tensor] = {}

    def gate(self) -> Tensor:
        if "gate" not in self.memo:
            self.memo["gate"] = self.compute()
        return self.memo["gate"]


class UntilItTrains(InDict):
    """As timm's attention: a table is kept in eval mode, and dropped when training begins."""

    def train(self, mode: bool = True) -> UntilItTrains:
        super().train(mode)
        if mode:
            self.memo = {}
        return self

    def gate(self) -> Tensor:
        return self.compute() if self.training else super().gate()


class Merged(nn.Module):
    """As loralib's layers: in eval mode the weight holds the sum, and training takes it apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.more = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.merged = False

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.conv.weight.add_(self.more, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight if self.merged else self.conv.weight + self.more
        return self.last(F.conv2d(x, weight, self.conv.bias).relu())


class InNestedContainers(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.memo = {"gates": [{"first": None}], "order": OrderedDict(), "last": deque([1], maxlen=2), "seen": {1}}

    def gate(self) -> Tensor:
        if self.memo["gates"][0]["first"] is None:
            self.memo["gates"][0]["first"] = self.compute()
            self.memo["gates"].append(1)
            self.memo["order"]["a"] = 1
            self.memo["last"].append(2)
            self.memo["seen"].add(2)
        return self.memo["gates"][0]["first"]


class InList(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.memo: list[Tensor] = []

    def gate(self) -> Tensor:
        if not self.memo:
            self.memo.append(self.compute())
        return self.memo[-1]


class InBuffer(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memo", None)

    def gate(self) -> Tensor:
        if self.memo is None:
            self.memo = self.compute()
        return self.memo


class InNewBuffer(Gated):
    def gate(self) -> Tensor:
        if not hasattr(self, "memo"):
            self.register_buffer("memo", self.compute(), persistent=False)
        return self.memo


class InCachedProperty(Gated):
    @functools.cached_property
    def memo(self) -> Tensor:
        return self.compute()

    def gate(self) -> Tensor:
        return self.memo


class InCachedMethod(Gated):
    @functools.cache  # noqa: B019
    def gate(self) -> Tensor:
        return self.compute()


class InCacheOfItsOwn(Gated):
    """As transformers' decorators do it: the cache lives in an attribute."""

    def gate(self) -> Tensor:
        if not hasattr(self, "memo"):
            self.memo = functools.lru_cache(lambda: self.compute())
        return self.memo()


@functools.cache
def cached_gate(model: Gated) -> Tensor:
    return model.compute()


class InCachedFunction(Gated):
    def gate(self) -> Tensor:
        return cached_gate(self)


class InClass(Gated):
    memo: dict[int, Tensor] = {}  # noqa: RUF012

    def gate(self) -> Tensor:
        if id(self) not in InClass.memo:
            InClass.memo[id(self)] = self.compute()
        return InClass.memo[id(self)]


class Drawer:
    def __init__(self) -> None:
        self.kept = None


class InHelper(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.drawer = Drawer()

    def gate(self) -> Tensor:
        if self.drawer.kept is None:
            self.drawer.kept = self.compute()
        return self.drawer.kept


class InTable(Gated):
    """A table built on demand, by a product of constants."""

    memo = None

    def gate(self) -> Tensor:
        if self.memo is None:
            steps = torch.arange(1.0, 4.0, dtype=self.probe.dtype)
            self.memo = torch.outer(steps, steps) @ steps[:, None]
        return self.compute() * self.memo.mean()


EMPTIED = (InCachedMethod, InCacheOfItsOwn, InCachedFunction)
MEMOS: list[type[Gated]] = [
    InAttribute, InDict, InNestedContainers, InList, InBuffer, InNewBuffer, InCachedProperty, InCachedMethod,
    InCacheOfItsOwn, InCachedFunction, InClass, InHelper, InTable,
]  # fmt: skip


class Counts(Gated):
    calls = 0

    def gate(self) -> Tensor:
        self.calls += 1
        return self.compute()


class WritesBuffer(Gated):
    """Running statistics that do not ask for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(8))
        self.register_buffer("steps", torch.tensor(0))
        self.plain = torch.zeros(2)

    def gate(self) -> Tensor:
        self.seen.view(1, -1).mul_(0.5).add_(self.compute().flatten())
        self.steps += 1
        self.plain[1:] += 1
        return self.seen.view(1, -1, 1, 1)


class WritesWeight(Gated):
    """Clamps its weights in place on the way, and through ``.data``."""

    def gate(self) -> Tensor:
        with torch.no_grad():
            self.last.weight.clamp_(-0.01, 0.01)
        self.first.bias.data.zero_()
        self.probe.data = self.probe.data * 0.5
        return self.compute()


class WritesInput(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Switches(Gated):
    """Training mode, hooks, requires_grad, another submodule."""

    def gate(self) -> Tensor:
        self.last.train()
        self.first.register_forward_hook(lambda *_: None)
        self.probe.requires_grad_(False)
        self.extra = nn.Identity()
        return self.compute()


class Draws(Gated):
    """Random numbers of every source."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.legacy, self.python = np.random.RandomState(0), random.Random(0)

    def gate(self) -> Tensor:
        numbers = [torch.rand(1), torch.rand(1, generator=self.torch), random.random(), self.python.random()]
        numbers += [np.random.rand(), self.numpy.random(), self.legacy.rand()]
        return self.compute() + 0 * sum(map(float, numbers))


WRITERS: list[type[Gated]] = [Counts, WritesBuffer, WritesWeight, WritesInput, Switches, Draws]


def built(kind: type[Gated], *, dtype: torch.dtype = torch.float64) -> Gated:
    """The same network at every call; caches that outlive networks are empty."""
    InClass.memo.clear()
    InCachedMethod.gate.cache_clear()
    cached_gate.cache_clear()
    torch.manual_seed(0)
    return kind().to(dtype).eval()
