"""``onnx:FILE``: networks that are there as a file only, read by onnx2torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from nncf_compactprune.errors import ResolveError, first_line
from nncf_compactprune.host.calls import call_model
from nncf_compactprune.host.packages import require_package
from nncf_compactprune.host.torch_internals import answer_for_onnx2torch, tensors_of

UNKNOWN_SIDE = 224  # of a picture, where the file leaves it open
OPSET = 17  # of torch's first exporter, at most
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
TOLERANCE, SMALLEST = 1e-3, 1e-6  # between torch and ONNX Runtime: over the largest output, and beside it


def read_onnx(file: str, shapes: Sequence[Sequence[int]] | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of a file as a torch module, and an example of each of its inputs.

    :param file: an ``.onnx`` file with its weights, in float32.
    :param shapes: of the inputs, batch included; default: the file's, with 1 for an open batch and 224 for open sides.
    :raises ResolveError: there is no such file, it is no ONNX file, an operation or an input is not taken, or torch
        computes something else.
    """
    path = Path(file)
    if not path.is_file():
        msg = f"'{file}': no such file. Write onnx:PATH, with the path of an .onnx file."
        raise ResolveError(msg)
    converter = require_package("onnx2torch", "nncf-compactprune[onnx2torch]")
    try:
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
    except Exception as error:  # protobuf's and onnx's share no class
        msg = f"'{file}' is no ONNX file: {first_line(error)}"
        raise ResolveError(msg) from error
    constants_to_initializers(graph)
    as_older_opset(graph)
    examples = _examples(graph, file, shapes)
    answer_for_onnx2torch()
    try:
        graph = onnx.shape_inference.infer_shapes(graph, data_prop=True)
        complete_shapes(graph, examples)
        explicit_pads(graph)
        model = converter.convert(graph).eval()
    except Exception as error:
        msg = f"'{file}': onnx2torch cannot read it: {type(error).__name__}: {first_line(error)}"
        raise ResolveError(msg) from error
    fold_constants(model)
    seen = seen_reshapes(model, examples)
    fix_sizes(model, seen)
    fix_flattening(model, seen)
    weights_into_layers(model)
    train_weights(model)
    _compare(model, examples, path)
    return model, examples


def constants_to_initializers(graph: onnx.ModelProto) -> None:
    """Weights that are results of ``Constant`` operations, as PaddlePaddle writes them, become initializers, in place.

    :param graph: of a file.
    """
    kept = []
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            graph.graph.initializer.add().CopyFrom(node.attribute[0].t)
            graph.graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(kept)


def as_older_opset(graph: onnx.ModelProto) -> None:
    """Says opset 17 of a newer file, in place, as onnx2torch knows few operations of newer ones.

    Reductions had their axes as an attribute then; a reshape's sizes that are no 0 need no word of what 0 means. What
    else changed is seen where torch and ONNX Runtime are compared.

    :param graph: of a file; its constants are initializers.
    """
    values = {one.name: one for one in graph.graph.initializer}
    for node in graph.graph.node:
        sizes = values.get(node.input[1]) if node.op_type == "Reshape" else None
        if sizes is not None and onnx.numpy_helper.to_array(sizes).all():
            del node.attribute[:]
    opset = next(one for one in graph.opset_import if one.domain in ("", "ai.onnx"))
    if opset.version <= OPSET:
        return
    opset.version = OPSET
    for node in graph.graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
            axes = onnx.numpy_helper.to_array(values[node.input.pop()])
            node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))


def complete_shapes(graph: onnx.ModelProto, examples: Sequence[Tensor]) -> None:
    """Writes down in place which shapes values have on the examples, where onnx does not infer them: behind a
    reshape to sizes that are computed. onnx2torch asks for the rank of what a BatchNorm is given.

    :param graph: with the shapes that onnx infers.
    :param examples: of its inputs.
    """
    values = (*graph.graph.value_info, *graph.graph.output)
    known = {one.name for one in values if one.type.tensor_type.HasField("shape")}
    unknown = {name for node in graph.graph.node for name in node.output} - known - {""}
    if not unknown:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in sorted(unknown))
    with suppress(Exception):  # that it does not run is told where it is compared with the file
        for name, value in zip(sorted(unknown), _run(probe.SerializeToString(), examples), strict=True):
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            graph.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))


def _run(file: str | bytes, examples: Sequence[Tensor]) -> Sequence[Any]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {one.name: x.numpy() for one, x in zip(session.get_inputs(), examples, strict=True)}
    results: Sequence[Any] = session.run(None, feeds)
    return results


