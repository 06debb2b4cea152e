"""Exported files compute what torch computes, in the real runtimes, or are not there."""

from __future__ import annotations

import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from nncf.torch.function_hook import register_post_function_hook, wrap_model
from support.places import ROOT
from torch import Tensor, nn

from nncf_compactprune.errors import ExportError, StorageError
from nncf_compactprune.export import (
    ExportedFile,
    ExportOptions,
    export_model,
    measure_latency,
    verify_export,
)
from nncf_compactprune.export import prepared as prepared_module
from nncf_compactprune.export.openvino import OpenVinoFormat

FILES = {"model.onnx", "model_fp16.onnx", "model.xml", "model.bin", "model_fp16.xml", "model_fp16.bin"}


class Net(nn.Module):
    """Convolution, BatchNorm with statistics that matter, dropout that must be off, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)
        self.norm.running_mean = torch.rand(8) - 0.5
        self.norm.running_var = torch.rand(8) + 0.5

    def forward(self, image: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(image)).relu()
        return self.fc(self.drop(hidden.mean((2, 3))))  # type: ignore[no-any-return]


class ManyPorts(Net):
    """Two inputs, one of them unused, and a mapping out that nests, repeats a tensor and returns an input."""

    def forward(self, image: Tensor, shift: Tensor, unused: Tensor, scale: float = 1.0) -> OrderedDict[str, Any]:  # type: ignore[override]
        logits = super().forward(image) * scale + shift
        return OrderedDict(
            logits=logits, again=logits, image=image, nothing=None, pair=(logits.sum(1), logits.argmax(1))
        )


class FixedBatch(Net):
    """Has the example's batch size written into it; other sizes fail in torch already."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).reshape(2, 5)


def an_image(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def a_net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def image() -> Tensor:
    return an_image()


@pytest.fixture
def net() -> Net:
    return a_net()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedFile]:
    """All files of the network that ``net`` makes, by label; to be read only. ONNX takes seconds even for this one."""
    files = export_model(a_net(), an_image(), tmp_path_factory.mktemp("exported"))
    return {file.label: file for file in files}


def run_onnx(path: Path, **inputs: Tensor) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip([port.name for port in session.get_outputs()], outputs, strict=True))


def run_openvino(path: Path, **inputs: Tensor) -> dict[str, Any]:
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: outputs[port] for port in compiled.outputs for name in port.get_names()}


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


