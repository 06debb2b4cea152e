"""``quantization``: through ``nncf.quantize`` to INT8 files, behind pruning and while training; its grammar."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence

import nncf
import onnx
import openvino
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nncf.torch.function_hook.pruning.rb.modules import RBPruningMask
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SQMultiply, SymmetricQuantizer
from support.networks import Classifier, ResidualBlock, conv_bn
from support.quantizers import ranges
from torch import Tensor, nn

from nncf_compactprune import CompressionStage, create_compressed_model, export_model, load_config
from nncf_compactprune.algorithms.quantization import accuracy_control
from nncf_compactprune.algorithms.quantization.options import quantize_options
from nncf_compactprune.errors import CompactPruneError, ConfigError, ExportError, QuantizationError
from nncf_compactprune.host.calls import evaluating
from nncf_compactprune.host.nncf_hooks import hooks
from nncf_compactprune.host.nncf_quantization import not_compiled, quantizers_by_operation
from nncf_compactprune.host.stored_quantizers import StoredQuantizer

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PRUNE = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"schedule": "one_shot", "round_to": 4}}


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """Compiling NNCF's extension takes longer than all of these tests."""
    with not_compiled():
        yield


def network() -> nn.Module:
    """With a residual block, a depthwise convolution, and BatchNorms whose factors have both signs."""
    net = Classifier(
        nn.Sequential(
            conv_bn(3, 32), ResidualBlock(32, 32), conv_bn(32, 32, groups=32), conv_bn(32, 64, 1), conv_bn(64, 64)
        ),
        64,
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, 3, 16, 16, generator=generator)
    return [(x, torch.randint(0, 5, (8,), generator=generator)) for x in images]


def entry(**keys):
    return {"algorithm": "quantization", **keys}


def compress(model, *entries, loader="given", **more):
    config = {"input_info": {"sample_size": [1, 3, 16, 16]}, "compression": list(entries)}
    return create_compressed_model(model, config, batches() if loader == "given" else loader, **more)


