"""The controller and ``create_compressed_model`` of NNCF 2.x, on a network that becomes smaller."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, model32
from torch import nn
from torch.utils.data import DataLoader

from nncf_compactprune.errors import CompactPruneError, ConfigError, DataError
from nncf_compactprune.integrations.nncf2 import (
    BNAdaptationInitArgs,
    CompressionStage,
    NNCFConfig,
    PTInitializingDataLoader,
    create_compressed_model,
    nncf_model_input,
    prepare_for_tensorboard,
    register_default_init_args,
)

INPUT = {"sample_size": [2, 3, 12, 12]}


def entry(budget=0.5, **params):
    return {"algorithm": "fbnet_pruning", "budget": {"macs": budget}, "params": {"round_to": 1, **params}}


def config(**params):
    return NNCFConfig.from_dict({"input_info": INPUT, "compression": entry(**params)})


def compressed(nncf_config=None, model=None, **arguments):
    return create_compressed_model(model or model32(), nncf_config or config(), dump_graphs=False, **arguments)


def loader():
    data = [(x, y) for batch in labelled_batches() for x, y in zip(*batch, strict=True)]
    return DataLoader(data, batch_size=4)


def train(ctrl, model, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        ctrl.scheduler.epoch_step()
        model.train()
        for inputs, labels in labelled_batches():
            ctrl.scheduler.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) + ctrl.loss()).backward()
            optimizer.step()


def weights(model):
    return sum(p.numel() for n, p in model.named_parameters() if "nncf" not in n)


def output(model, x=None):
    with torch.no_grad():
        return model.eval()(images(torch.float32) if x is None else x)


def test_the_loop_of_nncf2_ends_with_a_small_file(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    nncf_config = register_default_init_args(config(pruning_steps=2), loader())
    ctrl, model = compressed(nncf_config)
    ctrl.distributed()
    dense = weights(model)
    train(ctrl, model, 3)
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert ctrl.compression_rate == pytest.approx(0.5, abs=0.05)
    assert "fbnet_pruning" in ctrl.statistics(quickly_collected_only=True).to_str()
    masked = output(model)
    ctrl.export_model(str(tmp_path / "net.onnx"), save_format="onnx_11")
    assert weights(model) == dense  # training may go on
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [port.name for port in session.get_inputs()] == ["input.0"]
    assert [port.name for port in session.get_outputs()] == ["output.0"]
    (found,) = session.run(None, {"input.0": images(torch.float32).numpy()})
    torch.testing.assert_close(torch.tensor(found), masked, rtol=1e-4, atol=1e-5)
    train(ctrl, model, 1)
    small = ctrl.strip()
    assert weights(small) < 0.8 * dense == 0.8 * weights(model)
    torch.testing.assert_close(output(small), output(model), rtol=1e-5, atol=1e-6)
    ctrl.prepare_for_export()
    assert weights(model) == weights(small)


def test_the_opset_of_an_export_is_honoured_or_a_warning_says_what_is_written(tmp_path, caplog):
    onnx = pytest.importorskip("onnx")
    ctrl, _ = compressed()

    def opset_of(save_format):
        (file,) = ctrl.export_model(tmp_path / "net", save_format)
        assert file.path == tmp_path / "net.onnx"
        return onnx.load(file.path).opset_import[0].version

    assert opset_of("onnx_20") == 20
    assert "opset" not in caplog.text
    own = opset_of("onnx")
    for older in (11, 14):
        caplog.clear()
        assert opset_of(f"onnx_{older}") == own
        assert f"torch's exporter chooses the opset instead of {older}." in caplog.text
    with pytest.raises(CompactPruneError, match=r"or onnx_<opset>, got 'openvino_11'"):
        ctrl.export_model(tmp_path / "net", "openvino_11")


def test_a_copy_is_cut_and_the_model_stays_masked():
    ctrl, model = compressed()
    ctrl.compression_rate = 0.3
    before, state = output(model), copy.deepcopy(model.state_dict())
    small = ctrl.strip(do_copy=True)
    assert weights(small) < weights(model)
    assert torch.equal(before, output(model))
    assert model.state_dict().keys() == state.keys()
    ctrl.compression_rate = 0.0
    assert not torch.equal(before, output(model))  # its masks are still its own
    assert ctrl.strip_model(model) is model
    with pytest.raises(CompactPruneError, match="the model of this controller"):
        ctrl.strip_model(small)


@pytest.mark.parametrize("cut", [False, True])
def test_a_compression_state_resumes_masks_or_the_cut(cut):
    ctrl, model = compressed(config(pruning_steps=2))
    train(ctrl, model, 3)
    if cut:
        ctrl.prepare_for_export()
    checkpoint = {"state_dict": copy.deepcopy(model.state_dict()), "compression_state": ctrl.get_compression_state()}
    again, resumed = compressed(config(pruning_steps=2), compression_state=checkpoint["compression_state"])
    resumed.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(output(model), output(resumed))
    assert again.scheduler.get_state() == {"current_epoch": 2, "current_step": ctrl.scheduler.current_step}
    assert again.compression_rate == ctrl.compression_rate
    assert again.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_a_state_dict_alone_brings_masks_and_weights():
    ctrl, model = compressed(config(pruning_steps=2))
    train(ctrl, model, 3)
    for arguments in (
        {"resuming_state_dict": model.state_dict()},
        {"compression_state": {"state_dict": model.state_dict()}},
    ):
        again, resumed = compressed(**arguments)
        assert torch.equal(output(model), output(resumed))
        assert again.compression_stage() is CompressionStage.FULLY_COMPRESSED
    with pytest.raises(CompactPruneError, match=r"NNCF 2\.x made it by \[\], but the configuration has"):
        compressed(compression_state={"builder_state": {}, "ctrl_state": {}})
    with pytest.raises(CompactPruneError, match="expected what get_compression_state"):
        compressed(compression_state={"epoch": 3})


class Detector(nn.Module):
    """Takes a list of images and a flag."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, batch, scale=1.0, *, half=None):
        return self.features(torch.stack(batch["images"])) * scale + (0 if half is None else half)