class Remembers(nn.Module):
    """Keeps its last features and counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        if not torch.compiler.is_compiling():  # torch's exporter takes neither
            self.features = features
            self.runs += 1
        return features.relu()


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_export_leaves_no_mark_on_the_model(image: Tensor, suffix: str, tmp_path: Path) -> None:
    net = Remembers()
    export_model(net, image, tmp_path / f"model{suffix}")
    assert not hasattr(net, "features")
    assert net.runs == 0
    assert net.training


def test_all_files_equal_torch_at_every_batch_size_and_leave_the_model_alone(
    net: Net, image: Tensor, tmp_path: Path
) -> None:
    net.train()
    net.norm.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    files = export_model(net, image[:1], tmp_path / "new" / "out")

    assert names_in(tmp_path / "new" / "out") == FILES
    assert [file.label for file in files] == ["ONNX FP32", "ONNX FP16", "OpenVINO FP32", "OpenVINO FP16"]
    assert [file.verification.batch_sizes for file in files] == [(1, 3)] * 4
    assert all(file.verification.path == file.path for file in files)
    # Training flags, one by one, and weights are untouched.
    assert [net.training, net.conv.training, net.norm.training, net.drop.training] == [True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())

    net.eval()
    more = an_image(batch=5, seed=2)
    with torch.no_grad():
        expected = net(more).numpy()
    for file in files:
        run = {"onnx": run_onnx, "openvino": run_openvino}[file.format]
        tolerance = {"fp32": 1e-5, "fp16": 5e-3}[file.precision] * np.abs(expected).max()
        np.testing.assert_allclose(run(file.path, image=more)["output"], expected, rtol=0, atol=tolerance)


def test_a_batch_of_one_is_never_what_is_traced(net: Net) -> None:
    for batch, traced, compared in ((1, 2, [1, 3]), (2, 2, [2, 1]), (5, 5, [5, 1])):
        with prepared_module.prepared(net, an_image(batch), dynamic_batch=True) as ready:
            assert ready.trace_inputs.batch_size == traced
            assert [reference.inputs.batch_size for reference in ready.references] == compared
    # Samples that are added differ from those they come from, or a file could mix up rows unseen.
    rows = prepared_module.ModelInputs.of(net, an_image(1)).with_batch(3).tensors[0]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 3


def test_precisions_are_what_they_say(net: Net, image: Tensor, exported: dict[str, ExportedFile]) -> None:
    files = exported

    def onnx_types(label: str) -> set[int]:
        return {tensor.data_type for tensor in onnx.load(files[label].path).graph.initializer if tensor.dims}

    assert onnx.TensorProto.FLOAT16 not in onnx_types("ONNX FP32")
    assert onnx.TensorProto.FLOAT16 in onnx_types("ONNX FP16")
    assert onnx.TensorProto.FLOAT not in onnx_types("ONNX FP16")

    def openvino_types(label: str) -> set[str]:
        operations = openvino.Core().read_model(files[label].path).get_ops()
        return {o.get_output_element_type(0).get_type_name() for o in operations if o.get_type_name() == "Constant"}

    # OpenVINO would halve both without being asked.
    assert "f16" not in openvino_types("OpenVINO FP32")
    assert "f16" in openvino_types("OpenVINO FP16")
    weights = {label: files[label].path.with_suffix(".bin").stat().st_size for label in files if "OpenVINO" in label}
    assert weights["OpenVINO FP32"] > 1.5 * weights["OpenVINO FP16"]
    assert files["OpenVINO FP32"].bytes == weights["OpenVINO FP32"] + files["OpenVINO FP32"].path.stat().st_size
    # Inputs and outputs stay float32.
    assert run_onnx(files["ONNX FP16"].path, image=image)["output"].dtype == np.float32
    assert files["ONNX FP16"].verification.max_rel_error > files["ONNX FP32"].verification.max_rel_error
    # fp16 has its own tolerance, told by the file and not by the caller.
    assert verify_export(net, files["OpenVINO FP16"].path, image).tolerance > 1e-3
    assert verify_export(net, files["OpenVINO FP32"].path, image).tolerance == 1e-4


def test_the_model_is_traced_once_per_format(
    net: Net, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    for owner, name in ((torch.onnx, "export"), (openvino, "convert_model")):
        original = getattr(owner, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            traced.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    export_model(net, image, tmp_path)
    assert traced == ["export", "convert_model"]


def test_files_name_weights_as_the_model_does_and_hold_no_paths_of_this_machine(
    exported: dict[str, ExportedFile],
) -> None:
    graph = onnx.load(exported["ONNX FP32"].path).graph
    assert {"fc.weight", "fc.bias"} <= {tensor.name for tensor in graph.initializer}
    operations = openvino.Core().read_model(exported["OpenVINO FP32"].path).get_ops()
    assert "__module.fc/aten::linear/MatMul" in {node.get_friendly_name() for node in operations}
    for file in exported.values():
        assert str(ROOT).encode() not in file.path.read_bytes()


@pytest.mark.parametrize("by_keyword", [False, True], ids=["tuple", "keywords"])
def test_many_inputs_and_nested_outputs(tmp_path: Path, image: Tensor, by_keyword: bool) -> None:
    torch.manual_seed(0)
    net = ManyPorts().eval()
    tensors = {"image": image, "shift": torch.randn(2, 5), "unused": torch.arange(2)}
    # In another order than the signature's, and with an argument that is no tensor.
    keywords = {"unused": tensors["unused"], "scale": 3.0, "shift": tensors["shift"], "image": image}

    files = export_model(net, keywords if by_keyword else tuple(tensors.values()), tmp_path, precisions=["fp32"])

    assert [file.verification.batch_sizes for file in files] == [(2, 1)] * 2
    scale = 3.0 if by_keyword else 1.0
    # The order of keywords does not matter to a file either.
    assert verify_export(net, files[1].path, {**tensors, "scale": scale}).max_rel_error < 1e-5
    with torch.no_grad():
        expected = net(*tensors.values(), scale=scale)
    for run, file in ((run_onnx, "model.onnx"), (run_openvino, "model.xml")):
        got = run(tmp_path / file, **tensors)
        # An output may not be called like an input.
        flat = {
            "logits": expected["logits"],
            "again": expected["logits"],
            "image_output": image,
            "pair.0": expected["pair"][0],
            "pair.1": expected["pair"][1],
        }
        assert set(flat) <= set(got)
        for name, tensor in flat.items():
            np.testing.assert_allclose(got[name], tensor.numpy(), rtol=1e-4, atol=1e-5)


def test_single_format_exporters_take_names_and_precision(net: Net, image: Tensor, tmp_path: Path) -> None:
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["scores"]}
    half: dict[str, Any] = {"precisions": ["fp16"], **names}
    one = export_model(net, image, tmp_path / "a.onnx", **half)[0].path
    two = export_model(net, (image,), str(tmp_path / "b.xml"), dynamic_batch=False, **half)[0].path
    assert (one, two) == (tmp_path / "a.onnx", tmp_path / "b.xml")
    with torch.no_grad():
        expected = net.eval()(image).numpy()
    np.testing.assert_allclose(run_onnx(one, pixels=image)["scores"], expected, atol=5e-3)
    np.testing.assert_allclose(run_openvino(two, pixels=image)["scores"], expected, atol=5e-3)
    # Names that the model does not have are matched by position.
    assert verify_export(net, one, image).batch_sizes == (2, 1)
    assert verify_export(net, two, image).batch_sizes == (2,)


def test_a_fixed_batch_is_refused_until_it_is_asked_for(image: Tensor, tmp_path: Path) -> None:
    net = FixedBatch()
    with pytest.raises(ExportError, match=r"could not be run on image \[1, 3, 8, 8\].*dynamic_batch=False"):
        export_model(net, image, tmp_path)
    assert names_in(tmp_path) == set()
    (file,) = export_model(net, image, tmp_path / "model.onnx", dynamic_batch=False)
    assert file.verification.batch_sizes == (2,)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run_onnx(file.path, image=image[:1])


def test_a_batch_size_stuck_in_the_file_is_found(
    net: Net, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = prepared_module.FlatModel.forward

    # The trace, unlike the model, sees its batch size as a constant.
    def stuck(self: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        (output,) = original(self, *tensors)
        return (output.reshape(2, 5),)

    monkeypatch.setattr(prepared_module.FlatModel, "forward", stuck)
    # With one thread, OpenVINO does not fail, but gives an output of two rows.
    found = r"model\.xml: OpenVINO (fails|returns output .*) (on|for) input \[1, 3, 8, 8\].*dynamic_batch=False"
    with pytest.raises(ExportError, match=found):
        export_model(net, image[:1], tmp_path, formats=["openvino"], precisions=["fp32"])
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(("label", "runtime"), [("ONNX FP32", "ONNX Runtime"), ("OpenVINO FP32", "OpenVINO")])
def test_a_file_of_other_weights_fails_verification(
    net: Net, image: Tensor, exported: dict[str, ExportedFile], label: str, runtime: str
) -> None:
    path = exported[label].path
    assert verify_export(net, path, image).max_rel_error < 1e-5
    with torch.no_grad():
        net.fc.weight[3] += 0.01
    pattern = (
        rf"{re.escape(str(path))}: {runtime} differs from torch by \d\.\d+e-\d+ .*output 'output'.*tolerance 1e-04"
    )
    with pytest.raises(ExportError, match=pattern):
        verify_export(net, path, image)
    assert 1e-4 < verify_export(net, path, image, tolerance=0.5).max_rel_error < 0.5


def test_outputs_that_are_next_to_nothing_are_told(net: Net, image: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in net.fc.parameters():
            parameter *= 1e-8
        path = export_model(net, image, tmp_path / "model.onnx")[0].path
        net.fc.weight[3] *= 1.1
    with pytest.raises(ExportError, match="apart, which can be rounding: the outputs are next to nothing"):
        verify_export(net, path, image)


def test_a_failed_export_leaves_existing_files_as_they_were(
    net: Net, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        (tmp_path / name).write_text(f"old {name}")

    (other,) = export_model(Net(), image, tmp_path / "other" / "net.xml", precisions=["fp16"])
    save = OpenVinoFormat._save

    # Broken last of all: the other three files are complete and right by then.
    def broken(self: OpenVinoFormat, converted: Any, path: Path, *, fp16: bool) -> None:
        if fp16:
            shutil.copytree(other.path.parent, path.parent, dirs_exist_ok=True)
            for part in self.parts(path.with_name("net.xml")):
                part.rename(path.with_suffix(part.suffix))
        else:
            save(self, converted, path, fp16=fp16)

    monkeypatch.setattr(OpenVinoFormat, "_save", broken)
    with pytest.raises(ExportError, match=r"model_fp16\.xml: OpenVINO differs from torch"):
        export_model(net, image, tmp_path)
    shutil.rmtree(other.path.parent)
    assert names_in(tmp_path) == FILES
    assert all((tmp_path / name).read_text() == f"old {name}" for name in FILES)
    assert net.training


def test_files_are_put_in_place_together_or_not_at_all(
    net: Net, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.bin").write_text("old")
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "model.xml":
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"model\.xml: cannot be written \(No space left on device"):
        export_model(net, image, tmp_path / "model.xml")
    assert names_in(tmp_path) == {"model.bin"}
    assert (tmp_path / "model.bin").read_text() == "old"


class Untouchable(nn.Module):
    """Fails the test when it is run."""

    def forward(self, image: Tensor) -> Tensor:
        pytest.fail("the model was run before the output was found to be unwritable")


def test_an_unwritable_output_is_reported_before_any_work(image: Tensor, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=r"taken: cannot be written .*Choose a directory"):
        export_model(Untouchable(), image, tmp_path / "taken")
    (tmp_path / "out.xml").mkdir()
    with pytest.raises(StorageError, match=r"out\.xml: cannot be written \(Is a directory"):
        export_model(Untouchable(), image, tmp_path, name="out", formats=["openvino"])


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("model.onx", {}, r"ends in \.onnx or \.xml or .*, got 'model\.onx'\. Did you mean '\.onnx'"),
        ("out", {"formats": ["onxn"]}, r"formats: expected a list of onnx and openvino and .*, got 'onxn'"),
        ("out", {"formats": "onnx"}, r"formats: expected a list of .*got 'onnx'"),
        ("out", {"precisions": ["int8"]}, r"precisions: the model is not quantized, got \['int8'\]"),
        (
            "out",
            {"precisions": ["fp61"]},
            r"precisions: expected a list of fp32 and fp16, got 'fp61'. Did you mean 'fp16'",
        ),
        ("model.xml", {"formats": ["onnx"]}, r"the file name says openvino, but formats is \['onnx'\]"),
        ("out", {"input_names": ["a", "b"]}, r"input_names: expected 1 different names .*got \['a', 'b'\]"),
        ("out", {"output_names": ["image"]}, r"output_names: 'image' is already the name of an input"),
    ],
)
def test_wrong_options_are_explained(
    net: Net, image: Tensor, tmp_path: Path, where: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(net, image, tmp_path / where, **options)


class Anchored(Net):
    """Keeps a grid for the last input's shape, as detectors keep their anchors."""

    grid: Tensor | None = None
    shape: torch.Size | None = None

    def forward(self, image: Tensor) -> Tensor:
        if self.shape != image.shape:
            self.shape, self.grid = image.shape, torch.arange(5.0) / image.shape[-1]
        assert self.grid is not None
        return super().forward(image) + self.grid