def explicit_pads(graph: onnx.ModelProto) -> None:
    """Writes out in place what ``auto_pad`` says: as much as the output needs to have the size of the input over the
    stride. Where the stride is above 1, this holds for the sizes that the file was read with.

    :param graph: with the shapes of its values; those that are not known keep their ``auto_pad``.
    """
    values = (*graph.graph.input, *graph.graph.value_info)
    shapes = {one.name: [side.dim_value for side in one.type.tensor_type.shape.dim] for one in values}
    shapes |= {one.name: list(one.dims) for one in graph.graph.initializer}
    for node in graph.graph.node:
        said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        sides = shapes.get(node.input[0], [])[2:] if said.get("auto_pad") in (b"SAME_UPPER", b"SAME_LOWER") else []
        if not sides or node.op_type not in ("Conv", "MaxPool", "AveragePool"):
            continue
        kernel = said.get("kernel_shape") or shapes[node.input[1]][2:]
        strides, dilations = (said.get(name) or [1] * len(sides) for name in ("strides", "dilations"))
        if not all(side or stride == 1 for side, stride in zip(sides, strides, strict=True)):
            continue
        both = [
            max((-(-side // stride) - 1) * stride + (taps - 1) * apart + 1 - side, 0)
            for side, stride, taps, apart in zip(sides, strides, kernel, dilations, strict=True)
        ]
        less, more = [pad // 2 for pad in both], [pad - pad // 2 for pad in both]
        pads = less + more if said["auto_pad"] == b"SAME_UPPER" else more + less
        del node.attribute[[one.name for one in node.attribute].index("auto_pad")]
        node.attribute.append(onnx.helper.make_attribute("pads", pads))


class _Numbers(list[float]):
    """What onnx2torch's ``Resize`` asks of a tensor."""

    def nelement(self) -> int:
        return len(self)

    def tolist(self) -> list[float]:
        return list(self)


class FixedResize(nn.Module):
    """A resize whose factors or sizes are constants of the file. Batch and channels may change.

    :param resize: onnx2torch's, which takes them as tensors.
    :param sizes: by the names of its arguments.
    """

    def __init__(self, resize: nn.Module, **sizes: Sequence[float]) -> None:
        super().__init__()
        self.resize = resize
        self.resize.ignore_bs_ch_size = True  # type: ignore[assignment]
        self.sizes = {name: _Numbers(values) for name, values in sizes.items()}

    def forward(self, x: Tensor) -> Any:
        return self.resize(x, **self.sizes)


class FixedReshape(nn.Module):
    """A reshape whose sizes are constants of the file.

    :param shape: the sizes; 0 keeps one.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape([size or x.shape[at] for at, size in enumerate(self.shape)])


class EqualParts(nn.Module):
    """A split into parts of one size, which is what the input's width says.

    :param split: onnx2torch's, whose place it takes.
    """

    def __init__(self, split: Any) -> None:
        super().__init__()
        self.count, self.axis = split.num_splits, split.axis

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return x.chunk(self.count, self.axis)


class _Reshapes(fx.Interpreter):
    """Remembers the sizes that reshapes are given as tensors, and the batch of what they reshape."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[str, tuple[int, list[int]]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if type(self.module.get_submodule(target)).__name__ == "OnnxReshape":
            self.seen[target] = len(args[0]), args[1].tolist()
        return super().call_module(target, args, kwargs)


def seen_reshapes(model: fx.GraphModule, examples: Sequence[Tensor]) -> dict[str, tuple[int, list[int]]]:
    """The batch of what each reshape is given, and the sizes that it is to have, by the reshape's name.

    :param model: as onnx2torch gives it.
    :param examples: of its inputs.
    """
    run = _Reshapes(model)
    with torch.no_grad(), suppress(Exception):  # that it does not run is told where it is compared with the file
        run.run(*examples)
    return run.seen


def fix_sizes(model: fx.GraphModule, seen: Mapping[str, tuple[int, list[int]]]) -> None:
    """Sizes that are constants of the file become numbers of the network, in place.

    onnx2torch reads them from tensors, which torch's exporter takes for unknown numbers. Where one example is reshaped
    to one, any number of them may be.

    :param model: as onnx2torch gives it.
    :param seen: of :func:`seen_reshapes`.
    """
    buffers = dict(model.named_buffers())
    for node in model.graph.nodes:
        module = model.get_submodule(node.target if node.op == "call_module" else "")
        if type(module).__name__ in ("OnnxSplit", "OnnxSplit13"):
            x, *said = node.all_input_nodes
            sizes = buffers[str(said[0].target)].tolist() if said else getattr(module, "split", None) or [0]
            if len(set(sizes)) == 1:
                model.add_submodule(str(node.target), EqualParts(module))
                node.args = (x,)
            continue
        if type(module).__name__ not in ("OnnxResize", "OnnxReshape"):
            continue
        given = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
        (_, x), *sizes = ((name, value) for name, value in given.items() if value is not None)
        if not all(isinstance(value, fx.Node) and value.target in buffers for _, value in sizes):
            continue
        numbers = {name: buffers[value.target].tolist() for name, value in sizes}
        fixed: nn.Module
        if type(module).__name__ == "OnnxResize":
            fixed = FixedResize(module, **numbers)
        else:
            batch, (first, *others) = seen.get(node.target, (0, numbers["shape"]))
            fixed = FixedReshape([0 if first == batch == 1 else first, *others])
        model.add_submodule(node.target, fixed)
        node.args, node.kwargs = (x,), {}
    model.graph.eliminate_dead_code()
    model.recompile()


def fix_flattening(model: fx.GraphModule, seen: Mapping[str, tuple[int, list[int]]]) -> None:
    """Reshapes to the batch and one size more lose what computes these, in place: exporters do not take it.

    :param model: as onnx2torch gives it.
    :param seen: of :func:`seen_reshapes`.
    """
    for node in model.graph.nodes:
        batch, sizes = seen.get(node.target, (0, []))
        if len(sizes) == 2 and sizes[0] in (batch, 0):  # what is left is one size, whoever says it
            model.add_submodule(node.target, FixedReshape([0, -1]))
            node.args, node.kwargs = node.args[:1], {}
    model.graph.eliminate_dead_code()
    model.recompile()


def fold_constants(model: fx.GraphModule) -> None:
    """What is computed from constants alone becomes one, in place: PaddlePaddle reshapes biases before it adds them.

    :param model: as onnx2torch gives it.
    """
    buffers = dict(model.named_buffers())
    for at, node in enumerate(model.graph.nodes):
        given = [buffers.get(str(one.target)) for one in node.all_input_nodes]
        if node.op != "call_module" or not given or any(value is None for value in given):
            continue
        with torch.no_grad():
            value = model.get_submodule(str(node.target))(*fx.map_arg(node.args, lambda one: buffers[str(one.target)]))
        if isinstance(value, Tensor):
            model.register_buffer(f"folded_{at}", value)
            buffers[f"folded_{at}"] = value
            with model.graph.inserting_before(node):
                node.replace_all_uses_with(model.graph.get_attr(f"folded_{at}"))
    model.graph.eliminate_dead_code()
    model.recompile()


def weights_into_layers(model: fx.GraphModule) -> None:
    """Products with a matrix of the file become linear layers, and vectors that are added to what a layer gives its
    bias, in place: layers are what is re-fitted and quantized.

    :param model: as onnx2torch gives it.
    """
    buffers = dict(model.named_buffers())
    for node in model.graph.nodes:
        module = model.get_submodule(str(node.target) if node.op == "call_module" else "")
        given = node.all_input_nodes
        if type(module).__name__ == "OnnxMatMul" and len(given) == 2:
            matrix = buffers.get(str(given[1].target))
            if matrix is not None and matrix.dim() == 2:
                linear = nn.Linear(matrix.shape[0], matrix.shape[1], bias=False)
                linear.weight.data = matrix.t().contiguous()
                model.add_submodule(str(node.target), linear)
                node.args = (given[0],)
        elif getattr(module, "math_op_function", None) is torch.add and len(given) == 2:
            for result, added in (given, given[::-1]):
                value = buffers.get(str(added.target))
                if value is not None and len(result.users) == 1 and _into_bias(model, result, value):
                    node.replace_all_uses_with(result)
                    break
    model.graph.eliminate_dead_code()
    model.recompile()


def _into_bias(model: fx.GraphModule, node: fx.Node, added: Tensor) -> bool:
    """Adds a number for each channel to a layer's bias; False: it is another sum, or another operation."""
    layer = model.get_submodule(str(node.target) if node.op == "call_module" else "")
    if isinstance(layer, nn.Sequential):  # behind its padding
        layer = layer[-1]
    if isinstance(layer, nn.Linear):
        shapes = [[layer.out_features]]
    elif isinstance(layer, CONVOLUTIONS):
        each = [layer.out_channels, *[1] * (layer.weight.dim() - 2)]
        shapes = [each, [1, *each]]
    else:
        return False
    if list(added.shape) not in shapes:
        return False
    bias = added.flatten() if layer.bias is None else layer.bias.detach() + added.flatten()
    layer.bias = nn.Parameter(bias.clone())
    return True


def train_weights(model: fx.GraphModule) -> None:
    """Matrices of products and vectors of the file become parameters, in place: onnx2torch keeps them as constants.

    Tables of more dimensions that are not multiplied stay constants, as anchors are.

    :param model: as onnx2torch gives it.
    """
    buffers = dict(model.named_buffers())
    for node in model.graph.nodes:
        tensor = buffers.get(str(node.target)) if node.op == "get_attr" else None
        if tensor is None or not tensor.is_floating_point() or tensor.numel() <= 1:
            continue
        modules = [model.get_submodule(user.target) for user in node.users if user.op == "call_module"]
        if max(tensor.shape) == tensor.numel() or any(type(module).__name__ == "OnnxMatMul" for module in modules):
            owner, _, name = str(node.target).rpartition(".")
            delattr(model.get_submodule(owner), name)
            model.get_submodule(owner).register_parameter(name, nn.Parameter(tensor))


def _examples(graph: onnx.ModelProto, file: str, shapes: Sequence[Sequence[int]] | None) -> tuple[Tensor, ...]:
    """One example of each input; the shapes are written into the graph, where onnx infers the others from them."""
    weights = {one.name for one in graph.graph.initializer}
    inputs = [one for one in graph.graph.input if one.name not in weights]
    if shapes is not None and not (isinstance(shapes, list | tuple) and all(map(_is_shape, shapes))):
        wanted = "one list of sides above 0 for each input, like [[1, 3, 224, 224]]"
        msg = f"'{file}': shapes: expected {wanted}, got {shapes}."
        raise ResolveError(msg)
    if shapes is not None and [len(shape) for shape in shapes] != [
        len(one.type.tensor_type.shape.dim) for one in inputs
    ]:
        names = ", ".join(f"{one.name} with {len(one.type.tensor_type.shape.dim)} dimensions" for one in inputs)
        msg = f"'{file}': expected a shape for each input ({names}), got {[list(shape) for shape in shapes]}."
        raise ResolveError(msg)
    generator, examples = torch.Generator().manual_seed(0), []
    for at, one in enumerate(inputs):
        tensor = one.type.tensor_type
        if tensor.elem_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            msg = f"'{file}': input '{one.name}' is of type {kind}. Networks with inputs of float32 are taken."
            raise ResolveError(msg)
        sides = tensor.shape.dim
        for position, side in enumerate(sides):
            unknown = UNKNOWN_SIDE if position else 1
            side.dim_value = shapes[at][position] if shapes else side.dim_value if side.dim_value > 0 else unknown
        examples.append(torch.randn([side.dim_value for side in sides], generator=generator))
    if not examples:
        msg = f"'{file}' has no input."
        raise ResolveError(msg)
    return tuple(examples)


def _is_shape(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(side, int) and side > 0 for side in given)


def _compare(model: nn.Module, examples: tuple[Tensor, ...], path: Path) -> None:
    """Refuses a module that does not compute what the file says."""
    try:
        expected = _run(str(path), examples)
        with torch.no_grad():
            found = list(tensors_of(call_model(model, examples)))
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in examples)
        msg = f'\'{path}\' does not run on {shapes}: {first_line(error)} Give "model_options": {{"shapes": [[...]]}}.'
        raise ResolveError(msg) from error
    wanted = [torch.from_numpy(one) for one in expected]
    if [one.shape for one in found] != [one.shape for one in wanted]:
        read, given = ([list(one.shape) for one in outputs] for outputs in (found, wanted))
        msg = f"'{path}': onnx2torch read a network with outputs of {read}, where ONNX Runtime gives {given}."
        raise ResolveError(msg)
    for ours, theirs in zip(found, wanted, strict=True):
        difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        if not difference <= TOLERANCE * largest + SMALLEST:
            msg = f"'{path}': what onnx2torch read is {difference:.1e} from ONNX Runtime, with outputs to {largest:.1e}"
            raise ResolveError(msg)