def test_dummy_forward_fn_says_what_the_model_is_called_with():
    def dummy_forward(model):
        pictures = [nncf_model_input(torch.randn(3, 8, 8)) for _ in range(2)]
        return model({"images": pictures}, half=torch.ones(1))

    nncf_config = NNCFConfig.from_dict({"compression": entry()})
    ctrl, model = compressed(
        nncf_config, Detector(), dummy_forward_fn=dummy_forward, wrap_inputs_fn=lambda a, k: (a, k)
    )
    ctrl.prepare_for_export()
    assert model.features[0].out_channels < 8
    with pytest.raises(CompactPruneError, match="expected it to call the model"):
        compressed(nncf_config, Detector(), dummy_forward_fn=lambda model: model.features(torch.randn(1, 3, 8, 8)))


def test_a_registered_loader_gives_the_example_input():
    class Pairs(PTInitializingDataLoader):
        def get_inputs(self, dataloader_output):
            return (dataloader_output["x"],), {}

        def get_target(self, dataloader_output):
            return dataloader_output["y"]

    batches = [{"x": x, "y": y} for x, y in labelled_batches()]
    plain = {"compression": entry(importance="taylor", schedule="one_shot")}
    nncf_config = register_default_init_args(NNCFConfig.from_dict(plain), Pairs(batches))
    assert nncf_config.has_extra_struct(BNAdaptationInitArgs)
    ctrl, model = compressed(nncf_config)
    assert weights(model) < weights(model32())
    assert ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    with pytest.raises(CompactPruneError, match="is registered already"):
        register_default_init_args(nncf_config, Pairs(batches))
    with pytest.raises(CompactPruneError, match="told what the model is called with"):
        compressed(NNCFConfig.from_dict(plain))
    with pytest.raises(DataError, match="got a tuple of 3"):
        compressed(register_default_init_args(NNCFConfig.from_dict(plain), [(1, 2, 3)]))