def test_what_a_network_keeps_for_a_shape_does_not_stop_an_export(image: Tensor, tmp_path: Path) -> None:
    net = Anchored()
    files = export_model(net, image, tmp_path, formats=["onnx", "openvino"], options=ExportOptions(batch=1))
    assert {file.format for file in files} == {"onnx", "openvino"}
    assert net.grid is None
    export_model(net, image, tmp_path / "open.xml")
    with pytest.raises(ExportError, match=r"fixes a size that was to stay open. Ask for one batch size: batch=1"):
        export_model(net, image, tmp_path / "open.onnx")


class OwnFilters(nn.Module):
    """Every picture has filters of its own, by a convolution with a group for each."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Linear(3, 4 * 3)

    def forward(self, image: Tensor) -> Tensor:
        count, channels, height, width = image.shape
        filters = self.filters(image.mean((2, 3))).view(count * 4, channels, 1, 1)
        return nn.functional.conv2d(image.reshape(1, -1, height, width), filters, groups=count).view(count, 4, -1)


def test_a_batch_that_is_a_number_of_groups_is_told_with_the_remedy(image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"fixes a size that was to stay open. Ask for one batch size: batch=1"):
        export_model(OwnFilters(), image, tmp_path / "open.onnx")
    assert export_model(OwnFilters(), image, tmp_path / "one.onnx", options=ExportOptions(batch=1))
    with pytest.raises(ExportError) as caught:
        export_model(OwnFilters(), image, tmp_path / "open.xml")
    # The file that was asked for is named, not the one in the staging place, and OpenVINO's reason, not its source.
    whose = f"{tmp_path / 'open.xml'}: OpenVINO cannot load it: RuntimeError: Unsupported operation of type: Group"
    assert str(caught.value).startswith(whose)
    assert "fixes a size that was to stay open. Ask for one batch size: batch=1" in str(caught.value)
    assert export_model(OwnFilters(), image, tmp_path / "one.xml", options=ExportOptions(batch=1))
    assert names_in(tmp_path) == {"one.onnx", "one.xml", "one.bin"}


def test_a_file_name_chooses_the_format_and_one_precision_keeps_the_name(
    net: Net, image: Tensor, tmp_path: Path
) -> None:
    (file,) = export_model(net, image, tmp_path / "half.xml", precisions=["fp16"])
    assert (file.path.name, file.format, file.precision) == ("half.xml", "openvino", "fp16")
    both = export_model(net, image, tmp_path / "net.xml", precisions=["fp32", "fp16"])
    assert [file.path.name for file in both] == ["net.xml", "net_fp16.xml"]


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason(net: Net, image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected a tensor, a tuple of tensors, or a dict .*got list"):
        export_model(net, (image, [image]), tmp_path)
    with pytest.raises(ExportError, match=r"could not be run on image \[2, 4, 8, 8\]: RuntimeError"):
        export_model(net, torch.zeros(2, 4, 8, 8), tmp_path)
    with pytest.raises(ExportError, match="one batch size in dim 0 of every input, got 'image': 2, 'shift': 3"):
        export_model(ManyPorts(), {"image": image, "shift": torch.zeros(3, 5)}, tmp_path)
    with pytest.raises(ExportError, match=r"parameter 'conv.weight' is torch.float64.*model\.float\(\)"):
        export_model(Net().double(), image.double(), tmp_path)
    with torch.no_grad():
        net.fc.bias[2] = float("nan")
    with pytest.raises(ExportError, match="output 'output' is not finite: 2 of 10 values"):
        export_model(net, image, tmp_path)
    assert net.training
    assert names_in(tmp_path) == set()


def test_a_float16_overflow_is_found(net: Net, image: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        net.fc.weight *= 1e6
    with pytest.raises(ExportError, match=r"m\.onnx: ONNX Runtime differs from torch by .* for fp16.*export fp32"):
        export_model(net, image, tmp_path / "m.onnx", precisions=["fp16"])
    assert names_in(tmp_path) == set()


class Enlarged(nn.Module):
    """Maps enlarged by factors, the last one as the output, and values that several nodes read in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        hidden = self.first(image)
        larger = self.second(nn.functional.interpolate(hidden, scale_factor=2))
        rows = hidden.flatten(2)
        best, few = rows.topk(4, 2).values, rows.topk(2, 2).values
        summed = hidden.cumsum(2) + hidden.cumsum(3)
        return best, few, summed, nn.functional.interpolate(larger, scale_factor=2, mode="bilinear")


