"""Data-free pruning, sparsity and quantization through their configs: budgets, laws, files, wrong input."""

from __future__ import annotations

import copy

import openvino
import pytest
import torch
import torch.nn.functional as F
from support.data_free import randn, state, unchanged, with_statistics_of
from support.networks import images, trained
from torch import nn

from nncf_compactprune import CompressionStage, create_compressed_model, export_model, prune
from nncf_compactprune.algorithms.data_free import Reconstruction
from nncf_compactprune.algorithms.data_free.generation import statistics_loss
from nncf_compactprune.algorithms.data_free.operations import refittable
from nncf_compactprune.algorithms.data_free.quantizers import GridQuantizer
from nncf_compactprune.channels import trace
from nncf_compactprune.config import json_schema
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.errors import CompactPruneError, ConfigError, DataFreeError, ScopeError
from nncf_compactprune.export import verify_export
from nncf_compactprune.host.nncf_hooks import hooks

X = images(torch.float32)
DATA = F.avg_pool2d(randn(256, 3, 24, 24), 2) * 3
FEW = {"samples": 48, "steps": 3}


def network(name: str = "residual") -> nn.Module:
    return with_statistics_of(trained(name, dtype=torch.float32), DATA)


def compress(model, *entries, loader=None):
    entries = [{"generation": FEW, **entry} for entry in entries]
    config = {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entries}
    return create_compressed_model(model, config, loader)


def test_prune_takes_every_key_of_the_entry_as_a_keyword() -> None:
    algorithm = "data_free_layerwise"
    by_keyword, by_config = network(), network()
    prune(by_keyword, X, algorithm, budget={"macs": 0.8}, round_to=1, generation={**FEW, "seed": 3})
    compress(by_config, prune_entry(0.8, generation={**FEW, "seed": 3}))
    assert torch.equal(by_keyword(X), by_config(X))
    for mistake, said in (
        ({"generation": {"sample": 3}}, r"prune: generation\.sample: unknown key\. Did you mean 'samples'"),
        ({"generatio": FEW}, r"prune: generatio: 'data_free_layerwise' has no such key\. Did you mean 'generation'\?"),
        ({"x": 1}, r"prune: x: .*no such key\. Expected one of .allocation., .*, .generation., .*target_scopes."),
    ):
        with pytest.raises(ConfigError, match=said):
            prune(by_config, X, algorithm, budget={"macs": 0.5}, **mistake)
    with pytest.raises(CompactPruneError, match=r"'data_free_quantization' is no pruning algorithm\. Use create_compr"):
        prune(by_config, X, "data_free_quantization", budget={"macs": 0.5}, generation=FEW)


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("data_free_layerwise", torch.bfloat16),
        ("data_free_sparsity", torch.float64),
        ("data_free_quantization", torch.float16),
    ],
)
def test_networks_of_other_floats_come_out_as_near_in_their_dtype(algorithm: str, dtype: torch.dtype) -> None:
    few, found, dense = {**FEW, "source": "inversion+bn_sampling"}, {}, network().eval()(DATA)
    entry = {"algorithm": algorithm, "generation": few, "params": {}}
    if algorithm == "data_free_layerwise":
        entry |= {"budget": {"macs": 0.8}, "params": {"round_to": 1}}
    for kind in (torch.float32, dtype):
        model = network().to(kind).eval()
        ctrl, model = create_compressed_model(model, {"compression": entry}, example_inputs=X.to(kind))
        ctrl.strip()
        assert all(p.dtype == kind for p in model.parameters())
        with torch.no_grad():
            found[kind] = float((model(DATA.to(kind)).float() - dense).square().mean() / dense.var(0).mean())
    assert found[dtype] < 1.5 * found[torch.float32], found


def test_the_loss_of_statistics_does_not_overflow_in_float16() -> None:
    norm, x = nn.BatchNorm2d(4), 400 * randn(8, 4, 6, 6)
    expected = statistics_loss(x.half().float(), norm)
    assert float(statistics_loss(x.half(), norm.half())) == pytest.approx(float(expected), rel=1e-3)


def prune_entry(budget=0.5, **more):
    return {"algorithm": "data_free_layerwise", "budget": {"macs": budget}, "params": {"round_to": 1}, **more}