def test_children_and_their_rates():
    two = [entry(0.7), {"algorithm": "linear_overparameterization"}]
    ctrl, model = compressed(NNCFConfig.from_dict({"input_info": INPUT, "compression": two}))
    pruning, recovery = ctrl.child_ctrls
    assert (pruning.name, recovery.name) == ("fbnet_pruning", "linear_overparameterization")
    pruning.disable_scheduler()
    assert 0.5 < pruning.maximal_compression_rate == ctrl.maximal_compression_rate < 1
    pruning.compression_rate = 0.2
    assert ctrl.compression_rate == 0.2
    assert pruning.compression_stage() is ctrl.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert float(ctrl.loss()) == float(pruning.loss()) == 0
    assert pruning.model is model
    with pytest.raises(NotImplementedError):
        recovery.compression_rate = 0.2


def test_without_compression_everything_passes_through(tmp_path):
    ctrl, model = compressed(NNCFConfig.from_dict({"input_info": INPUT}))
    assert ctrl.name == "NoCompressionAlgorithm"
    assert ctrl.child_ctrls == []
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.step()
    assert float(ctrl.loss()) == 0
    assert ctrl.compression_stage() is CompressionStage.UNCOMPRESSED
    assert weights(ctrl.strip()) == weights(model)


def test_graphs_are_dumped_into_the_log_dir(tmp_path):
    nncf_config = config(schedule="one_shot")
    nncf_config["log_dir"] = tmp_path / "logs"
    create_compressed_model(model32(), nncf_config)
    original, small = (tmp_path / "logs" / f"{which}_graph.dot" for which in ("original", "compressed"))
    assert "conv2d" in original.read_text()
    assert small.read_text() != original.read_text()


def test_tensorboard_gets_numbers():
    ctrl, _ = compressed(config(schedule="one_shot"))
    figures = prepare_for_tensorboard(ctrl.statistics())
    assert figures
    assert all(isinstance(value, float) for value in figures.values())


def test_an_nncf_config_is_a_dictionary_that_was_checked(tmp_path):
    (tmp_path / "c.json").write_text('{"input_info": {"sample_size": [2, 3, 12, 12]}, // NNCF\n "epochs": 3,}')
    nncf_config = NNCFConfig.from_json(tmp_path / "c.json")
    nncf_config.update({"compression": entry(), "device": torch.device("cpu")})
    nncf_config["epochs"] = 4
    assert copy.deepcopy(nncf_config) == nncf_config
    assert compressed(nncf_config)[0].name == "fbnet_pruning"
    assert NNCFConfig.schema()["properties"]
    source = {"compression": entry()}
    NNCFConfig.from_dict(source)["compression"]["algorithm"] = "other"
    assert source["compression"]["algorithm"] == "fbnet_pruning"
    with pytest.raises(ConfigError, match=r"compression\.budge: unknown key"):
        NNCFConfig.from_dict({"compression": {"algorithm": "fbnet_pruning", "budge": 1}})


def test_statistics_are_read_by_name_and_in_a_loop():
    ctrl, _ = compressed()
    statistics = ctrl.statistics()
    assert [name for name, _ in statistics] == ["fbnet_pruning"]
    assert statistics.fbnet_pruning == dict(statistics)["fbnet_pruning"]
    assert not hasattr(statistics, "quantization")
    assert copy.deepcopy(statistics).fbnet_pruning == statistics.fbnet_pruning


def test_strip_takes_the_arguments_of_nncf():
    ctrl, model = compressed(config(schedule="one_shot"))
    assert weights(ctrl.strip(do_copy=True, strip_format="native")) == weights(model)