def test_float16_files_keep_scales_and_what_several_nodes_read_in_float32(image: Tensor, tmp_path: Path) -> None:
    (file,) = export_model(Enlarged(), image, tmp_path / "m.onnx", precisions=["fp16"])
    nodes = onnx.load(file.path).graph.node
    assert [node.op_type for node in nodes].count("Resize") == 2
    assert len({name for node in nodes for name in node.output}) == sum(len(node.output) for node in nodes)


class Prior(nn.Module):
    """An output is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("prior", torch.ones(4))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(image), self.prior


class BestOfBranch(nn.Module):
    """Both branches read a value of the graph around them in float32."""

    def forward(self, image: Tensor) -> Tensor:
        def plain(rows: Tensor) -> Tensor:
            return torch.cat([rows.topk(4).values, rows.topk(2).values], 1)

        result: Tensor = torch.cond(image.sum() > 0, plain, lambda rows: 2 * plain(rows), (image.flatten(1),))
        return result


@pytest.mark.parametrize(
    ("model", "said"),
    [(Prior(), "failed: .*'output_1' is redeclared"), (BestOfBranch(), "gave an invalid file: .*topologically sorted")],
)
def test_a_network_that_float16_onnx_does_not_take_is_told_what_to_export(
    model: nn.Module, said: str, image: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert export_model(model, image, tmp_path / "m.onnx")
    remedy = r'.*\. Export precision "fp32", or "fp16" to OpenVINO\.'
    with pytest.raises(ExportError, match=f"ONNX Runtime's converter to float16 {said}{remedy}"):
        export_model(model, image, tmp_path / "half.onnx", precisions=["fp16"])
    assert capfd.readouterr().err == ""
    assert names_in(tmp_path) == {"m.onnx"}


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_hooks_must_be_stripped_first(net: Net, image: Tensor, tmp_path: Path) -> None:
    wrapped = wrap_model(net)
    # Wrapped, but with nothing left in it, as after strip: fine.
    export_model(wrapped, image, tmp_path / "stripped.xml")
    handle = register_post_function_hook(wrapped, "conv.weight", 0, Double())
    for name in ("a.onnx", "a.xml"):
        with pytest.raises(ExportError, match=r"the model still carries 1 NNCF hooks \(Double\).*ctrl\.strip\(\)"):
            export_model(wrapped, image, tmp_path / name)
    # A hook deep inside counts as well, and is named.
    with pytest.raises(ExportError, match="module '0' still carries"):
        export_model(nn.Sequential(wrapped), image, tmp_path)
    handle.remove()
    assert verify_export(wrapped, tmp_path / "stripped.xml", image).max_rel_error < 1e-5


def test_a_stripped_quantized_model_goes_to_openvino_only(net: Net, image: Tensor, tmp_path: Path) -> None:
    wrapped = wrap_model(net.eval())
    quantizer = torch.ao.quantization.FakeQuantize.with_args(  # type: ignore[no-untyped-call]
        observer=torch.ao.quantization.MinMaxObserver, quant_min=0, quant_max=255
    )()
    quantizer(image)
    quantizer.disable_observer()
    register_post_function_hook(wrapped, "image", 0, quantizer)
    (file,) = export_model(wrapped, image, tmp_path / "int8.xml")
    assert file.verification.tolerance == 0.1
    assert file.verification.max_rel_error < 1e-2
    with pytest.raises(ExportError, match=r"\(FakeQuantize\).*exports to OpenVINO, not to ONNX"):
        export_model(wrapped, image, tmp_path / "int8.onnx")


def test_missing_and_foreign_files(net: Net, image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gone\.onnx: no such file"):
        verify_export(net, tmp_path / "gone.onnx", image)
    with pytest.raises(ExportError, match=r"a file name that ends in \.onnx or \.xml or \.pte or \.pt2"):
        measure_latency({"net": tmp_path / "net.pt"}, image)
    for name, runtime in (("bad.onnx", "ONNX Runtime"), ("bad.xml", "OpenVINO")):
        (tmp_path / name).write_text("not a network")
        with pytest.raises(ExportError, match=f"{name}: {runtime} cannot load it"):
            verify_export(net, tmp_path / name, image)
    (file,) = export_model(net, image, tmp_path / "alone.xml")
    file.path.with_suffix(".bin").unlink()
    with pytest.raises(ExportError, match=r"alone\.xml: OpenVINO cannot load it: .* 'alone\.bin' is not beside it"):
        verify_export(net, file.path, image)


def test_latency_of_files_and_modules(net: Net, image: Tensor, exported: dict[str, ExportedFile]) -> None:
    ir = exported["OpenVINO FP32"].path
    models = {
        "onnx": exported["ONNX FP32"].path,
        "ir": str(ir),
        "torch": net,
    }
    latencies = measure_latency(models, image[:1], runs=5, warmup=1)
    assert list(latencies) == list(models)
    for latency in latencies.values():
        assert latency.runs == 5
        assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
    assert net.training
    for file in exported.values():
        with pytest.raises(ExportError, match="has no device 'NPX' here"):
            measure_latency({"net": file.path}, image, device="NPX")
        with pytest.raises(ExportError, match="takes 1 inputs"):
            measure_latency({"net": file.path}, (image, image))
    with pytest.raises(ExportError, match="runs=0"):
        measure_latency({}, image, runs=0)


def test_latency_takes_turns_within_a_runtime(image: Tensor) -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, image: Tensor) -> Tensor:
            calls.append(self.name)
            return image

    measure_latency({"dense": Named("A"), "pruned": Named("B")}, image, runs=2, warmup=1)
    assert calls == ["A", "B"] * 3
