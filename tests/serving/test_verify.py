"""Files are judged as they are served, and what is wrong with one is found and named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import openvino
import pytest
import torch
from onnx import numpy_helper
from openvino.utils import replace_node
from support.networks import model32
from typer.testing import CliRunner

from nncf_compactprune import prune
from nncf_compactprune.cli import app
from nncf_compactprune.errors import ExportError
from nncf_compactprune.export import ExportOptions, Pixels, export_model
from nncf_compactprune.run.verifying import verify
from nncf_compactprune.serving import Serving, open_server
from nncf_compactprune.serving.reference import RealInputs, TorchSide
from nncf_compactprune.serving.verify import verify_served

EXACT = Serving(precision="f32")


@pytest.fixture(scope="module")
def torch_side() -> TorchSide:
    """A residual network with half its MACs, on images that it labels itself; a tenth of the labels are wrong."""
    torch.manual_seed(0)
    model = model32("residual")
    images = torch.randn(20, 3, 8, 8)
    prune(model, images[:2], budget={"macs": 0.5}, round_to=1)
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % model(images).shape[1]
    return TorchSide(model, images[:1], images, labels, batch_size=8)


@pytest.fixture(scope="module")
def files(torch_side: TorchSide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    export_model(torch_side.model, torch_side.example_inputs, folder, precisions=["fp32"])
    return folder


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_file_is_compared_on_samples_in_two_batch_sizes(name: str, files: Path, torch_side: TorchSide) -> None:
    check = verify_served(files / name, torch_side)
    assert check.passed, check.problems
    assert (check.samples, check.batch_sizes) == (20, (1, 4, 8))
    assert check.torch_accuracy == 0.9
    assert check.accuracy == pytest.approx(0.9, abs=0.051)  # bfloat16 may decide one sample otherwise
    layers = len(torch_side.widths())
    assert check.widths == (layers, layers)


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_without_torch_a_file_is_compared_with_itself_on_real_inputs(
    name: str, files: Path, torch_side: TorchSide
) -> None:
    assert torch_side.samples is not None
    assert torch_side.labels is not None
    real = RealInputs(torch_side.samples, torch_side.labels, batch_size=8)
    check = verify_served(files / name, None, real=real)
    assert check.passed, check.problems
    assert (check.compared_with, check.samples, check.batch_sizes) == ("itself in f32", 20, (1, 4, 8))
    assert check.torch_accuracy == 0.9
    assert check.accuracy == pytest.approx(0.9, abs=0.051)


def test_ir_is_served_in_what_openvino_chooses(files: Path, torch_side: TorchSide) -> None:
    compiled = openvino.Core().compile_model(files / "model.xml", "CPU")
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    check, exact = (verify_served(files / "model.xml", torch_side, one) for one in (Serving(), EXACT))
    assert exact.arithmetic == "f32"
    assert exact.error < 1e-5
    assert check.arithmetic == chosen
    if check.arithmetic != "f32":
        assert check.error > 10 * exact.error


def tampered_onnx(path: Path, target: Path) -> str:
    """Changes the weight of the third convolution and returns the operation's name."""
    proto = onnx.load(path)
    conv = [node for node in proto.graph.node if node.op_type == "Conv"][2]
    weight = next(one for one in proto.graph.initializer if one.name == conv.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(proto, target)
    return str(conv.name)


def tampered_ir(path: Path, target: Path) -> str:
    model = openvino.Core().read_model(path)
    conv = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"][2]
    constant = conv.input_value(1).get_node()
    replace_node(constant, openvino.op.Constant(constant.data * 1.5))
    openvino.save_model(model, target, compress_to_fp16=False)
    return str(conv.get_friendly_name())


@pytest.mark.parametrize(("name", "tamper"), [("model.onnx", tampered_onnx), ("model.xml", tampered_ir)])
def test_first_operation_that_departs_is_named(
    name: str, tamper: Callable[[Path, Path], str], files: Path, torch_side: TorchSide, tmp_path: Path
) -> None:
    operation = tamper(files / name, tmp_path / name)
    convolutions = [n for n, m in torch_side.model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    check = verify_served(tmp_path / name, torch_side)
    assert not check.passed
    (problem,) = [one for one in check.problems if "differs from torch" in one]
    assert f"operation '{operation}'" in problem
    assert f"module '{convolutions[2]}" in problem or "BatchNorm" in problem


def test_channel_widths_are_those_of_the_plan(files: Path, torch_side: TorchSide) -> None:
    wider = TorchSide(model32("residual"), torch_side.example_inputs, torch_side.samples, torch_side.labels)
    for name in ("model.onnx", "model.xml"):
        check = verify_served(files / name, wider)
        assert check.widths is not None
        assert check.widths[0] < check.widths[1]
        assert any("by the plan" in problem for problem in check.problems)


def test_loss_of_accuracy_fails_a_file(files: Path, torch_side: TorchSide) -> None:
    assert torch_side.samples is not None
    other = copy.copy(torch_side)
    other._known = {}
    other.model = copy.deepcopy(torch_side.model)
    with torch.no_grad():
        bias = list(other.model.parameters())[-1]
        bias[other.model(torch_side.samples).argmax(1)] -= 100  # the classes that the file decides for
        other.labels = other.model(torch_side.samples).argmax(1)
    check = verify_served(files / "model.onnx", other, tolerance=1e9)
    assert any("A loss of 1 % of the samples" in problem for problem in check.problems), check


def test_file_without_its_model_is_compared_with_itself(files: Path) -> None:
    check = verify_served(files / "model.xml", None)
    assert (check.compared_with, check.accuracy, check.passed) == ("itself in f32", None, True)


def test_a_file_of_open_size_is_told_its_sample(torch_side: TorchSide, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_model(torch_side.model, torch_side.example_inputs, path, options=ExportOptions(dynamic_size=True))
    with pytest.raises(ExportError, match=r"--sample-size 3,224,224"):
        verify(path, say=list)
    (check,) = verify(path, sample_size=(3, 20, 28), say=list)
    assert check.passed


def test_a_file_that_normalises_pictures_itself_is_given_pictures(torch_side: TorchSide, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    options = ExportOptions(pixels=Pixels((0.5,), (0.25, 0.2, 0.3)), embed_preprocessing=True)
    export_model(torch_side.model, torch_side.example_inputs, path, options=options)
    for serving in (Serving(), EXACT):
        check = verify_served(path, torch_side, serving)
        assert check.passed, check.problems
        assert (check.compared_with, check.samples, check.batch_sizes) == ("torch", 20, (1, 4, 8))
    real = RealInputs(torch_side.samples, torch_side.labels, batch_size=8)
    for check in (verify_served(path, None, real=real), *verify(path, sample_size=(8, 8, 3), say=list)):
        assert check.passed, check.problems
    with pytest.raises(ExportError, match=r"--sample-size 224,224,3"):
        verify(path, say=list)

    model = openvino.Core().read_model(path)
    model.set_rt_info("0.4", ["compactprune", "mean"])  # the file does not do what it says
    openvino.save_model(model, tmp_path / "other.xml", compress_to_fp16=False)
    check = verify_served(tmp_path / "other.xml", torch_side, EXACT)
    assert "differs from torch" in " ".join(check.problems)


def test_onnx_that_the_checker_refuses_fails(files: Path, torch_side: TorchSide, tmp_path: Path) -> None:
    proto = onnx.load(files / "model.onnx")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    onnx.save(proto, tmp_path / "model.onnx")
    check = verify_served(tmp_path / "model.onnx", torch_side)
    assert any("onnx.checker refuses it" in problem for problem in check.problems)


def test_fixed_batch_is_kept_to(torch_side: TorchSide, tmp_path: Path) -> None:
    export_model(torch_side.model, torch_side.example_inputs, tmp_path / "one.onnx", dynamic_batch=False)
    assert verify_served(tmp_path / "one.onnx", torch_side).batch_sizes == (1,)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("model.xml", {"device": "NPUU"}, r"no device 'NPUU' here"),
        ("model.onnx", {"device": "TPU"}, r"no device 'TPU' here"),
        ("model.onnx", {"precision": "bf16"}, r"computes in the precision of the file"),
        ("model.xml", {"precision": "fp32"}, r"expected one of f32, bf16, f16, got 'fp32'"),
        ("model.xml", {"threads": 0}, r"threads: expected a number of at least 1"),
        ("none.xml", {}, r"none.xml: no such file"),
    ],
)
def test_what_cannot_be_asked_is_refused(name: str, asked: dict[str, object], message: str, files: Path) -> None:
    with pytest.raises(ExportError, match=message):
        open_server(files / name, Serving(**asked))  # type: ignore[arg-type]


def test_a_file_that_does_not_load_is_found_and_the_others_are_looked_at(files: Path, tmp_path: Path) -> None:
    for one in files.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / "a.onnx").write_bytes((files / "model.onnx").read_bytes()[:500])
    (tmp_path / "b.xml").write_bytes((files / "model.xml").read_bytes())  # without its weights
    said = CliRunner().invoke(app, ["verify", str(tmp_path), "--json"])
    assert said.exit_code == 1, said.output
    found = {Path(one["path"]).name: one for one in json.loads(said.stdout)}
    assert {name: one["passed"] for name, one in found.items()} == {
        "a.onnx": False, "b.xml": False, "model.onnx": True, "model.xml": True,
    }  # fmt: skip
    assert "cannot load it" in found["a.onnx"]["problems"][-1]
    assert "'b.bin' is not beside it" in found["b.xml"]["problems"][-1]
    table = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert table.stdout.count("FAILED") == 2
    with pytest.raises(ExportError, match="no device 'NPUU'"):  # a mistake of the command line, not of the file
        verify(tmp_path, serving=Serving(device="NPUU"), say=list)
