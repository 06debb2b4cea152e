"""A model made ready for the exporters: flat tensors in, flat tensors out, and what torch computes on them.

Exporters and runtimes disagree about dictionaries, ``ModelOutput`` classes and keyword arguments. All of them agree on
a row of tensors in and a row of tensors out, each with a name, so that is what they are given.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nncf_compactprune.errors import ExportError
from nncf_compactprune.export.options import ExportOptions
from nncf_compactprune.host.calls import evaluating, image_lists, unmarked
from nncf_compactprune.host.huggingface import set_for_files
from nncf_compactprune.host.marks import Writes
from nncf_compactprune.host.nncf_hooks import hooks
from nncf_compactprune.host.nncf_quantization import belongs_into_files
from nncf_compactprune.host.torch_internals import attributes_of

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ModelInputs:
    """The tensors of one call, in order, and what else the call takes.

    :param names: one name per tensor: the keyword, or the parameter's name in ``forward``.
    :param tensors: the tensors, on the CPU.
    :param by_keyword: whether ``forward`` is called with keywords.
    :param constants: keyword arguments that are no tensors; an exported file has them built in.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    by_keyword: bool
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> ModelInputs:
        """Reads a tensor, a sequence of tensors, or a mapping of keyword arguments.

        :param model: whose ``forward`` names positional inputs.
        :param example_inputs: as it is called.
        :raises ExportError: when there is no tensor, or a positional input is none.
        """
        if isinstance(example_inputs, Mapping):
            tensors = {str(key): value for key, value in example_inputs.items() if isinstance(value, Tensor)}
            constants = {str(key): value for key, value in example_inputs.items() if not isinstance(value, Tensor)}
            names: tuple[str, ...] = tuple(tensors)
            values: tuple[Any, ...] = tuple(tensors.values())
        else:
            values = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
            names = _positional_names(model, len(values))
            constants = {}
        wrong = [type(value).__name__ for value in values if not isinstance(value, Tensor)]
        if wrong or not values:
            came = wrong[0] if wrong else f"{type(example_inputs).__name__} without a tensor"
            msg = f"example_inputs: expected a tensor, a tuple of tensors, or a dict of keyword arguments, got {came}."
            if image_lists(example_inputs):
                msg += (
                    " Files take batches of pictures of one size: export the part that does (a detector's backbone), "
                    "or a module of your own that stacks them."
                )
            raise ExportError(msg)
        on_cpu = tuple(value.detach().to("cpu") for value in values)
        return cls(names, on_cpu, isinstance(example_inputs, Mapping), constants)

    @property
    def batch_size(self) -> int:
        """Length of dim 0, which all inputs that have dimensions share.

        :raises ExportError: when they differ, or no input has a dimension.
        """
        sizes = {name: tensor.shape[0] for name, tensor in zip(self.names, self.tensors, strict=True) if tensor.dim()}
        if len(set(sizes.values())) != 1:
            found = ", ".join(f"'{name}': {size}" for name, size in sizes.items()) or "no input with a dimension"
            msg = (
                f"example_inputs: a dynamic batch needs one batch size in dim 0 of every input, got {found}. "
                "Pass dynamic_batch=False to export the shapes as they are."
            )
            raise ExportError(msg)
        return int(next(iter(sizes.values())))

    def with_batch(self, size: int) -> ModelInputs:
        """The same inputs at another batch size; added samples are the given ones, shifted along their last dim.

        Shifting keeps dtype and value range, and gives samples that differ, which copies would not.
        """
        return dataclasses.replace(self, tensors=tuple(_resize_batch(tensor, size) for tensor in self.tensors))

    def with_larger_images(self) -> ModelInputs:
        """The same images, half as large again, in multiples of 32."""
        sizes = [[-(-side * 3 // 64) * 32 for side in tensor.shape[2:]] for tensor in self.tensors]
        return dataclasses.replace(
            self,
            tensors=tuple(
                nn.functional.interpolate(tensor, size=size) if tensor.dim() == 4 else tensor
                for tensor, size in zip(self.tensors, sizes, strict=True)
            ),
        )

    def arrays(self) -> tuple[Array, ...]:
        """The tensors as C-contiguous NumPy arrays."""
        return tuple(np.ascontiguousarray(tensor.numpy()) for tensor in self.tensors)


class FlatModel(nn.Module):
    """Calls a model with tensors by position and returns its output tensors as a flat tuple."""

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        super().__init__()
        self.model = model
        self.names = inputs.names
        self.by_keyword = inputs.by_keyword
        self.constants = dict(inputs.constants)
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in named_outputs(self.call(tensors)))

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """The model's own output."""
        if self.by_keyword:
            return self.model(**dict(zip(self.names, tensors, strict=True)), **self.constants)
        return self.model(*tensors)


@dataclass(frozen=True)
class Reference:
    """What torch computes on one batch.

    :param inputs: the batch.
    :param outputs: per output, in order, its values.
    """

    inputs: ModelInputs
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class Prepared:
    """A model in evaluation mode on the CPU, ready to be traced and compared.

    :param flat: the model behind a flat signature.
    :param trace_inputs: what to trace it with; never a batch of 1 when the batch is dynamic.
    :param references: the example batch, and a second batch size when the batch is dynamic.
    :param input_names: one per tensor of ``trace_inputs``.
    :param output_names: one per tensor that ``flat`` returns.
    :param dynamic_batch: whether dim 0 of every input stays open.
    :param options: what else was asked for.
    """

    flat: FlatModel
    trace_inputs: ModelInputs
    references: tuple[Reference, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_batch: bool
    options: ExportOptions = field(default_factory=ExportOptions)

    def open_dims(self, tensor: Tensor) -> dict[int, str]:
        """Which dimensions of an input stay open, with their names."""
        found = {0: "batch"} if self.dynamic_batch and tensor.dim() else {}
        if self.options.dynamic_size and tensor.dim() == 4:
            found |= {2: "height", 3: "width"}
        return found

    def of_one(self) -> Prepared:
        """The same with a batch of 1 in place of an open one."""
        if not self.dynamic_batch:
            return self
        references = tuple(one for one in self.references if one.inputs.batch_size == 1)
        return dataclasses.replace(self, trace_inputs=references[0].inputs, references=references, dynamic_batch=False)

    @contextmanager
    def after_a_run(self) -> Iterator[None]:
        """The model as its first run on ``trace_inputs`` leaves it; afterwards as it was.

        A network may keep what it computed for the shape of its last input, such as a detector its anchors. Computed
        while it is traced, that differs from run to run, and the model would keep the tracer's fake tensors.
        """
        writes = Writes()
        with unmarked(self.flat.model, mode=writes):
            with torch.no_grad(), writes:
                self.flat(*(tensor.clone() for tensor in self.trace_inputs.tensors))
            yield


@contextmanager
def prepared(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic_batch: bool,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    options: ExportOptions | None = None,
) -> Iterator[Prepared]:
    """Yields the model ready for export; afterwards it is as it was (training flags and device included).

    :param model: on any device, in any mode.
    :param example_inputs: a tensor, a tuple of tensors, or a dict of keyword arguments.
    :param dynamic_batch: whether dim 0 of every input stays open.
    :param input_names: one per input tensor; those of ``forward`` by default.
    :param output_names: one per output tensor; see :func:`named_outputs` for the default.
    :param options: see :class:`~nncf_compactprune.export.options.ExportOptions`.
    :raises ExportError: when the inputs or names do not fit, the forward fails, or an output is not finite.
    """
    options = options or ExportOptions()
    inputs = ModelInputs.of(model, example_inputs)
    if options.batch is not None:
        dynamic_batch, inputs = False, inputs.with_batch(options.batch)
    batches = [inputs]
    trace_inputs = inputs
    if dynamic_batch:
        size = inputs.batch_size
        # torch.export may take a size of 1 for a constant, so trace with 2 or more. The second size to compare was not
        # traced, or a batch size that got stuck in the file would go unseen.
        trace_inputs = inputs if size > 1 else inputs.with_batch(2)
        batches.append(inputs.with_batch(1 if size > 1 else 3))
    if options.dynamic_size:
        batches.append(batches[-1].with_larger_images())
    with evaluation_on_cpu(model) as frozen:
        flat = FlatModel(frozen, inputs)
        names: tuple[str, ...] = ()
        references = []
        for batch in batches:
            names, outputs = _compute(flat, batch, other_batch=batch is not inputs)
            references.append(Reference(batch, outputs))
        ins = _checked_names("input_names", input_names, inputs.names)
        outs = _checked_names("output_names", output_names, tuple(f"{n}_output" if n in ins else n for n in names))
        if clash := sorted(set(ins) & set(outs)):
            msg = f"output_names: '{clash[0]}' is already the name of an input. Give the output another name."
            raise ExportError(msg)
        yield Prepared(flat, trace_inputs, tuple(references), ins, outs, dynamic_batch, options)


def outputs_of(flat: FlatModel, inputs: ModelInputs) -> tuple[Array, ...]:
    """What torch computes; the model is as it was afterwards.

    :param flat: in evaluation mode.
    :param inputs: a batch.
    """
    with unmarked(flat.model), torch.no_grad():
        return tuple(out.numpy().copy() for out in flat(*(tensor.clone() for tensor in inputs.tensors)))


def named_outputs(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walks tensors, sequences, mappings (``ModelOutput`` is one) and dataclasses; ``None`` and plain values are passed
    over.

    A lone tensor is named ``output``, a sequence's ``output_0``, ``output_1``, a mapping's by its keys, a dataclass's
    by its fields; levels are joined with a dot.

    :param output: what a model returns.
    :param prefix: of the names.
    :return: pairs of name and tensor.
    :raises ExportError: when it meets something else.
    """
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, (tuple, list)):
        for position, value in enumerate(output):
            yield from named_outputs(value, f"{prefix}.{position}" if prefix else f"output_{position}")
    elif dataclasses.is_dataclass(output):
        yield from named_outputs(attributes_of(output), prefix)
    elif output is not None and not isinstance(output, (bool, int, float, str)):
        msg = (
            f"the model returns {type(output).__name__}; expected tensors, tuples, dicts, dataclasses or a ModelOutput."
        )
        raise ExportError(msg)


def refuse_hooks(model: nn.Module, *, stripped_quantizers: bool) -> None:
    """Refuses a model that still carries NNCF hooks: what they compute belongs to training, not into a file.

    :param model: it is only looked at.
    :param stripped_quantizers: accept what ``nncf.strip`` leaves of a quantized model: torch's own fake quantizers.
        Those that say ``exports_to_onnx`` are accepted always.
    :raises ExportError: naming the hooks found.
    """
    for name, module in model.named_modules():
        found = {hook.key: hook.module for hook in hooks(module)}
        quantizers = {key for key, hook in found.items() if isinstance(hook, torch.ao.quantization.FakeQuantizeBase)}
        everywhere = {key for key in quantizers if getattr(found[key], "exports_to_onnx", False)}
        taken = quantizers if stripped_quantizers else everywhere
        left = [key for key, hook in found.items() if key not in taken and not belongs_into_files(hook)]
        if not left:
            continue
        kinds = ", ".join(sorted({type(found[key]).__name__ for key in left}))
        where = f"module '{name}'" if name else "the model"
        if quantizers.issuperset(left):
            remedy = "A quantized model exports to OpenVINO, not to ONNX."
        else:
            remedy = "Strip first: ctrl.strip(), or nncf.strip(model, example_input=...) for a model that NNCF changed."
        msg = f"{where} still carries {len(left)} NNCF hooks ({kinds}), the first at '{left[0]}'. {remedy}"
        raise ExportError(msg)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model computes with fake quantizers, so that its files are INT8."""
    return any(isinstance(hook.module, torch.ao.quantization.FakeQuantizeBase) for hook in hooks(model))


def refuse_other_dtypes(model: nn.Module) -> None:
    """The FP32 file is the model itself, so its parameters must be float32.

    :raises ExportError: naming a parameter of another floating type.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            msg = f"parameter '{name}' is {parameter.dtype}, expected torch.float32. Call model.float() first."
            raise ExportError(msg)


def reason_of(error: BaseException) -> str:
    """The first line of the innermost cause that says something: exporters and runtimes wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    # OpenVINO puts the places in its own sources first.
    lines = [line for line in lines if line and not line.startswith("Exception from src")]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextmanager
def evaluation_on_cpu(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode on the CPU: itself when it is there already, else a copy."""
    tensors = [*model.parameters(), *model.buffers()]
    elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    on_cpu = copy.deepcopy(model).to("cpu") if elsewhere else model
    buffers = [(buffer, buffer.detach().clone()) for buffer in on_cpu.buffers()]
    try:
        # The mode is not entered: exporters do not run under a dispatch mode.
        with set_for_files(on_cpu), evaluating(on_cpu, mode=Writes()):
            yield on_cpu
    finally:
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def _compute(flat: FlatModel, inputs: ModelInputs, *, other_batch: bool) -> tuple[tuple[str, ...], tuple[Array, ...]]:
    try:
        # Cloned, because a model may write into its input or return it.
        with unmarked(flat.model):
            outputs = list(named_outputs(flat.call([tensor.clone() for tensor in inputs.tensors])))
    except ExportError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(inputs.names, inputs.tensors, strict=True))
        remedy = " Pass dynamic_batch=False to export one batch size only." if other_batch else ""
        msg = f"the model could not be run on {shapes}: {reason_of(error)}.{remedy}"
        raise ExportError(msg) from error
    if not outputs:
        msg = "the model returns no tensor; there is nothing to export."
        raise ExportError(msg)
    for name, tensor in outputs:
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            msg = (
                f"output '{name}' is not finite: {bad} of {tensor.numel()} values are NaN or infinite. "
                "Such a model cannot be verified; check its weights and the example inputs."
            )
            raise ExportError(msg)
    return tuple(name for name, _ in outputs), tuple(tensor.detach().numpy().copy() for _, tensor in outputs)


def _checked_names(option: str, given: Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return default
    if len(given) != len(default) or len(set(given)) != len(given):
        msg = f"{option}: expected {len(default)} different names (by default {list(default)}), got {list(given)}."
        raise ExportError(msg)
    return tuple(given)


def _positional_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the first parameters of ``forward``; ``input_0``, ... where it does not name so many."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    if len(known) >= count:
        return tuple(known[:count])
    return tuple(f"input_{position}" for position in range(count)) if count > 1 else ("input",)


def _resize_batch(tensor: Tensor, size: int) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] == size:
        return tensor
    rows = tensor.shape[0]
    repeats = -(-size // rows)
    shifted = [tensor.roll(step, dims=-1) if tensor.dim() > 1 else tensor for step in range(repeats)]
    return torch.cat(shifted)[:size].contiguous()