class BehindAGate(nn.Module):
    """What consumes the channels of ``first`` computes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))


def test_channels_that_no_layer_with_moments_consumes_go_by_magnitude_with_biases_too() -> None:
    model = with_statistics_of(BehindAGate(), DATA)
    weak = torch.tensor([1, 4, 7, 9])
    model.first.weight.data[weak] *= 1e-3
    model.first.bias.data[weak] *= 1e-3
    ctrl, _ = compress(model, prune_entry(0.8))
    kept = plan_of(ctrl.strip()).kept["first.weight"][0]
    assert len(kept) < 16
    assert sum(at in weak.tolist() for at in kept) == max(0, len(kept) - 12)


def quantize_entry(bits=8, **params):
    return {"algorithm": "data_free_quantization", "params": {"weight_bits": bits, "activation_bits": bits, **params}}


@torch.no_grad()
def distance(dense, model):
    expected = dense.eval()(DATA)
    return float((model.eval()(DATA) - expected).square().mean() / expected.var(0).mean())


@pytest.mark.parametrize("name", ["residual", "depthwise", "squeeze_excite", "flatten", "option_a"])
def test_pruning_holds_the_budget_and_refitting_is_better_than_the_cut_alone(name: str) -> None:
    dense = network(name)
    model, macs = copy.deepcopy(dense), trace(dense, X).macs
    ctrl, same = compress(model, prune_entry())
    assert same is model
    assert trace(model, X).macs <= 0.5 * macs
    assert ctrl.algorithms[0].self_check.error < 1e-5
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    only_cut = copy.deepcopy(dense)
    from nncf_compactprune import apply_plan

    apply_plan(only_cut, plan_of(model))
    assert distance(dense, model) < distance(dense, only_cut)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_repeated_channels_go_for_nothing() -> None:
    """Half of a layer's filters repeat the other half: without data, all of them go and the output stays."""
    dense = trained("plain", dtype=torch.float32)
    conv, norm = dense.features[2][0], dense.features[2][1]
    for tensor in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data[12:] = tensor.data[:12]
    with_statistics_of(dense, DATA)
    model = copy.deepcopy(dense)
    entry = prune_entry(0.9, target_scopes=["{re}features.2.*"])
    compress(model, {**entry, "params": {"round_to": 1, "ridge": 1e-6}})
    change = {g.name: (g.before, g.after) for g in plan_of(model).groups}["features.2.0"]
    assert change[1] < change[0]
    kept = plan_of(model).kept["features.2.0.weight"][0]
    assert {k % 12 for k in kept} == set(range(12))  # of each pair, one stayed
    assert distance(dense, model) < 1e-3  # nearly: the images leave a little doubt that they are the same


def test_inputs_of_a_loader_and_of_both_sources() -> None:
    dense = network()
    for source, loader in (("dataset", [(DATA[:64], None)]), ("inversion+bn_sampling", None), ("bn_sampling", None)):
        model = copy.deepcopy(dense)
        compress(model, prune_entry(generation={"source": source, "samples": 64}), loader=loader)
        assert distance(dense, model) < 1.5, source


def test_a_state_replays_the_plan() -> None:
    dense = network()
    first = copy.deepcopy(dense)
    ctrl, _ = compress(first, prune_entry())
    again = copy.deepcopy(dense)
    config = {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": [prune_entry(generation=FEW)]}
    create_compressed_model(again, config, compression_state=ctrl.get_compression_state())
    again.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(X), again.eval()(X))


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_sparsity_has_its_share_of_real_zeros(ratio: float) -> None:
    dense = network("plain")
    model = copy.deepcopy(dense)
    ctrl, _ = compress(model, {"algorithm": "data_free_sparsity", "params": {"sparsity": ratio}})
    ctrl.strip()
    weights = [model.get_submodule(name).weight for name in refittable(model, X).found]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) / total == pytest.approx(ratio, abs=0.002)
    plain = copy.deepcopy(dense)
    own = [plain.get_submodule(name).weight.data for name in refittable(plain, X).found]
    threshold = torch.cat([w.abs().flatten() for w in own]).kthvalue(round(ratio * total)).values
    for w in own:
        w[w.abs() <= threshold] = 0
    assert distance(dense, model) < distance(dense, plain)


def test_two_of_four_along_input_channels() -> None:
    model = network("plain")
    ctrl, _ = compress(model, {"algorithm": "data_free_sparsity", "params": {"granularity": "2:4"}})
    ctrl.strip()
    zeros = (model.features[1 + 1][0].weight == 0).movedim(1, -1).reshape(-1, 4).sum(1)  # [24, 16, 3, 3]
    assert bool((zeros == 2).all())
    assert not bool((model.features[0][0].weight == 0).any())  # 3 input channels hold no four


