"""``onnx:FILE``: networks that are there as a file only."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from support.networks import Classifier, ResidualBlock, conv_bn
from torch import fx, nn

from nncf_compactprune import analyse, prune
from nncf_compactprune.errors import ResolveError
from nncf_compactprune.export import ExportOptions, export_model
from nncf_compactprune.run.models import resolve_model
from nncf_compactprune.run.pipeline import load_run, run

pytest.importorskip("onnx2torch", reason="onnx2torch is not installed")


def network() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(conv_bn(3, 16), ResidualBlock(16, 16), conv_bn(16, 24)), 24).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_model(network(), torch.randn(2, 3, 16, 16), path)
    return path


def test_a_file_is_read_with_its_weights(file: Path) -> None:
    found = resolve_model(f"onnx:{file}", options={"shapes": [[2, 3, 16, 16]]})
    assert found.example_inputs.shape == (2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(found.model(found.example_inputs), network()(found.example_inputs))
    assert resolve_model(f"onnx:{file}").example_inputs.shape == (1, 3, 16, 16)


def test_weights_may_be_constants(file: Path, tmp_path: Path) -> None:
    graph = onnx.load(file)
    for tensor in graph.graph.initializer:
        graph.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del graph.graph.initializer[:]
    onnx.save(graph, tmp_path / "constants.onnx")
    found = resolve_model(f"onnx:{tmp_path / 'constants.onnx'}")
    with torch.no_grad():
        torch.testing.assert_close(found.model(found.example_inputs), network()(found.example_inputs))


class Upsampling(nn.Module):
    """A resize, and a reshape to sizes that are stated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, 8, 3), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = nn.functional.interpolate(self.first(x), scale_factor=2.0, mode="nearest")
        return self.second(x).reshape(-1, 5, 1024)


def test_sizes_of_the_file_are_numbers_so_that_it_can_be_exported_again(tmp_path: Path) -> None:
    model, x = Upsampling().eval(), torch.randn(2, 3, 16, 16)
    export_model(model, x, tmp_path / "a.onnx")
    found = resolve_model(f"onnx:{tmp_path / 'a.onnx'}")
    kinds = {type(module).__name__ for module in found.model.modules()}
    assert {"FixedResize", "FixedReshape"} <= kinds
    export_model(found.model, x, tmp_path / "b.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "b.onnx")
    (again,) = graph.run(None, {graph.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(again), model(x).detach(), atol=1e-5, rtol=1e-4)


class OfOne(Upsampling):
    """Written for a batch of one, as many exporters do."""

    def forward(self, x):
        return self.second(nn.functional.interpolate(self.first(x), size=(32, 32))).reshape(1, 5, -1)


def test_a_file_for_a_batch_of_one_takes_more_and_is_pruned(tmp_path: Path) -> None:
    model, x = OfOne().eval(), torch.randn(3, 3, 16, 16)
    export_model(model, x[:1], tmp_path / "a.onnx", dynamic_batch=False)
    found = resolve_model(f"onnx:{tmp_path / 'a.onnx'}")
    with torch.no_grad():
        expected = torch.cat([model(one) for one in x.split(1)])
        torch.testing.assert_close(found.model(x), expected, atol=1e-5, rtol=1e-4)
    assert prune(found.model, x, budget={"macs": 0.6}, round_to=1).plan.after.macs > 0


def saved(path: Path, nodes: list[onnx.NodeProto], sides: list[int | str], **tensors: torch.Tensor) -> Path:
    """An ONNX file from "x" to "y"."""
    made = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])
    graph = helper.make_graph(nodes, "net", [x], [y], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def classifier_of_paddle(path: Path) -> Path:
    """Its flattening asks for the batch, and its last layer is a product and a sum."""
    torch.manual_seed(0)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"], auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Shape", ["d"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "width"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["d", "sizes"], ["e"]),
        helper.make_node("MatMul", ["e", "matrix"], ["f"]),
        helper.make_node("Add", ["f", "bias"], ["y"]),
    ]
    numbers = {"first": torch.tensor([0]), "width": torch.tensor([16])}
    weights = {"kernel": torch.randn(16, 3, 4, 3), "matrix": torch.randn(16, 5), "bias": torch.randn(5)}
    return saved(path, nodes, ["batch", 3, 17, 16], **numbers, **weights)