def distance(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        expected = a.eval()(X)
        return float((b.eval()(X) - expected).norm() / expected.norm())


def layers_in(path) -> list[tuple[str, str]]:
    """Kind and precision of every layer that OpenVINO runs."""
    running = openvino.Core().compile_model(path, "CPU").get_runtime_model()
    keys = ("layerType", "runtimePrecision")
    return [tuple(op.get_rt_info()[key].astype(str) for key in keys) for op in running.get_ops()]


def test_pruned_then_quantized_files_hold_int8_and_run_as_int8(tmp_path) -> None:
    model = network()
    ctrl, _ = compress(model, PRUNE, entry(params={"start_epoch": None}))
    pruned = copy.deepcopy(model)
    assert ctrl.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    assert ctrl.strip() is model
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert 0 < distance(pruned, model) < 0.1
    floats = {f.format: f for f in export_model(pruned, X, tmp_path, precisions=["fp32"])}
    files = {f.format: f for f in export_model(model, X, tmp_path)}
    assert [f.label for f in files.values()] == ["ONNX INT8", "OpenVINO INT8"]
    assert [f.path.name for f in files.values()] == ["model_int8.onnx", "model_int8.xml"]
    assert all(f.verification.max_rel_error < 0.1 for f in files.values())

    graph = onnx.load(files["onnx"].path)
    onnx.checker.check_model(graph, full_check=True)
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 6
    convolutions = {node.input[1] for node in graph.graph.node if node.op_type == "Conv"}
    weights = [node.input[0] for node in graph.graph.node if node.output[0] in convolutions]
    stored = {one.name: one for one in graph.graph.initializer}
    assert {stored[name].data_type for name in weights} == {onnx.TensorProto.INT8}
    assert stored_bytes(files["onnx"].path) < 0.3 * stored_bytes(floats["onnx"].path)

    sizes = [f["openvino"].path.with_suffix(".bin").stat().st_size for f in (files, floats)]
    assert sizes[0] < 0.3 * sizes[1]
    precisions = [precision for kind, precision in layers_in(files["openvino"].path) if kind == "Convolution"]
    assert precisions
    assert all("8" in precision for precision in precisions)


class Attention(nn.Module):
    """A patch embedding, one block of attention, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(seen.transpose(1, 2).reshape(x.shape[0], 16, 32))
        return self.head((x + self.mlp(x)).mean(1))


def test_a_pruned_transformer_is_quantized_with_its_smoothing(tmp_path) -> None:
    torch.manual_seed(0)
    ctrl, model = compress(
        Attention().eval(), {**PRUNE, "budget": {"macs": 0.8}}, entry(params={"model_type": "transformer"})
    )
    model = ctrl.strip()
    assert any(isinstance(hook.module, SQMultiply) for hook in hooks(model))
    (onnx_file,) = export_model(model, X, tmp_path, formats=["onnx"])
    (ir_file,) = export_model(model, X, tmp_path, formats=["openvino"])
    assert (onnx_file.precision, ir_file.precision) == ("int8", "int8")
    products = [kind for kind, precision in layers_in(tmp_path / "model_int8.xml") if precision in ("u8", "i8")]
    assert products


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_exported_program_that_leaves_quantizers_out_is_refused(monkeypatch, tmp_path) -> None:
    """As under transformers 5.5, whose masks cannot be traced. Where torch exports BERT, no quantizer behind SQMultiply
    runs."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = hf.BertForTokenClassification(hf.BertConfig(vocab_size=50, **sizes)).eval()
    words = {"input_ids": torch.randint(3, 50, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
    config = {"compression": entry(params={"model_type": "transformer"})}
    model = create_compressed_model(model, config, [words], example_inputs=words)[0].strip()
    as_it_is = hf.BertModel.forward

    def untraceable(self, *args, **kwargs):
        if torch.jit.is_tracing():
            msg = "tuple index out of range"
            raise IndexError(msg)
        return as_it_is(self, *args, **kwargs)

    export_model(model, words, tmp_path / "net.xml")
    with pytest.raises(ExportError, match=r"ONNX exporter leaves \d+ of the network's quantizers out"):
        export_model(model, words, tmp_path / "net.onnx")
    monkeypatch.setattr(hf.BertModel, "forward", untraceable)
    with pytest.raises(
        ExportError, match=r"tuple index out of range\), and torch's exported program leaves \d+ of its"
    ):
        export_model(model, words, tmp_path / "other.xml")


class Pooled(nn.Module):
    """Global maxima, in the ways that networks write them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, nn.Sequential(conv_bn(3, 16), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(32 if kind == "both" else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        pooled = {
            "maximum": lambda: x.amax((2, 3)),
            "minimum": lambda: x.amin((2, 3)),
            "pool": lambda: F.adaptive_max_pool2d(x, 1).flatten(1),
            "both": lambda: torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1),
        }
        return self.head(pooled[self.kind]())


@pytest.mark.parametrize("kind", ["maximum", "minimum", "pool", "both"])
def test_global_maxima_are_right_in_openvino_from_both_formats(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = Pooled(kind).eval()
    compress(model, entry(overflow_fix="enable", params={"start_epoch": None}))[0].strip()  # right on any processor
    expected = model.eval()(X).detach()
    for file in export_model(model, X, tmp_path):
        compiled = openvino.Core().compile_model(file.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert (torch.tensor(compiled(X.numpy())[0]) - expected).abs().max() < 0.05 * expected.abs().max()


class Alike(nn.Module):
    """A cosine of feature maps, which OpenVINO takes from torch's exported program only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16)), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).mean((2, 3)) + F.cosine_similarity(x, x.flip(3)).mean((1, 2))[:, None]


def test_openvino_takes_quantizers_from_an_exported_program_too(tmp_path) -> None:
    torch.manual_seed(0)
    model = Alike().eval()
    compress(model, entry(params={"start_epoch": None}))[0].strip()
    (file,) = export_model(model, X, tmp_path / "net.xml")
    kinds = [node.get_type_name() for node in openvino.Core().read_model(file.path).get_ops()]
    assert (file.precision, kinds.count("Convolution")) == ("int8", 3)
    assert kinds.count("FakeQuantize") >= 3
    weights = {str(n.get_output_element_type(0)) for n in openvino.Core().read_model(file.path).get_ops()}
    assert any("int8" in kind for kind in weights)


def stored_bytes(path) -> int:
    """Bytes of all constants of an ONNX file; these networks are so small that the graph outweighs them."""
    return sum(len(one.raw_data) for one in onnx.load(path).graph.initializer)


def train(model: nn.Module, ctrl, optimizer, epochs: int = 1) -> None:
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for x, y in batches():
            ctrl.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + ctrl.loss()).backward()
            optimizer.step()


def test_ranges_and_weights_train_with_the_quantizers_in_and_a_run_goes_on(tmp_path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    ctrl, _ = compress(model, PRUNE, entry(params={"start_epoch": 1}))
    ctrl.attach(optimizer=optimizer)
    train(model, ctrl, optimizer)
    assert not any("hooks" in name for name in model.state_dict())
    weight = model.head.weight.detach().clone()
    train(model, ctrl, optimizer)
    before = ranges(model)
    train(model, ctrl, optimizer)
    after = ranges(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(weight, model.head.weight)

    state = ctrl.get_compression_state()
    torch.save(state, tmp_path / "state.pth")  # as Lightning's checkpoints and accuracy-aware training hold it
    assert torch.load(tmp_path / "state.pth", weights_only=True) == state
    state = json.loads(json.dumps(state))
    again, resumed = compress(network(), PRUNE, entry(params={"start_epoch": 1}), compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert distance(model, resumed) == 0
    trained = copy.deepcopy(model)
    ctrl.strip()
    again.strip()
    assert distance(trained, model) < 1e-3  # a level may be rounded the other way
    assert distance(model, resumed) == 0
    assert all(f.verification.max_rel_error < 0.1 for f in export_model(model, X, tmp_path))


@pytest.mark.parametrize("kind", ["magnitude_sparsity", "rb_sparsity"])
def test_single_weights_are_masked_and_quantized_in_the_same_training(kind: str, tmp_path) -> None:
    params = {"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.2, 0.6]}
    sparsity = {"algorithm": kind, "params": params}
    _, plain = compress(network(), entry())
    model = network()
    ctrl, _ = compress(model, entry(), sparsity)
    assert len(ranges(model)) == len(ranges(plain))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        before = ranges(model)
        train(model, ctrl, optimizer)
        assert all(not torch.equal(before[name], value) for name, value in ranges(model).items())
    learned = [p for hook in hooks(model) if isinstance(hook.module, RBPruningMask) for p in hook.module.parameters()]
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(id(mask) in held for mask in learned)
    assert bool(learned) == (kind == "rb_sparsity")

    state = json.loads(json.dumps(ctrl.get_compression_state()))
    _, resumed = compress(network(), entry(), sparsity, compression_state=state)
    resumed.load_state_dict(model.state_dict())
    assert distance(model, resumed) == 0
    trained = copy.deepcopy(model).eval()
    ctrl.strip()
    assert distance(trained, model) < 1e-3
    if kind == "magnitude_sparsity":
        products = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert torch.cat([w.flatten() == 0 for w in products]).float().mean() >= 0.6
    assert all(f.verification.max_rel_error < 0.1 for f in export_model(model, X, tmp_path))


def test_masks_that_nobody_will_write_are_refused() -> None:
    model = network()
    nncf.prune(model, mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=X)
    with pytest.raises(QuantizationError, match=r"hooks that are not of this list\. Call nncf\.strip first"):
        compress(model, entry())


def test_a_wait_for_a_cut_that_comes_last_is_told_once(caplog) -> None:
    schedule = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"pruning_steps": 1, "round_to": 4}}
    for attached in (False, True):
        model = network()
        ctrl, _ = compress(model, schedule, entry())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if attached:
            ctrl.attach(optimizer=optimizer)
        caplog.clear()
        for _ in range(4):
            train(model, ctrl, optimizer)
        told = [r.getMessage() for r in caplog.records if "waits for" in r.getMessage()]
        assert any(isinstance(hook.module, BaseQuantizer) for hook in hooks(model)) == attached
        assert len(told) == (not attached)
    model = network()
    # waits, too, and no optimizer changes that
    ctrl, _ = compress(model, {"algorithm": "linear_overparameterization", "params": {"form": "factors"}}, entry())
    caplog.clear()
    train(model, ctrl, torch.optim.SGD(model.parameters(), lr=0.01))
    assert "waits for" not in caplog.text


def test_scopes_leave_layers_in_float() -> None:
    quantized = []
    for scopes in ({}, {"ignored_scopes": ["features.4.0", "head"]}, {"target_scopes": ["features.4"]}):
        model = network()
        before = {name: one.clone() for name, one in model.named_parameters() if one.dim() > 1}
        compress(model, entry(**scopes, params={"start_epoch": None}))[0].strip()
        names = dict(model.named_parameters())
        quantized.append({name for name, one in before.items() if not torch.equal(one, names[name])})
    every, ignored, targeted = quantized
    assert len(every) == 7
    assert every - ignored == {"features.4.0.weight", "head.weight"}
    assert targeted == {"features.4.0.weight"}


def quantizers_of(model: nn.Module, operation: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """Of an operation's weight, and of its inputs."""
    modules = {hook.key: hook.module for hook in hooks(model, shared=True)}
    with evaluating(model):
        met = quantizers_by_operation(model, X[:1])[operation]
    return [modules[key] for key in met.weights], [modules[key] for key in met.activations]


def test_parts_are_quantized_in_their_own_way() -> None:
    last, first = "features/4/0/conv2d/0", "features/0/0/conv2d/0"
    dense = network()
    overrides = {
        "weights": {"features.4": {"per_channel": False}, "{re}features/0/.*": {"mode": "asymmetric"}},
        "activations": {"features.4.0": {"mode": "asymmetric"}},
    }
    ctrl, model = compress(copy.deepcopy(dense), entry(scope_overrides=overrides))
    (weight,), (given,) = quantizers_of(model, last)
    assert isinstance(given, AsymmetricQuantizer)
    assert isinstance(weight, SymmetricQuantizer)
    assert weight.scale.numel() == 1
    (weight,), (given,) = quantizers_of(model, first)
    assert isinstance(weight, AsymmetricQuantizer)
    assert isinstance(given, SymmetricQuantizer)
    (weight,), _ = quantizers_of(model, "features/3/0/conv2d/0")
    assert isinstance(weight, SymmetricQuantizer)
    assert weight.scale.numel() == 64
    assert 0 < distance(ctrl.strip(), dense) < 0.1


def test_weights_or_activations_alone_stay_in_float(caplog) -> None:
    last, first = "features/4/0/conv2d/0", "features/0/0/conv2d/0"
    one = entry(
        weights={"ignored_scopes": ["features.4"]},
        activations={"target_scopes": ["{re}features.*"]},
        scope_overrides={"activations": {"{re}.*matmul_0": {"mode": "symmetric"}}},
    )
    ctrl, model = compress(network(), one)
    weights, given = quantizers_of(model, last)
    assert not weights
    assert len(given) == 1
    assert [len(found) for found in quantizers_of(model, first)] == [1, 1]
    weights, given = quantizers_of(model, "head/linear/0")
    assert len(weights) == 1
    assert not given
    ctrl.strip()
    assert caplog.text.count("'{re}.*matmul_0' matches no operation, and is passed over") == 1
    with pytest.raises(CompactPruneError, match=r"weights\.ignored_scopes: 'hed' matches no operation"):
        compress(network(), entry(weights={"ignored_scopes": ["hed"]}))


def test_every_key_reaches_nncf() -> None:
    keys = {
        "preset": "mixed",
        "overflow_fix": "first_layer_only",
        "quantize_outputs": True,
        "initializer": {"range": {"num_init_samples": 12, "type": "percentile", "params": {"min_percentile": 1}}},
        "weights": {"mode": "symmetric", "per_channel": False, "bits": 8},
        "activations": {"mode": "asymmetric", "signed": True},
        "params": {"target_device": "NPU", "model_type": "transformer"},
        "export_to_onnx_standard_ops": False,
    }
    config = load_config({"compression": entry(**keys)}).compression[0]
    assert config.samples == 12
    options = quantize_options(config, 9, {"b", "a"})
    advanced = options["advanced_parameters"]
    assert options["subset_size"] == 9
    assert options["ignored_scope"].names == ["a", "b"]
    assert [options[key].value for key in ("preset", "target_device", "model_type")] == ["mixed", "NPU", "transformer"]
    assert advanced.overflow_fix.value == "first_layer_only"
    assert advanced.quantize_outputs
    assert advanced.weights_quantization_params.per_channel is False
    assert advanced.activations_quantization_params.mode.value == "asymmetric"
    assert advanced.activations_quantization_params.signedness_to_force is True
    estimator = advanced.activations_range_estimator_params
    assert (estimator.min.statistics_type.value, estimator.min.aggregator_type.value) == ("quantile", "min")
    assert estimator.min.quantile_outlier_prob == pytest.approx(0.01)


@pytest.mark.parametrize("device", ["ANY", "CPU", "GPU", "NPU"])
def test_what_a_depthwise_convolution_reads_has_one_range_unless_asked(device: str) -> None:
    def most_ranges(**keys) -> int:
        ctrl, _ = compress(network(), entry(params={"target_device": device, "start_epoch": None}, **keys))
        found = hooks(ctrl.strip())
        return max(one.module.scale.numel() for one in found if not one.before)  # weights' are in front of operations

    assert most_ranges() == 1
    if device in ("ANY", "CPU"):
        assert most_ranges(activations={"per_channel": None}) == 32


class Shifted(nn.Module):
    """Besides images it takes what all examples share: a shift of channels, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.net((x + shift) * scale)


def test_what_examples_share_stays_whole_in_calibration() -> None:
    shared = torch.tensor([0.0, 20.0, -20.0]).view(3, 1, 1), torch.tensor(0.5)
    model = Shifted().eval()
    with torch.no_grad():
        expected = model(X, *shared)
    loader = [((x, *shared), labels) for x, labels in batches()]
    ctrl, model = create_compressed_model(model, {"compression": [entry()]}, loader)
    model = ctrl.strip().eval()
    with torch.no_grad():
        found = model(X, *shared)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


def test_inputs_stay_in_float_on_request() -> None:
    found = {}
    for asked in (True, False):
        model = network()
        ctrl, _ = compress(model, entry(quantize_inputs=asked))
        found[asked] = {(hook.operation, hook.port) for hook in hooks(model)}
        ctrl.strip()
    assert {operation for operation, _ in found[True] - found[False]} == {"x"}
    assert found[False] < found[True]


def test_half_the_range_is_what_the_overflow_fix_leaves() -> None:
    model = network()
    compress(model, entry(overflow_fix="enable", params={"start_epoch": None}))[0].strip()
    (quantizer,) = [
        hook.module for hook in hooks(model) if hook.operation.startswith("features/4/0") and hook.port == 1
    ]
    assert isinstance(quantizer, StoredQuantizer)
    levels = model.features[4][0].weight.detach() / quantizer.scale.view(-1, 1, 1, 1)
    assert 60 < float(levels.abs().max()) < 65


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": {"bits": 4}}, r"weights\.bits: expected 8, got 4\. .*data_free_quantization with params"),
        ({"scope_overrides": {"weights": {"a": {"bits": 4}}}}, r"weights\.a\.bits: expected 8, got 4"),
        ({"scope_overrides": {"weight": {}}}, r"weight.*Did you mean 'weights'"),
        ({"initializer": {"precision": {"type": "hawq"}}}, r"initializer\.precision: mixed precision is not supported"),
        ({"initializer": {"precision": {"bits": [4, 8]}}}, r"initializer\.precision: mixed precision is not supported"),
        ({"initializer": {"range": {"num_init_samples": -1}}}, r"num_init_samples: expected .*1"),
        ({"initializer": {"range": {"num_init_samples": False}}}, r"num_init_samples: expected .*got false"),
        ({"disable_saturation_fix": "yes"}, r'disable_saturation_fix: expected .*got "yes"'),
        ({"preset": "fast"}, r"preset: expected .*performance"),
        ({"activations": {"unified_scale_ops": [["conv2d"]]}}, r"unified_scale_ops: NNCF 3 knows"),
        (
            {"params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 0}},
            r"start_epoch: .*same epoch",
        ),
        ({"compression_lr_multiplier": 2}, r"compression_lr_multiplier: one learning rate serves"),
        (
            {"weights": {"mode": "asymmetric"}, "overflow_fix": "enable"},
            r"'overflow_fix' is \"enable\": NNCF 3 halves ranges of \"symmetric\" weights only",
        ),
        ({"params": {"target_device": "NPUU"}}, r"target_device: .*Did you mean 'NPU'"),
        ({"params": {"start_epoch": -1}}, r"start_epoch: expected"),
        (
            {"initializer": {"range": {"num_init_samples": 5}}, "params": {"subset_size": 6}},
            "Both say how many samples",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(keys, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"compression": entry(**keys)})


@pytest.mark.parametrize("device", ["ANY", "CPU", "NPU"])
def test_asymmetric_weights_are_quantized_for_every_device(device: str) -> None:
    dense = network()
    ctrl, _ = compress(copy.deepcopy(dense), entry(weights={"mode": "asymmetric"}, params={"target_device": device}))
    assert 0 < distance(ctrl.strip(), dense) < 0.1


def test_wrong_data_and_models_are_refused_and_the_model_stays() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"no train_loader.*data_free_quantization"):
        compress(model, entry(), loader=None)
    with pytest.raises(QuantizationError, match="holds no sample"):
        compress(model, entry(), loader=[])
    with pytest.raises(QuantizationError, match=r"cannot quantize Classifier: .*channels"):
        compress(model, entry(), loader=[(torch.randn(4, 1, 16, 16), torch.zeros(4))])
    with pytest.raises(CompactPruneError, match="'hed' matches no operation"):
        compress(model, entry(ignored_scopes=["hed"]))
    with pytest.raises(QuantizationError, match=r"bare nn\.Sequential"):
        compress(nn.Sequential(nn.Conv2d(3, 4, 3)), entry())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_precisions_of_quantized_and_of_float_networks(tmp_path) -> None:
    model = network()
    with pytest.raises(ExportError, match=r"the model is not quantized, got \['int8'\]"):
        export_model(model, X, tmp_path, precisions=["int8"])
    compress(model, entry(params={"start_epoch": None}))[0].strip()
    with pytest.raises(ExportError, match=r"quantized, its files are int8, got \['fp32'\]"):
        export_model(model, X, tmp_path, precisions=["fp32"])
    assert not list(tmp_path.iterdir())


# -- accuracy control --------------------------------------------------------------------------------------------------


def hostile(*places: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network whose activations, behind some convolutions, hold one channel a thousand times larger than the others,
    which the next layer takes back: exact in float, ruined by one range for all channels. And its own decisions as
    labels."""
    torch.manual_seed(0)
    net = Classifier(nn.Sequential(*(nn.Conv2d(3 if n == 0 else 12, 12, 3, padding=1) for n in range(5))), 12)
    with torch.no_grad():
        for place in places:
            loud, quiet = net.features[place], net.features[place + 1]
            loud.weight[0] *= 1000
            loud.bias[0] *= 1000
            quiet.weight[:, 0] /= 1000
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 64, 3, 16, 16, generator=generator)
    return net.eval(), [(x, net(x).detach().argmax(1)) for x in images]


def controlled(model, loader, **keys):
    asked = entry(accuracy_control={"max_drop": 0.02, "num_samples": 384, **keys}, params={"subset_size": 32})
    ctrl, _ = compress(model, asked, loader=loader)
    return ctrl, ctrl.statistics().algorithms["quantization"]["layers in float"]


def test_accuracy_control_leaves_the_harmful_layer_in_float_and_no_other(tmp_path) -> None:
    model, loader = hostile(3)
    uncontrolled = copy.deepcopy(model)
    compress(uncontrolled, entry(params={"subset_size": 32}), loader=loader)
    ctrl, in_float = controlled(model, loader)

    def accuracy(net):
        with torch.no_grad():
            return sum(int((net.eval()(x).argmax(1) == y).sum()) for x, y in loader) / 384

    assert accuracy(uncontrolled) < 0.9
    assert accuracy(model) >= 0.98
    assert in_float == "features/4/conv2d/0"
    ctrl.strip()
    (file,) = export_model(model, X, tmp_path, formats=["openvino"])
    kinds = [precision for kind, precision in layers_in(file.path) if kind == "Convolution"]
    assert len(kinds) == 5
    assert sum(precision in ("i8", "u8") for precision in kinds) == 4


def test_accuracy_control_quantizes_everything_where_that_holds() -> None:
    model, loader = hostile()
    _, in_float = controlled(model, loader, max_drop=0.1)
    assert in_float == "none"


@pytest.mark.parametrize("needed", range(1, 8))
def test_accuracy_control_finds_the_fewest_layers_up_to_all_but_one(monkeypatch, needed) -> None:
    names = [f"layer{at}" for at in range(7)]
    monkeypatch.setattr(accuracy_control, "_by_their_effect", lambda *args: names)
    monkeypatch.setattr(accuracy_control, "accuracy_on", lambda net, batches: getattr(net, "accuracy", 1.0))
    tried = []

    def quantize(net: nn.Module, in_float: Sequence[str]) -> None:
        tried.append(len(in_float))
        net.accuracy = 1.0 if len(in_float) >= needed else 0.5

    if needed == 7:
        with pytest.raises(QuantizationError, match=r"at best 50\.00% with 0 of 7 layers in float"):
            accuracy_control.control(nn.Module(), quantize, X, [], 0.02)
        assert tried == [0, 1, 2, 4, 6]
    else:
        found = accuracy_control.control(nn.Module(), quantize, X, [], 0.02)
        assert found.in_float == tuple(names[:needed])
        assert len(tried) == len(set(tried)) <= 6


def test_a_drop_that_cannot_be_held_and_missing_labels_are_told_and_the_model_stays(monkeypatch) -> None:
    model, loader = hostile()
    before = copy.deepcopy(model.state_dict())
    found = iter([1.0, 0.5, 0.6, 0.7, 0.9, 0.8])
    monkeypatch.setattr(accuracy_control, "accuracy_on", lambda net, batches: next(found))
    with pytest.raises(
        QuantizationError, match=r"of 2.00% cannot be held: 100.00% in float, at best 90.00% with 4 of 6"
    ):
        controlled(model, loader)
    with pytest.raises(CompactPruneError, match="accuracy_control: batches hold no labels"):
        controlled(model, [x for x, _ in loader])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hooks(model)


def test_gradient_checkpointing_is_refused_beside_quantizers():
    """What runs again in the backward pass is not quantized, so gradients were wrong."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self.inner(x)
            return torch.utils.checkpoint.checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)

    _, model = create_compressed_model(Checkpointed(), {"compression": {"algorithm": "quantization"}}, batches())
    model.eval()(X)
    with pytest.raises(CompactPruneError, match="without their masks, quantizers or factors"):
        model.train()(X.clone())