def test_pruned_then_quantized_runs_as_int8_in_both_runtimes(tmp_path) -> None:
    dense = network()
    model = copy.deepcopy(dense)
    ctrl, _ = compress(model, prune_entry(0.8), quantize_entry(8))
    pruned = copy.deepcopy(model)
    assert ctrl.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    assert ctrl.strip() is model
    assert distance(pruned, model) < 0.05
    files = export_model(model, X, tmp_path)
    assert {f.label for f in files} == {"ONNX INT8", "OpenVINO INT8"}
    assert all(verify_export(model, f.path, X).max_rel_error < 0.1 for f in files)
    ir = openvino.Core().read_model(tmp_path / "model_int8.xml")
    assert sum(op.get_type_name() == "FakeQuantize" for op in ir.get_ops()) >= 10
    running = openvino.Core().compile_model(ir, "CPU").get_runtime_model()
    kinds = [
        [op.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")] for op in running.get_ops()
    ]
    convolutions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert convolutions
    assert sum("8" in precision for precision in convolutions) == len(convolutions), kinds


@pytest.mark.parametrize("bits", [4, 6])
def test_few_bits_leave_few_levels(bits: int) -> None:
    dense = network()
    model = copy.deepcopy(dense)
    ctrl, _ = compress(model, quantize_entry(bits, per_channel=bits == 4))
    ctrl.strip()
    weight = model.features[1].conv1.weight
    rows = weight.flatten(1) if bits == 4 else weight.reshape(1, -1)
    assert max(len(row.unique()) for row in rows) <= 2**bits - 1
    assert len(model.head.weight[0].unique()) > 2  # an edge has 8 bits
    nearest = [h for h in model.modules() if isinstance(h, GridQuantizer)]
    assert {h.bits for h in nearest} == {bits, 7, 8}  # 7: the first layer's weights
    assert not any(h.pending for h in nearest)
    assert distance(dense, model) < (0.7 if bits == 4 else 0.1)


@pytest.mark.parametrize(
    ("fix", "activation_bits", "first", "others"),
    [("disable", 8, 8, 8), ("first_layer_only", 8, 7, 8), ("enable", 8, 7, 7), ("enable", 7, 7, 8)],
)
def test_a_bit_less_where_sums_of_sixteen_bits_would_overflow(fix, activation_bits, first, others) -> None:
    model = network()
    params = {"activation_bits": activation_bits}
    compress(model, {**quantize_entry(), "params": params, "overflow_fix": fix})[0].strip()
    bits = {hook.operation: hook.module.bits for hook in hooks(model) if hook.port == 1}
    by_layer = [bits[name] for name in sorted(bits, key=lambda name: "head" in name)]
    assert by_layer[0] == first, bits
    assert set(by_layer[1:-1]) == {others}, bits
    assert by_layer[-1] == (7 if fix == "enable" else 8), bits  # an edge has 8 bits, inputs too


def test_equalised_depthwise_weights_with_one_scale() -> None:
    """Channels of very unlike size: with one scale for a weight the small ones are lost, unless equalised first."""
    dense = network("depthwise")
    spread = torch.logspace(-1.5, 1.5, 32)
    block = dense.features
    block[1][1].weight.data *= spread  # ReLU passes the scale on to the depthwise convolution, which takes it back
    block[1][1].bias.data *= spread
    block[2][0].weight.data /= spread.view(-1, 1, 1, 1)
    results = []
    for equalise in (False, True):
        model = copy.deepcopy(dense)
        ctrl, _ = compress(model, quantize_entry(4, per_channel=False, equalise=equalise))
        ctrl.strip()
        results.append(distance(dense, model))
    assert results[1] < 0.8 * results[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_quantizer_rounds_to_its_levels(bits: int) -> None:
    quantizer, x = GridQuantizer(bits, signed=False), torch.linspace(-1, 4, 4001)
    quantizer.pending = True
    y = quantizer(x)
    assert len(y.unique()) == 2**bits
    inside = (x > y.min()) & (x < y.max())
    assert (y - x)[inside].abs().max() <= quantizer.scale / 2 + 1e-6
    assert bool((y[x == 0] == 0).all())
    assert torch.equal(quantizer(y), y)
    again = GridQuantizer.from_config(quantizer.get_config())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), y)


SCOPES = [
    ({"ignored_scopes": ["features.1"]}, lambda name: not name.startswith("features.1.")),
    ({"ignored_scopes": ["{re}features.1", "head"]}, lambda name: not name.startswith(("features.1.", "head"))),
    ({"target_scopes": ["features.1"]}, lambda name: name.startswith("features.1.")),
    (
        {"target_scopes": ["{re}.*conv2d"], "ignored_scopes": ["features.1.conv1"]},
        lambda n: n not in ("features.1.conv1", "head"),
    ),
]