def test_a_file_that_asks_for_its_batch_and_pads_by_rule_is_pruned_trained_and_written_again(tmp_path: Path) -> None:
    found = resolve_model(f"onnx:{classifier_of_paddle(tmp_path / 'a.onnx')}")
    x = torch.randn(3, 3, 17, 16)
    before = sum(parameter.numel() for parameter in found.model.parameters())
    assert before == 16 * 3 * 4 * 3 + 16 * 5 + 5  # the matrix trains, too
    assert prune(found.model, x, budget={"params": 0.5}, round_to=1).self_check.error < 1e-5
    assert sum(parameter.numel() for parameter in found.model.parameters()) <= before / 2
    found.model(x).sum().backward()
    export_model(found.model, x, tmp_path / "b.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "b.onnx")
    (again,) = graph.run(None, {graph.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(again), found.model(x).detach(), atol=1e-5, rtol=1e-4)


def test_layers_get_what_is_multiplied_and_added_behind_them(tmp_path: Path) -> None:
    """PaddlePaddle writes a bias as a sum with a vector that is reshaped first, and a linear layer as a product."""
    torch.manual_seed(0)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"], pads=[0, 0, 1, 1]),
        helper.make_node("Reshape", ["conv_bias", "form"], ["reshaped"]),
        helper.make_node("Add", ["a", "reshaped"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "matrix"], ["f"]),
        helper.make_node("Add", ["bias", "f"], ["y"]),
    ]
    weights = {"kernel": torch.randn(16, 3, 2, 2), "conv_bias": torch.randn(16), "form": torch.tensor([1, 16, 1, 1])}
    weights |= {"matrix": torch.randn(16, 5), "bias": torch.randn(5)}
    file = saved(tmp_path / "a.onnx", nodes, ["batch", 3, 16, 16], **weights)
    model = resolve_model(f"onnx:{file}").model
    (conv,) = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    (linear,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    torch.testing.assert_close(conv.bias.detach(), weights["conv_bias"])
    torch.testing.assert_close(linear.bias.detach(), weights["bias"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 16 * (12 + 1) + 5 * (16 + 1)


def test_a_split_into_equal_parts_follows_the_width(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Split", ["a", "sizes"], ["b", "c"], axis=1),  # as YOLOv8's blocks do
        helper.make_node("Sigmoid", ["c"], ["d"]),
        helper.make_node("Mul", ["b", "d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "matrix"], ["y"]),
    ]
    weights = {"kernel": torch.randn(16, 3, 1, 1), "sizes": torch.tensor([8, 8]), "matrix": torch.randn(8, 5)}
    found = resolve_model(f"onnx:{saved(tmp_path / 'a.onnx', nodes, ['batch', 3, 8, 8], **weights)}")
    assert [group.reason for group in analyse(found.model, found.example_inputs).pinned] == ["model output"]


def test_shapes_that_onnx_does_not_infer_are_looked_up(tmp_path: Path) -> None:
    norm = {name: torch.rand(4) for name in ("scale", "shift", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Floor", ["float"], ["floor"]),  # onnx follows no sizes through it
        helper.make_node("Cast", ["floor"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["a", "sizes"], ["b"]),
        helper.make_node("BatchNormalization", ["b", *norm], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "matrix"], ["y"]),
    ]
    weights = {"kernel": torch.randn(4, 3, 1, 1), "matrix": torch.randn(4, 5)}
    file = saved(tmp_path / "a.onnx", nodes, ["batch", 3, 8, 8], **weights, **norm)
    model = resolve_model(f"onnx:{file}").model
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class WithGrid(nn.Module):
    """Adds the place of each pixel, which it computes, as YOLO heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3, 8)

    def forward(self, x):
        x = self.body(x)
        steps = torch.arange(x.shape[3]).float().reshape(1, -1).expand(x.shape[2], -1)
        return x + steps


def test_a_one_in_front_is_a_batch_only_where_one_example_is_reshaped(tmp_path: Path) -> None:
    model, x = WithGrid().eval(), torch.randn(1, 3, 12, 16)
    export_model(model, x, tmp_path / "a.onnx", options=ExportOptions(dynamic_size=True))
    found = resolve_model(f"onnx:{tmp_path / 'a.onnx'}", options={"shapes": [[1, 3, 12, 16]]})
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), model(x), atol=1e-5, rtol=1e-4)


def test_minus_one_is_an_open_side(file: Path, tmp_path: Path) -> None:
    graph = onnx.load(file)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1  # as PaddlePaddle says it
    onnx.save(graph, tmp_path / "open.onnx")
    assert resolve_model(f"onnx:{tmp_path / 'open.onnx'}").example_inputs.shape == (1, 3, 16, 16)


def test_a_run_needs_nothing_but_the_file(file: Path, tmp_path: Path) -> None:
    config = {
        "model": f"onnx:{file}",
        "input_info": {"sample_size": [1, 3, 16, 16]},
        "epochs": 0,
        "compression": {
            "algorithm": "fbnet_pruning",
            "budget": {"macs": 0.5},
            "params": {"schedule": "one_shot", "round_to": 1},
        },
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = run(tmp_path / "config.json", say=lambda line: None)
    assert outcome.plan.after.macs <= 0.5 * outcome.plan.before.macs
    assert (tmp_path / "out" / "pruned" / "model.onnx").is_file()
    assert str(file) in json.loads((tmp_path / "out" / "summary.json").read_text())["files"]
    again = load_run(tmp_path / "out")
    assert sum(p.numel() for p in again.model.parameters()) < 0.6 * sum(p.numel() for p in network().parameters())


def test_what_cannot_be_read_is_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResolveError, match=r"'gone\.onnx': no such file"):
        resolve_model("onnx:gone.onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ResolveError, match=r"text\.onnx' is no ONNX file"):
        resolve_model(f"onnx:{tmp_path / 'text.onnx'}")
    with pytest.raises(ResolveError, match=r"expected a shape for each input \(.* with 4 dimensions\)"):
        resolve_model(f"onnx:{file}", options={"shapes": [[3, 16, 16]]})
    for wrong in ([1, 3, 16, 16], [[1, 3, -1, 16]], "1,3,16,16"):
        with pytest.raises(ResolveError, match=r"expected one list of sides above 0 for each input, like"):
            resolve_model(f"onnx:{file}", options={"shapes": wrong})
    with pytest.raises(ResolveError, match=r"does not run on \[1, 5, 16, 16\].*\"model_options\""):
        resolve_model(f"onnx:{file}", options={"shapes": [[1, 5, 16, 16]]})
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, 4])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4])
    cast = helper.make_node("Cast", ["tokens"], ["out"], to=TensorProto.FLOAT)
    onnx.save(helper.make_model(helper.make_graph([cast], "words", [tokens], [out])), tmp_path / "words.onnx")
    with pytest.raises(ResolveError, match="input 'tokens' is of type INT64"):
        resolve_model(f"onnx:{tmp_path / 'words.onnx'}")
    converter = importlib.import_module("onnx2torch")
    monkeypatch.setattr(converter, "convert", lambda graph: fx.symbolic_trace(nn.Sequential(nn.Flatten())))
    with pytest.raises(ResolveError, match=r"outputs of \[\[1, 768\]\], where ONNX Runtime gives \[\[1, 5\]\]"):
        resolve_model(f"onnx:{file}")
    other = network()
    other.head.bias.data += 1
    monkeypatch.setattr(converter, "convert", lambda graph: fx.symbolic_trace(other))
    with pytest.raises(ResolveError, match=r"from ONNX Runtime, with outputs to"):
        resolve_model(f"onnx:{file}")
