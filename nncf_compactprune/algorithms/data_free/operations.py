"""The operations that least squares can re-fit: each convolution or linear map whose weight is a parameter of its own.

What counts is what an operation really gets, not what the attributes of a module say: a layer may pad in its own
``forward``, a network in front of the layer, and a word (``padding="same"``) or a quantizer may come between.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nncf_compactprune.host.calls import call_model, evaluating
from nncf_compactprune.host.tensors import named_modules, own_tensors
from nncf_compactprune.host.torch_internals import Convolution, original

#: layers of several maps in one, whose weights are used by operations of their own
COMPOUND = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
MOST_INPUTS = 8192  # of one output: second moments of more take gigabytes, and minutes to solve
_LINEAR = ("input", "weight", "bias")
_CONVOLUTION = (*_LINEAR, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_LINEAR, "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    original(getattr(functional, name)): arguments
    for names, arguments in (
        (("linear",), _LINEAR),
        (("conv1d", "conv2d", "conv3d"), _CONVOLUTION),
        (("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    )
    for name in names
}


@dataclass(frozen=True)
class Operation:
    """How an operation's outputs follow from its inputs.

    With ``d = in/groups * taps``, a convolution is a product of patches ``[groups, n * places, d]`` (im2col) and rows
    ``[groups, out/groups, d]``. A linear map has one group and one tap. A transposed convolution is a convolution with
    the taps in reverse, of inputs with zeros between them.

    :param shape: of the weight: ``[out, in]``, ``[out, in/groups, *kernel]``; transposed ``[in, out/groups, *kernel]``.
    :param stride: of each spatial dimension, as are dilation and output padding; empty for a linear map.
    :param padding: zeros before and after.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """Size of each spatial dimension; empty for a linear map."""
        return self.shape[2:]

    @property
    def taps(self) -> int:
        """Number of places that one output looks at."""
        return int(torch.Size(self.kernel).numel())

    @property
    def channel_dim(self) -> int:
        """Which dimension of the outputs counts channels."""
        return 1 if self.kernel else -1

    @property
    def width(self) -> int:
        """d, the length of a patch."""
        return (self.shape[0] // self.groups if self.transposed else self.shape[1]) * self.taps

    def rows(self, weight: Tensor) -> Tensor:
        """A weight as matrices ``[groups, out/groups, d]``, float64; :meth:`weight` is the way back."""
        weight = weight.detach().double()
        if self.transposed:
            weight = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2).flip(self._spatial(3))
        return weight.reshape(self.groups, -1, self.width)

    def weight(self, rows: Tensor) -> Tensor:
        """Matrices ``[groups, out/groups, d]`` in the weight's shape."""
        if self.transposed:
            shape = (self.groups, self.shape[1], self.shape[0] // self.groups, *self.kernel)
            rows = rows.reshape(shape).flip(self._spatial(3)).transpose(1, 2)
        return rows.reshape(self.shape)

    def patches(self, x: Tensor) -> Tensor:
        """Inputs ``[n, in, *places]`` or ``[n, ..., in]`` as ``[groups, n * places, d]``, float32."""
        x = x.float()
        if not self.kernel:
            return x.reshape(1, -1, x.shape[-1])
        stride, padding = self.stride, self.padding
        if self.transposed:
            x, stride, padding = self._spread(x), (1,) * len(stride), self._padding_of_spread()
        x = functional.pad(x, [side for pair in reversed(padding) for side in pair])
        for at, (taps, step, apart) in enumerate(zip(self.kernel, stride, self.dilation, strict=True)):
            x = x.unfold(2 + at, (taps - 1) * apart + 1, step)[..., ::apart]
        x = x.view(len(x), self.groups, -1, *x.shape[2:])  # [n, groups, in/groups, *places, *kernel]
        last = 3 + len(self.kernel)
        x = x.permute(1, 0, *range(3, last), 2, *range(last, last + len(self.kernel)))
        return x.reshape(self.groups, -1, self.width)

    def outputs(self, y: Tensor) -> Tensor:
        """Outputs ``[n, out, *places]`` or ``[n, ..., out]`` as ``[groups, n * places, out/groups]``, float32."""
        y = y.float().movedim(self.channel_dim, -1)
        return y.reshape(-1, self.groups, y.shape[-1] // self.groups).transpose(0, 1)

    def outputs_kept(self, kept: Mapping[int, Tensor]) -> Tensor | None:
        """Which output channels are left of this (dense) operation; None for all.

        :param kept: dimension of the weight to kept positions.
        """
        if not self.transposed or not kept:
            return kept.get(0)
        outs = kept.get(1, torch.arange(self.shape[1]))
        inputs = kept.get(0, torch.arange(self.shape[0]))
        groups = sorted({int(at) // (self.shape[0] // self.groups) for at in inputs})
        return (torch.tensor(groups)[:, None] * self.shape[1] + outs).flatten()

    def _spatial(self, first: int) -> list[int]:
        return list(range(first, first + len(self.kernel)))

    def _spread(self, x: Tensor) -> Tensor:
        """Inputs with ``stride - 1`` zeros between neighbours."""
        sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], self.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places = [slice(None), slice(None), *(slice(None, None, step) for step in self.stride)]
        spread[tuple(places)] = x
        return spread

    def _padding_of_spread(self) -> tuple[tuple[int, int], ...]:
        reach = [(taps - 1) * apart for taps, apart in zip(self.kernel, self.dilation, strict=True)]
        sides = zip(reach, self.padding, self.output_padding, strict=True)
        return tuple((r - before, r - after + more) for r, (before, after), more in sides)


@dataclass(frozen=True)
class Call:
    """One run of an operation.

    :param operation: what it does.
    :param input: what really enters it.
    :param weight: its weight, quantized where a hook does that.
    :param bias: its bias, or None.
    :param run: weight and bias to the output, on the same input.
    """

    operation: Operation
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor | None], Tensor]


class Calls(TorchFunctionMode):
    """While it is on, calls of convolutions and linear maps by given parameters go to a function.

    Entered around a whole model, it sees what NNCF's hooks inside have made of the operands. A weight that was
    fake-quantized still counts as the parameter.

    :param names: ``id`` of a weight to the layer's name.
    :param handle: name and call to the output.
    """

    def __init__(self, names: Mapping[int, str], handle: Callable[[str, Call], Tensor]) -> None:
        super().__init__()
        self._names, self._handle = names, handle
        self._quantized: dict[int, tuple[str, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is None:
            output = func(*args, **kwargs)
            if args and id(args[0]) in self._names and getattr(func, "__name__", "").startswith("fake_quantize"):
                self._quantized[id(output)] = self._names[id(args[0])], output
            return output
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        weight = given["weight"]
        name = self._names.get(id(weight)) or self._quantized.pop(id(weight), ("", weight))[0]
        if not name:
            return func(*args, **kwargs)

        def run(weight: Tensor, bias: Tensor | None) -> Tensor:
            output: Tensor = func(**{**given, "weight": weight, "bias": bias})
            return output

        return self._handle(name, Call(_operation(names, given), given["input"], weight, given.get("bias"), run))


def _operation(names: tuple[str, ...], given: Mapping[str, Any]) -> Operation:
    shape = tuple(given["weight"].shape)
    count = len(shape) - 2
    if not count:
        return Operation(shape)
    stride, dilation = _each(given.get("stride", 1), count), _each(given.get("dilation", 1), count)
    reach = [apart * (taps - 1) for taps, apart in zip(shape[2:], dilation, strict=True)]
    padding = given.get("padding", 0)
    if padding == "same":
        sides = tuple((r // 2, r - r // 2) for r in reach)
    else:
        sides = tuple((p, p) for p in _each(0 if padding == "valid" else padding, count))
    more = _each(given.get("output_padding", 0), count)
    return Operation(shape, stride, sides, dilation, more, given.get("groups", 1), names is _TRANSPOSED)


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


@dataclass(frozen=True)
class Layers:
    """What a forward pass says of a model's layers.

    :param found: the layers that can be re-fitted, by name, in the order in which they run.
    :param left: the others, by name, with the reason.
    """

    found: tuple[str, ...]
    left: dict[str, str]

    def among(self, names: Container[str]) -> Layers:
        """Those that another model has as well.

        :param names: of its layers.
        """
        return Layers(
            tuple(name for name in self.found if name in names),
            {name: why for name, why in self.left.items() if name in names or name.rpartition(".")[0] in names},
        )


def refittable(model: nn.Module, example_inputs: Any) -> Layers:
    """Which convolutions and linear maps least squares can re-fit.

    :param model: without hooks; it is only run.
    :param example_inputs: as the model is called.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    calls: dict[str, list[Call]] = {}

    def note(name: str, call: Call) -> Tensor:
        calls.setdefault(name, []).append(call)
        return call.run(call.weight, call.bias)

    with evaluating(model), Calls(first, note):
        call_model(model, example_inputs)
    modules = dict(named_modules(model))
    found = [name.removesuffix(".weight") for name in calls if name.endswith(".weight")]
    left: dict[str, str] = {}
    for name, module in modules.items():
        weight = own_tensors(module).get("weight")
        seen = calls.get(first.get(id(weight), ""), [])  # weights that are buffers are none that can be re-fitted
        if seen or isinstance(module, (Convolution, nn.Linear)):
            reason = _why_not(module, seen)
            if reason:
                left[name] = reason
        elif isinstance(module, COMPOUND):
            left[name] = f"{type(module).__name__} is no single convolution or linear map"
    for name in calls:
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight":
            left[name] = f"it is a weight of '{owner or type(model).__name__}' under a name of its own"
    return Layers(tuple(name for name in found if name not in left), left)


def _why_not(module: nn.Module, seen: Sequence[Call]) -> str:
    if own_tensors(module).get("weight") is None:
        return "its weight is computed from other parameters"
    if not seen:
        return "it does not run, or its weight is changed before it is used"
    if len(seen) > 1:
        return f"its weight is used {len(seen)} times"
    if seen[0].bias is not own_tensors(module).get("bias"):
        return "its bias is added apart, or changed before it is used"
    if seen[0].operation.kernel and seen[0].input.dim() != seen[0].weight.dim():
        return "it runs on examples without a batch"
    if seen[0].operation.width > MOST_INPUTS:
        return f"its {seen[0].operation.width:,} inputs (channels times taps) are too many for least squares"
    return ""