@pytest.mark.parametrize(("scopes", "inside"), SCOPES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_sparsity_and_quantization_keep_to_their_scopes(scopes, inside) -> None:
    sparse = network()
    layers = set(refittable(sparse, X).found)
    ctrl, _ = compress(sparse, {"algorithm": "data_free_sparsity", "params": {"sparsity": 0.5}, **scopes})
    ctrl.strip()
    with_zeros = {name for name in layers if bool((sparse.get_submodule(name).weight == 0).any())}
    assert with_zeros == {name for name in layers if inside(name)}
    quantized = network()
    ctrl, _ = compress(quantized, {**quantize_entry(4, edge_bits=4), **scopes})
    ctrl.strip()
    on_grid = {name for name in layers if len(quantized.get_submodule(name).weight[0].unique()) <= 15}
    assert on_grid == {name for name in layers if inside(name)}


@pytest.mark.parametrize("entry", [prune_entry(), quantize_entry(), {"algorithm": "data_free_sparsity"}])
def test_a_scope_without_a_match_is_refused_before_any_work(entry) -> None:
    model = network()
    before = state(model)
    for key in ("ignored_scopes", "target_scopes"):
        with pytest.raises(ScopeError, match=f"{key}: 'features.9' matches no operation and no module"):
            compress(model, {**entry, key: ["features.9"]})
    assert unchanged(model, before)


@pytest.mark.parametrize("entry", [quantize_entry(), {"algorithm": "data_free_sparsity"}])
def test_scopes_that_leave_no_layer_are_refused(entry) -> None:
    model = network()
    before = state(model)
    with pytest.raises(DataFreeError, match=r"in scope. Widen target_scopes or ignored_scopes"):
        compress(model, {**entry, "ignored_scopes": ["{re}.*"]})[0].strip()
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({**prune_entry(), "initializer": {}}, r"\[0\].initializer: this algorithm does not read it: BatchNorm"),
        ({**quantize_entry(), "initializer": {}}, r"\[0\].initializer: this algorithm does not read it: BatchNorm"),
        ({"algorithm": "data_free_sparsity", "initializer": {}}, r"\[0\].initializer: this algorithm does not read it"),
        (
            prune_entry(params={"pruning_steps": 3}),
            r"params.pruning_steps: this algorithm does not read it: everything",
        ),
        (quantize_entry(3), r"compression\[0\].params.weight_bits"),
        (quantize_entry(9), r"compression\[0\].params.activation_bits"),
        (prune_entry(generation={"source": "dataset", "steps": 5}), r"'steps' belongs to inverted images"),
        (prune_entry(generation={"source": "bn_sampling", "cache": "x"}), r"'cache' belongs to inverted images"),
        ({"algorithm": "data_free_sparsity", "params": {"granularity": "2:4", "sparsity": 0.7}}, r"contradicts"),
        ({"algorithm": "data_free_sparsity", "params": {"sparsity": 1.0}}, r"params.sparsity"),
    ],
)
def test_wrong_config_is_told(entry, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        compress(network(), entry)


def test_the_schema_holds_no_key_that_is_not_read() -> None:
    definitions = json_schema()["$defs"]
    assert "initializer" in definitions["FBNetConfig"]["properties"]
    for name in ("DataFreeConfig", "DataFreeQuantizationConfig", "DataFreeSparsityConfig"):
        assert "target_scopes" in definitions[name]["properties"]
        assert "initializer" not in definitions[name]["properties"]
    assert "pruning_steps" not in definitions["DataFreeParams"]["properties"]


@pytest.mark.parametrize("entry", [prune_entry(), quantize_entry(), {"algorithm": "data_free_sparsity"}])
def test_wrong_models_are_refused_untouched(entry) -> None:
    fresh = trained("residual", dtype=torch.float32)
    for norm in (m for m in fresh.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    broken = network()
    broken.head.weight.data[0, 0] = float("inf")
    for model, match in (
        (fresh, "an untrained network"),
        (broken, "'head.weight': 1 of 120 values are NaN or infinite"),
    ):
        before = state(model)
        with pytest.raises(DataFreeError, match=match):
            compress(model, entry)
        assert unchanged(model, before)
    with pytest.raises(DataFreeError, match=r'"dataset", but no train_loader'):
        compress(network(), {**entry, "generation": {"source": "dataset"}})


@pytest.mark.parametrize("entry", [quantize_entry(4), {"algorithm": "data_free_sparsity"}])
def test_a_failure_on_the_way_puts_everything_back(entry, monkeypatch) -> None:
    model = network()
    before, expected = state(model), model.eval()(X)
    ctrl, _ = compress(model, entry)

    def dying(self, module, met):
        module.weight.data.add_(1)
        raise MemoryError

    monkeypatch.setattr(Reconstruction, "_layer", dying)
    with pytest.raises(MemoryError):
        ctrl.strip()
    assert unchanged(model, before)
    assert torch.equal(model(X), expected)
    assert not hasattr(model, "__nncf_hooks")
