"""Runs a model once and records which channels hang together (DESIGN: labels, rules, one solve)."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nncf.common.logging import nncf_logger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nncf_compactprune.channels.groups import ChannelGraph, build_graph
from nncf_compactprune.channels.labels import DimLabels, LabelArray, LabelSpace, Pin, Reason, Role, ViewByNumber
from nncf_compactprune.channels.running_code import Number, numbers_in_code, user_location
from nncf_compactprune.channels.shapes import ShapesOnly, ValuesNeeded
from nncf_compactprune.channels.terms import HEAD_COUNTS, HEAD_PRODUCTS, HEAD_WIDTHS, AttributeTerm, MacTerm
from nncf_compactprune.errors import TraceError, first_line
from nncf_compactprune.host.calls import call_model, count_of, evaluating
from nncf_compactprune.host.marks import Writes
from nncf_compactprune.host.nncf_quantization import carries_quantizers
from nncf_compactprune.host.tensors import carries_channels, carries_hooks, model_tensors, named_modules
from nncf_compactprune.host.torch_internals import (
    COMPOSITE,
    original,
    register_module_forward_hook,
    register_module_forward_pre_hook,
    results_of,
    tensors_of,
    unseen_by_modes,
)
from nncf_compactprune.plugins import Plugins, default_plugins

_LABELS = "_compactprune_labels"
_CONSTANT = "_compactprune_constant"
_UNIFORM = "_compactprune_uniform"
_JOINED = "_compactprune_joined"


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    plugins: Plugins | None = None,
    allow_approximate: bool = False,
    pins: Sequence[Pin | ViewByNumber] = (),
) -> ChannelGraph:
    """Analyses which channels of a model can be removed together, and what they cost.

    The model runs once in eval mode; it is not changed. Every ATen operation is interpreted by a rule that passes
    channel labels on, declares them equal, or pins them with a reason.

    :param model: any module; frozen parameters are analysed like others.
    :param example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. MACs are counted for
        its shape, divided by the size of the first input's leading dimension.
    :param plugins: where op rules come from, default: all installed.
    :param allow_approximate: offer groups whose removal changes a normalisation over channels (LayerNorm) instead of
        pinning them.
    :param pins: channels to pin from outside, with reasons; and reshapes that follow the numbers of modules.
    :return: groups, pinned channels with reasons, exact cost model.
    :raises TraceError: the model does not run on the example input, or still carries NNCF hooks.
    """
    _refuse_hooks(model)
    rules = (plugins or default_plugins()).op_rules
    by_number = frozenset(pin.location for pin in pins if isinstance(pin, ViewByNumber))
    by_number = frozenset({""}) if "" in by_number else by_number
    try:
        tracer = Tracer(model, LabelSpace(), rules, shapes_only=True, by_number=by_number)
        tracer.run(example_inputs)
    except Exception:  # values mattered, or the run fails in any case: let real values tell
        tracer = Tracer(model, LabelSpace(), rules, shapes_only=False, by_number=by_number)
        tracer.run(example_inputs)
    tracer.run_what_only_trains(example_inputs)
    for pin in pins:
        if isinstance(pin, Pin):
            tracer.space.add_pin(pin)
    return build_graph(
        tensors=tracer.tensors,
        space=tracer.space,
        mac_terms=tracer.mac_terms,
        attributes=tracer.attributes,
        batch=_batch_size(example_inputs),
        unsupported_ops=dict(tracer.unsupported),
        by_number=by_number,
        allow_approximate=allow_approximate,
    )


def _refuse_hooks(model: nn.Module) -> None:
    if carries_hooks(model):
        if carries_quantizers(model):
            msg = (
                f"{type(model).__name__} is quantized by NNCF, whose hooks hide its weights from channel analysis: "
                "prune first, then quantize the pruned model (nncf.quantize, or one list with both entries)."
            )
            raise TraceError(msg)
        msg = (
            f"{type(model).__name__} carries NNCF hooks (masks, quantizers or re-parameterised weights), which hide "
            "its weights from channel analysis. Strip it first (nncf.strip or controller.strip())."
        )
        raise TraceError(msg)


def _batch_size(example_inputs: Any) -> int:
    return max(count_of(example_inputs), 1)


class Tracer(Writes):  # type: ignore[no-untyped-call]
    """The dispatch mode that rules talk to.

    :param model: it is only run.
    :param space: receives labels, equalities and pins.
    :param rules: ATen packet name (``"aten.convolution"``) to rule.
    :param shapes_only: leave out the arithmetic where results are of a plain shape (they are zeros then); a run that
        reads values raises :class:`~nncf_compactprune.channels.shapes.ValuesNeeded`.
    :param by_number: lines of code whose reshapes take their sizes from numbers that modules keep.
    """

    supports_higher_order_operators = False  # what their branches do with channels is not known

    def __init__(
        self,
        model: nn.Module,
        space: LabelSpace,
        rules: Mapping[str, Callable[..., None]],
        *,
        shapes_only: bool,
        by_number: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.by_number = by_number
        self.model = model
        self.space = space
        self.mac_terms: list[MacTerm] = []
        self.unsupported: Counter[str] = Counter()
        self._rules = rules
        self._shapes = ShapesOnly() if shapes_only else None
        self._noted: list[weakref.ref[Tensor]] = []
        self._resolved: dict[Any, Callable[..., None] | None] = {}
        self._constants: dict[int, DimLabels] = {}
        self._module_names = {id(module): name for name, module in named_modules(model)}
        self._stack: list[tuple[str, nn.Module]] = []
        self.attributes: list[AttributeTerm] = []
        self.chunking = False
        self.free_dimension: int | None = None
        self.inside_operation = False
        self._called: set[int] = set()
        self.tensors = model_tensors(model)
        for name, tensor in self.tensors.named():
            if carries_channels(tensor):
                self._constants[id(tensor)] = space.allocate(name, tensor.shape, name in self.tensors.buffers)

    def run(self, example_inputs: Any, *, in_training_mode: bool = False) -> None:
        """Runs the model under the mode and pins what leaves it.

        No tensor carries labels afterwards: the model may keep it.

        :param example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs.
        :param in_training_mode: in training mode, not in eval mode.
        :raises ValuesNeeded: the tracer works by shapes alone, and the network reads values.
        :raises TraceError: the model does not run on the example input.
        """
        try:
            for result in results_of(self._output(example_inputs, in_training_mode=in_training_mode)):
                self.pin_tensor(result, "model output", locate=False)
        finally:
            for tensor in (note() for note in self._noted):
                if tensor is not None:
                    vars(tensor).pop(_LABELS, None)
                    vars(tensor).pop(_CONSTANT, None)
                    vars(tensor).pop(_UNIFORM, None)
                    vars(tensor).pop(_JOINED, None)

    def run_what_only_trains(self, example_inputs: Any) -> None:
        """Once more in training mode, where the model holds layers that it leaves out in eval mode: auxiliary heads.

        They take the channels of layers that are cut, so they have to follow. They cost nothing after training, so
        their MACs do not count. What a run shows before it asks for targets is as good as the rest.

        :param example_inputs: as the model is called in eval mode.
        """
        counted, ends = len(self.mac_terms), True
        for shapes in (self._shapes, None):
            if not self._idle():
                break
            self._shapes = shapes
            try:
                self.run(example_inputs, in_training_mode=True)
                break
            except (TraceError, ValuesNeeded):
                ends = shapes is not None
        del self.mac_terms[counted:]
        idle = self._idle()
        if idle and not ends:
            nncf_logger.warning(
                "%s does not run in training mode on the example input, and these layers do not run in eval mode: %s. "
                "They stay whole. Where they take what a pruned layer gives, name that layer in ignored_scopes.",
                type(self.model).__name__,
                ", ".join(f"'{name}'" for name in idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else ""),
            )

    def _idle(self) -> list[str]:
        """Modules with weights that did not run."""
        owners = dict.fromkeys(self.space.slots[index].parameter.rpartition(".")[0] for index in self.space.unused())
        return [name for name in owners if id(self.model.get_submodule(name)) not in self._called]

    def _output(self, example_inputs: Any, *, in_training_mode: bool) -> Any:
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            run = evaluating(self.model, example_inputs, mode=self, in_training_mode=in_training_mode)
            with run, _TorchCalls(self), self:
                return call_model(self.model, example_inputs)
        except (TraceError, ValuesNeeded):
            raise
        except Exception as error:
            shapes = [tuple(x.shape) for x in tensors_of(example_inputs)]
            where = f" in module '{self.module}'" if self.module else ""
            msg = (
                f"{type(self.model).__name__} does not run on the example input of shape {shapes}{where}: "
                f"{type(error).__name__}: {first_line(error)}. "
                "Pass example inputs of the shape and dtype that the model is trained on."
            )
            raise TraceError(msg) from error
        finally:
            for handle in handles:
                handle.remove()

    # -- what rules use -----------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """Name of the module that is running."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def running(self) -> nn.Module | None:
        """The module that is running."""
        return self._stack[-1][1] if self._stack else None

    def head_axis(self, sizes: Sequence[int], labels: LabelArray) -> int | None:
        """Which factor of a view counts attention heads, as the running module's own attributes say.

        Heads are channels of their own: attention works inside each, so a whole head can go exactly. What the module
        says of their number is noted, to be told anew after a cut.

        :param sizes: the factors, in the order of the view.
        :param labels: of the dimension that is cut into them, ``[prod(sizes)]``.
        :return: index into ``sizes``, or None.
        """
        if not self._stack:
            return None
        name, module = self._stack[-1]
        counts = {key: getattr(module, key, None) for key in HEAD_COUNTS}
        widths = {getattr(module, key, None) for key in HEAD_WIDTHS}
        for axis in reversed(range(len(sizes) - 1)):
            if sizes[axis] in counts.values() or (axis == len(sizes) - 2 and sizes[-1] in widths):
                cube = labels.reshape(int(np.prod(sizes[:axis], dtype=int)), sizes[axis], -1)
                heads = np.ascontiguousarray(cube[0, :, 0])
                for key, value in counts.items():
                    if value == sizes[axis]:
                        self.note_attribute(AttributeTerm(name, key, 1, heads))
                for key in HEAD_PRODUCTS:
                    if getattr(module, key, None) == sizes[axis] * sizes[-1]:
                        self.note_attribute(AttributeTerm(name, key, sizes[-1], heads))
                return axis
        return None

    def numbers_in_code(self) -> list[Number]:
        """Numbers of the model's modules that the running code reads and that could count channels; none while torch
        itself works out where to cut (``chunk``)."""
        return [] if self.chunking else numbers_in_code(self._module_names)

    def note_attribute(self, term: AttributeTerm) -> None:
        """Channels that one attribute counts are the same channels, wherever the module meets them."""
        for earlier in self.attributes:
            if (earlier.module, earlier.attribute) == (term.module, term.attribute):
                if (earlier.unit, earlier.entries, earlier.labels.size) == (term.unit, term.entries, term.labels.size):
                    self.space.unify(earlier.labels, term.labels)
                else:
                    for labels in (earlier.labels, term.labels):
                        self.pin(labels, f"'{term.attribute}' counts channels in two ways")
                return
        self.attributes.append(term)

    def labels(self, tensor: Tensor) -> DimLabels:
        """Labels of a tensor, one entry a dimension."""
        found = self._constants.get(id(tensor))
        if found is None:
            found = getattr(tensor, _LABELS, None)
        return found if found is not None else (None,) * tensor.dim()

    def has_labels(self, tensor: Tensor) -> bool:
        """Whether any dimension carries labels."""
        return id(tensor) in self._constants or hasattr(tensor, _LABELS)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or computed from these alone (a transposed or scaled weight)."""
        return id(tensor) in self._constants or hasattr(tensor, _CONSTANT)

    def is_uniform(self, tensor: Tensor) -> bool:
        """Whether a tensor holds one value throughout, whatever its size: zeros, and what is computed of such."""
        return hasattr(tensor, _UNIFORM)

    def width(self, tensor: Tensor, dim: int) -> LabelArray | None:
        """Labels of a dimension that is taken for channels.

        A tensor of one value throughout, or a part of it that was joined on, is as wide as its code makes it: it gets
        labels of its own where it has none, and the numbers that its code read go with them. The trial cut proves it.

        :param tensor: see :meth:`labels`.
        :param dim: the dimension; negative ones count from the end.
        :return: its labels, or None where it is fixed.
        """
        labels, dim = list(self.labels(tensor)), dim % tensor.dim()
        found = labels[dim]
        if found is not None or tensor.shape[dim] == 1:
            return found
        if self.is_uniform(tensor):
            found = self.space.fresh(tensor.shape[dim])
            for number in self.makers(tensor, dim):
                self.note_attribute(AttributeTerm(number.module, number.attribute, 1, found))
        elif (joined := getattr(tensor, _JOINED, None)) and joined[0] == dim:
            found = self.side_by_side(joined[1], [self.width(part, dim) for part in joined[1]], dim)
        if found is not None:
            labels[dim] = found
            self.set(tensor, labels)
        return found

    def makers(self, tensor: Tensor, dim: int) -> list[Number]:
        """The numbers of modules that may have said how wide a tensor of one value was made.

        :param tensor: any tensor; others have none.
        :param dim: the dimension.
        """
        return [number for number in getattr(tensor, _UNIFORM, ()) if number.value == tensor.shape[dim]]

    def joined(self, out: Tensor, parts: Sequence[Tensor], dim: int) -> None:
        """Remembers what lies side by side in a tensor whose parts carry no channels yet, see :meth:`width`.

        :param out: the tensor.
        :param parts: what it was joined of.
        :param dim: along which dimension.
        """
        self._note(out, _JOINED, (dim, tuple(parts)))

    def side_by_side(self, parts: Sequence[Tensor], labels: Sequence[LabelArray | None], dim: int) -> LabelArray | None:
        """Labels of tensors that are joined along a dimension; a part without channels is fixed.

        :param parts: the tensors.
        :param labels: of each, along the dimension.
        :param dim: the dimension.
        :return: shape ``[sum of the widths]``, or None where no part has channels.
        """
        if all(array is None for array in labels):
            return None
        whole = []
        for part, array in zip(parts, labels, strict=True):
            if array is None:
                array = self.space.fresh(part.shape[dim])
                self.pin(array, "concatenated with a fixed part")
            whole.append(array)
        return np.concatenate(whole)

    def not_uniform(self, tensor: Tensor) -> None:
        """Something was written into a tensor, or into a part of it."""
        for one in (tensor, tensor._base):
            if one is not None and hasattr(one, _UNIFORM):
                delattr(one, _UNIFORM)

    def set(self, tensor: Tensor, labels: Sequence[LabelArray | None]) -> None:
        """States the labels of an operation's result.

        :param tensor: the result; parameters and buffers keep their own.
        :param labels: one entry a dimension.
        """
        if id(tensor) in self._constants:
            return
        for array in labels:
            if array is not None:
                self._note(tensor, _LABELS, tuple(labels))
                return
        if hasattr(tensor, _LABELS):
            delattr(tensor, _LABELS)

    def _note(self, tensor: Tensor, name: str, value: Any) -> None:
        """Writes a note on a tensor, which :meth:`run` takes off again: the model may keep the tensor."""
        setattr(tensor, name, value)
        self._noted.append(weakref.ref(tensor))

    def unify(self, left: LabelArray, right: LabelArray) -> None:
        """Declares labels equal position by position.

        :param left: labels, of any shape.
        :param right: labels whose shape broadcasts with that of ``left``.
        """
        self.space.unify(left, right)

    def same(self, left: LabelArray | None, right: LabelArray | None, reason: str) -> LabelArray | None:
        """Declares two dimensions of equal size the same; where only one carries labels, it is pinned.

        :param left: labels of the one, or None.
        :param right: labels of the other, same shape, or None.
        :param reason: why it is pinned.
        :return: the labels of both, or None where neither has any.
        """
        if left is None or right is None:
            only = left if right is None else right
            if only is not None:
                self.pin(only, reason)
            return only
        self.space.unify(left, right)
        return left

    def pin(self, labels: LabelArray | None, text: str, *, kind: str = "pinned", locate: bool = True) -> None:
        """States why these channels must stay.

        :param labels: the channels; None does nothing.
        :param text: the reason, with the operation.
        :param kind: see :class:`~nncf_compactprune.channels.labels.Reason`.
        :param locate: whether the line of the user's code is noted too.
        """
        if labels is not None:
            location = user_location(2) if locate and kind != "structural" else ""
            self.space.pin(labels, Reason(text, self.module, location, kind))

    def pin_tensor(self, tensor: Tensor, text: str, *, kind: str = "pinned", locate: bool = True) -> None:
        """Pins every labelled dimension of a tensor.

        :param tensor: with or without labels.
        :param text: see :meth:`pin`.
        :param kind: see :meth:`pin`.
        :param locate: see :meth:`pin`.
        """
        for array in self.labels(tensor):
            self.pin(array, text, kind=kind, locate=locate)

    def mark(self, labels: LabelArray | None, role: Role) -> None:
        """States the role of a parameter dimension.

        :param labels: the labels of the dimension; other arrays, and ``None``, are ignored.
        :param role: ``"producer"``, ``"consumer"`` or ``"norm"``.
        """
        self.space.mark(labels, role)

    def align(self, labels: LabelArray | None, multiple: int) -> None:
        """States that the operation takes a parameter dimension in multiples only.

        :param labels: see :meth:`mark`.
        :param multiple: of positions.
        """
        self.space.align(labels, multiple)

    def count_macs(self, total: int, *dims: LabelArray | None) -> None:
        """Adds the cost of an operation.

        :param total: multiply-accumulates of the dense operation, for the whole batch.
        :param dims: labels of the dimensions that the cost is proportional to; None for one that stays.
        """
        arrays = tuple(array for array in dims if array is not None)
        constant = total
        for array in arrays:
            constant //= array.size
        self.mac_terms.append(MacTerm(constant, arrays, self.module))

    # -- machinery ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.memory.save(func, args, kwargs)
        labelled, constant = False, True
        fills: list[tuple[Number, ...] | None] = []
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor):
                    labelled = labelled or self.has_labels(tensor)
                    constant = constant and self.is_constant(tensor)
                    fills.append(getattr(tensor, _UNIFORM, None))
        labelled = labelled or (func is _CAT and any(numbers is not None for numbers in fills))
        rule = self._rule(func) if labelled else None
        if labelled and rule is None and func.has_kernel_for_dispatch_key(COMPOSITE):
            return self._taken_apart(func, args, kwargs)
        out = None if self._shapes is None else self._shapes.result(func, args, unchanged=not labelled)
        if out is None:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and _makes(func):
            self._note(out, _UNIFORM, tuple(n for n in self.numbers_in_code() if n.value in out.shape))
        elif isinstance(out, Tensor) and fills and None not in fills and _fills(func):
            self._note(out, _UNIFORM, tuple(dict.fromkeys(number for said in fills for number in said or ())))
        elif args and isinstance(args[0], Tensor) and hasattr(args[0], _UNIFORM) and func._schema.is_mutable:
            self.not_uniform(args[0])
        if not labelled:
            return out
        if constant and isinstance(out, Tensor):
            self._note(out, _CONSTANT, True)
        if rule is None:
            self.no_rule(func, args, kwargs, "no rule for the operation")
            return out
        self._apply(rule, func, args, kwargs, out)
        return out

    def _apply(
        self, rule: Callable[..., None], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        try:
            rule(self, func, args, kwargs, out)
        except Exception as error:  # a rule that does not know this use of its operation must not end the analysis
            nncf_logger.warning("The rule of %s failed in '%s': %s", func, self.module, error)
            self.no_rule(func, args, kwargs, "the rule failed for this use of the operation")

    def _taken_apart(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation as the smaller ones it consists of. Torch does so itself, except in inference mode."""
        before, self.inside_operation = self.inside_operation, True
        try:
            with self:
                return func.decompose(*args, **kwargs)
        finally:
            self.inside_operation = before

    def rule_of_whole(self, func: Any) -> Callable[..., None] | None:
        """The rule of a function of torch that is one operation to the analysis, however torch computes it; None of
        all others.

        :param func: as function modes see it.
        """
        name = getattr(func, "__name__", "")
        return self._rules.get(f"aten.{name}") if name in _WHOLE else None

    def as_one(self, rule: Callable[..., None], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation, and leaves what it consists of to its rule.

        :param rule: of the operation.
        :param func: see :meth:`rule_of_whole`.
        :param args: its positional arguments.
        :param kwargs: its keyword arguments.
        """
        with unseen_by_modes():
            out = func(*args, **kwargs)
        self._apply(rule, func, args, kwargs, out)
        return out

    def _rule(self, func: Any) -> Callable[..., None] | None:
        rule = self._resolved.get(func, _UNRESOLVED)
        if rule is _UNRESOLVED:
            rule = self._resolved[func] = self._resolve(func)
        return rule

    def _resolve(self, func: Any) -> Callable[..., None] | None:
        name = str(func.overloadpacket)
        rule = self._rules.get(f"{name}.{func._overloadname}") or self._rules.get(name)
        if rule is None and name.endswith("_"):
            rule = self._rules.get(name[:-1])
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules.get("pointwise")
        return rule

    def no_rule(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], why: str) -> None:
        """Pins everything that an operation touches, and counts it as unsupported.

        :param func: the operation.
        :param args: its positional arguments.
        :param kwargs: its keyword arguments.
        :param why: the reason, in front of the operation's name.
        """
        name = str(getattr(func, "overloadpacket", func.__name__))
        tensors = tensors_of((args, dict(kwargs)))
        if any(self.has_labels(tensor) for tensor in tensors):
            self.unsupported[name] += 1
            for tensor in tensors:
                self.pin_tensor(tensor, f"{why} {name}")

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._called.add(id(module))
        self._stack.append((self._module_names.get(id(module), self.module), module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()


_RESHAPES = tuple(map(original, (torch.reshape, Tensor.reshape)))
_UNFLATTENS = tuple(map(original, (torch.unflatten, Tensor.unflatten)))
_CHUNKS = tuple(map(original, (torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split)))
#: operations that make a tensor of one value
_MAKES = frozenset(
    {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
)
#: operations that give such a tensor where all their tensors are such
_FILLS = frozenset({
    "fill_", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "transpose", "t", "permute", "slice",
    "select", "zero_", "clone", "_to_copy", "detach", "alias",
})  # fmt: skip
_CAT = torch.ops.aten.cat.default


@functools.cache
def _makes(func: Any) -> bool:
    """Whether an operation makes a tensor of one value, whatever its tensors hold."""
    return func._schema.name.partition("::")[2] in _MAKES


@functools.cache
def _fills(func: Any) -> bool:
    """Whether an operation's result holds one value throughout, given that its tensors do."""
    draws = torch.Tag.nondeterministic_seeded in func.tags
    return func._schema.name.partition("::")[2] in _FILLS or (torch.Tag.pointwise in func.tags and not draws)


#: functions of torch that are one operation to the analysis: what they consist of differs from device to device
_WHOLE = frozenset(
    {
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
        "_pack_padded_sequence", "_pad_packed_sequence",
    }
)  # fmt: skip
_ATTENTION = original(torch.nn.functional.scaled_dot_product_attention)


class _TorchCalls(TorchFunctionMode):
    """Sees what operations do not tell any more.

    The width of attention heads sets the scale of the scores, and is pinned, unless the code gives a scale of its own:
    below, the scale may be a number already, when torch takes attention apart into products. A chunk is a split by a
    constant size, below.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION and kwargs.get("scale") is None:
            for tensor in (*args[:2], kwargs.get("query"), kwargs.get("key")):
                if isinstance(tensor, Tensor):
                    width = self._tracer.labels(tensor)[-1]
                    self._tracer.pin(width, "width of an attention head, which sets its scale")
        whole = self._tracer.rule_of_whole(func)
        if whole is not None:
            return self._tracer.as_one(whole, func, args, kwargs)
        before = self._tracer.chunking, self._tracer.free_dimension
        self._tracer.chunking = self._tracer.chunking or func in _CHUNKS
        if func in _RESHAPES or func in _UNFLATTENS:  # below, torch has worked the size out
            self._tracer.free_dimension = _free_dimension(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._tracer.chunking, self._tracer.free_dimension = before


def _free_dimension(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Which dimension of its result the code leaves free in a reshape (-1)."""
    if func in _RESHAPES:
        sizes = kwargs.get("shape", args[1] if len(args) == 2 else args[1:])
        first = 0
    else:
        sizes = kwargs.get("sizes", args[2] if len(args) > 2 else ())
        first = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % args[0].dim()
    return first + list(sizes).index(-1) if isinstance(sizes, (list, tuple)) and -1 in sizes else None


def _unresolved(*_: Any) -> None:
    """Marks an operation whose rule was not looked up yet."""


_UNRESOLVED: Callable[..., None] = _unresolved
