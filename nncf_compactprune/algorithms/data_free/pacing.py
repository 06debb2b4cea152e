"""Two runs in step: a reference model and the one being compressed meet at every layer.

Layer-wise compression needs, at each layer, what the reference computes there and what the already compressed prefix
delivers. Running each model anew for every layer would cost as many passes as there are layers; keeping everything the
reference computes would cost its whole activation memory. Here each model runs once, the reference in a thread that
waits at every watched module until the compressed one has come there too. Memory: the live activations of two forward
passes, and one watched layer's input and output.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from nncf_compactprune.algorithms.data_free.operations import Call, Calls, Operation
from nncf_compactprune.host.tensors import named_modules


@dataclass(frozen=True)
class Met:
    """What the reference model computes at one module.

    :param name: the module.
    :param inputs: its first input.
    :param output: its output.
    :param operation: what goes from one to the other, of a layer that can be re-fitted.
    """

    name: str
    inputs: Tensor
    output: Tensor
    operation: Operation | None = None


class _Stopped(Exception):
    """The other side gave up."""


class Reference:
    """A model's forward pass in a thread of its own, one watched module at a time.

    Use as a context manager; leaving it ends the thread, wherever it waits.

    :param model: in eval mode; it is only run.
    :param call: runs the model on the inputs.
    :param layers: names of layers whose operations are handed out by :meth:`meet`, in the order they happen.
    :param modules: names of other modules whose calls are.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module], Any],
        layers: Collection[str] = (),
        modules: Collection[str] = (),
    ) -> None:
        self._met: queue.Queue[Met | BaseException] = queue.Queue()
        self._go_on = threading.Semaphore(0)
        self._stopped = self._waiting = False
        self._model, self._call = model, call
        self._handles = [
            module.register_forward_hook(lambda m, args, out, name=name: self._deliver(Met(name, args[0], out)))
            for name, module in named_modules(model)
            if name in modules
        ]
        self._weights = {id(model.get_parameter(f"{name}.weight")): name for name in layers}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Reference:
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

    def meet(self, name: str) -> Met:
        """Lets the reference run to its next watched module. What an earlier call returned may change from now on, as
        activations may work in place.

        :raises RuntimeError: the two models do not run the same modules in the same order.
        """
        if self._waiting:
            self._go_on.release()
        met = self._met.get()
        self._waiting = True
        if isinstance(met, BaseException):
            raise met
        if met.name != name:
            msg = f"the compressed model runs '{name}' where the reference runs '{met.name}'"
            raise RuntimeError(msg)
        return met

    def _run(self) -> None:
        try:
            with torch.no_grad(), Calls(self._weights, self._operation):
                self._call(self._model)
            self._met.put(RuntimeError("the reference has ended, the compressed model has not"))
        except _Stopped:
            pass
        except BaseException as error:
            self._met.put(error)

    def _operation(self, name: str, call: Call) -> Tensor:
        output = call.run(call.weight, call.bias)
        self._deliver(Met(name, call.input, output, call.operation))
        return output

    def _deliver(self, met: Met) -> None:
        if not self._stopped:
            self._met.put(met)
            self._go_on.acquire()
        if self._stopped:
            raise _Stopped
