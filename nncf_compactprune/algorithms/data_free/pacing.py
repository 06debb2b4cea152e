"""Runs in step: a reference model and the one being compressed meet at every layer, on as many images as memory allows.

Layer-wise compression needs, at each layer, what the reference computes there and what the already compressed prefix
delivers. Running each model anew for every layer would cost as many passes as there are layers; keeping everything the
reference computes would cost its whole activation memory. Here each model runs once, in a thread that waits at every
watched place until the others have come there too (:class:`Paced`).

Memory: what a forward pass keeps at the place where all wait. That is much in front, where pictures are large, and
little behind. There a few pictures have more rows than a layer needs; behind a global pooling a picture is one row. So
the first part of the images goes in front, and the others follow where there is room for them (:func:`parts_of`): they
run through layers that are done, and join.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.operations import Call, Calls, Operation
from nncf_compactprune.host.tensors import named_modules

MEMORY = 2**30  # bytes that the waiting runs may keep, about
FEWEST = 16  # images of a part, however large they are


@dataclass(frozen=True)
class Met:
    """What a run has at one place.

    :param name: the layer or module.
    :param input: what enters it.
    :param output: what it gives, of a layer of a run that computes it first.
    :param operation: what goes from one to the other, of a layer that can be re-fitted.
    """

    name: str
    input: Tensor
    output: Tensor | None = None
    operation: Operation | None = None


class _Stopped(Exception):
    """The other side gave up."""


class Paced:
    """A model's forward pass in a thread of its own, one watched place at a time.

    Use as a context manager; leaving it ends the thread, wherever it waits.

    :param model: in eval mode. No other run may have it: see :func:`twin`.
    :param call: runs the model on the inputs.
    :param layers: ``id`` of a weight to the name of its layer, which is waited at.
    :param modules: names of other modules, in front of which it waits.
    :param compute: what a layer gives once the run may go on; None: it is computed before, and handed out.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module], Any],
        layers: Mapping[int, str],
        modules: Collection[str] = (),
        compute: Callable[[str, Call], Tensor] | None = None,
    ) -> None:
        self._met: queue.Queue[Met | BaseException | None] = queue.Queue()
        self._go_on = threading.Semaphore(0)
        self._stopped = self._waiting = False
        self._model, self._call, self._layers, self._compute = model, call, layers, compute
        self._handles = [
            module.register_forward_pre_hook(lambda m, args, name=name: self._deliver(Met(name, args[0])))
            for name, module in named_modules(model)
            if name in modules
        ]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Paced:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._go_on.release()
        self._thread.join()
        for handle in self._handles:
            handle.remove()

    def step(self) -> Met | None:
        """Lets the model run to its next watched place; None where it has ended. What an earlier call returned may
        change from now on, as activations may work in place."""
        if self._waiting:
            self._go_on.release()
        met = self._met.get()
        self._waiting = True
        if isinstance(met, BaseException):
            raise met
        return met

    def meet(self, name: str) -> Met:
        """:meth:`step` to a place that is known.

        :raises RuntimeError: the model comes to another one, or to its end.
        """
        met = self.step()
        if met is None or met.name != name:
            msg = f"'{name}' runs in one model where the other {'ends' if met is None else f'runs {met.name!r}'}"
            raise RuntimeError(msg)
        return met

    def _run(self) -> None:
        try:
            with torch.no_grad(), Calls(self._layers, self._operation):
                self._call(self._model)
            self._met.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            self._met.put(error)

    def _operation(self, name: str, call: Call) -> Tensor:
        if self._compute is not None:
            self._deliver(Met(name, call.input, None, call.operation))
            return self._compute(name, call)
        output = call.run(call.weight, call.bias)
        self._deliver(Met(name, call.input, output, call.operation))
        return output

    def _deliver(self, met: Met) -> None:
        if not self._stopped:
            self._met.put(met)
            self._go_on.acquire()
        if self._stopped:
            raise _Stopped


@dataclass(frozen=True)
class Place:
    """Where runs wait.

    :param name: the layer or module.
    :param bytes: of what enters it and what it gives, for one image.
    """

    name: str
    bytes: int


def places(
    model: nn.Module, call: Callable[[nn.Module], Any], layers: Mapping[int, str], modules: Collection[str]
) -> list[Place]:
    """All places of a run, in order.

    :param model: in eval mode.
    :param call: runs it on one image.
    :param layers: see :class:`Paced`.
    :param modules: see :class:`Paced`.
    """
    found = []
    with Paced(model, call, layers, modules) as run:
        while (met := run.step()) is not None:
            tensors = [met.input, met.input if met.output is None else met.output]
            found.append(Place(met.name, sum(t.numel() * t.element_size() for t in tensors)))
    return found


@dataclass(frozen=True)
class Part:
    """Images that run together.

    :param begin: the first image.
    :param end: one behind the last image.
    :param first: index of the first place where they count.
    :param last: index of the last place where they count.
    """

    begin: int
    end: int
    first: int
    last: int


def room_for(size: int, memory: int = MEMORY) -> int:
    """How many images fit.

    :param size: of one, in bytes.
    :param memory: in bytes.
    """
    return max(FEWEST, memory // max(size, 1))


def parts_of(count: int, sizes: Sequence[int], memory: int = MEMORY) -> list[Part]:
    """Splits images so that what waits fits into memory, wherever it waits.

    :param count: number of images.
    :param sizes: what both runs keep of an image at each place, in bytes.
    :param memory: in bytes.
    :return: the first part counts everywhere, the others where most places in a row have room for them. Images that no
        place has room for are in none.
    """
    room = [room_for(size, memory) for size in sizes]
    number = math.ceil(count / min([count, *room]))
    found = []
    for at in range(number):
        begin, end = at * count // number, (at + 1) * count // number
        fits = [at == 0 or images >= end for images in room]
        runs = [list(run) for fit, run in groupby(range(len(room)), fits.__getitem__) if fit]
        if runs:
            longest = max(runs, key=len)
            found.append(Part(begin, end, longest[0], longest[-1]))
    return found


def twin(model: nn.Module) -> nn.Module:
    """A model that runs beside another one: modules of its own, the same tensors.

    What a module keeps of a run, in attributes, is its own. What is written into parameters and buffers is written in
    both.

    :param model: what to copy.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
