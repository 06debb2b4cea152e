"""Names lead to models, example inputs and weights, or to an error that says what to write instead."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from nncf_compactprune.errors import ResolveError
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.run import models
from nncf_compactprune.run.models import load_weights, resolve_model

DIGITS_NET = "python:nncf_compactprune.run.networks.digits_net:digits_net"
RESNET20 = "python:nncf_compactprune.run.networks.cifar_resnet:resnet20"


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    registry = Plugins()
    registry.register(models)
    return registry


def run(resolved: models.ResolvedModel) -> torch.Tensor:
    inputs = resolved.example_inputs
    with torch.no_grad():
        output = resolved.model(**inputs) if isinstance(inputs, dict) else resolved.model(inputs)
    return output if isinstance(output, torch.Tensor) else output["logits"]


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        (DIGITS_NET, (1, 1, 16, 16), 199_058),
        # He et al. 2016, table 6: 0.27 and 0.85 million
        (RESNET20, (1, 3, 32, 32), 269_722),
        ("python:nncf_compactprune.run.networks.cifar_resnet:resnet56", (1, 3, 32, 32), 853_018),
    ],
)
def test_own_model_has_the_published_size_and_runs(
    plugins: Plugins, name: str, shape: tuple[int, ...], parameters: int
) -> None:
    resolved = resolve_model(name, plugins=plugins)
    assert resolved.name == name
    assert isinstance(resolved.example_inputs, torch.Tensor)
    assert resolved.example_inputs.shape == shape
    assert sum(parameter.numel() for parameter in resolved.model.parameters()) == parameters
    assert not resolved.model.training
    assert run(resolved).shape == (1, 10)


def test_cifar_shortcut_subsamples_and_pads_on_both_sides() -> None:
    from nncf_compactprune.run.networks.cifar_resnet import BasicBlock

    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    y = block(x)
    torch.testing.assert_close(y[:, 1:3], x[:, :, ::2, ::2])
    assert y[:, [0, 3]].abs().max() == 0


def test_timm_model_takes_its_own_input_size(plugins: Plugins) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    resolved = resolve_model("timm:mobilenetv3_small_050", options={"num_classes": 7, "in_chans": 1}, plugins=plugins)
    assert isinstance(resolved.example_inputs, torch.Tensor)
    assert resolved.example_inputs.shape == (1, 1, 224, 224)
    assert run(resolved).shape == (1, 7)


def test_timm_name_is_corrected(plugins: Plugins) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ResolveError, match=r"no model 'fbnetv3_bb'\. Did you mean 'fbnetv3_b'\?"):
        resolve_model("timm:fbnetv3_bb", plugins=plugins)


def test_torchvision_model_and_its_name(plugins: Plugins) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    resolved = resolve_model("torchvision:squeezenet1_1", sample_size=(2, 3, 64, 64), plugins=plugins)
    assert run(resolved).shape == (2, 1000)
    with pytest.raises(ResolveError, match=r"'resnet81'\. Did you mean 'resnet18'\?"):
        resolve_model("torchvision:resnet81", plugins=plugins)


def test_hf_model_type_and_config_file_give_the_same_model(plugins: Plugins, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    by_type = resolve_model("hf:resnet", options=options, sample_size=(1, 3, 32, 32), plugins=plugins)
    by_type.model.config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    for path in (tmp_path, tmp_path / "config.json"):
        by_path = resolve_model(f"hf:{path}", sample_size=(1, 3, 32, 32), plugins=plugins)
        assert isinstance(by_path.example_inputs, dict)
        assert list(by_path.example_inputs) == ["pixel_values"]
        by_path.model.load_state_dict(by_type.model.state_dict())
        torch.testing.assert_close(run(by_path), run(by_type), rtol=0, atol=0)


def test_hf_example_takes_the_config_s_image_size_and_channels(plugins: Plugins, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 1, "hidden_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    resolved = resolve_model(f"hf:{tmp_path}", plugins=plugins)
    assert isinstance(resolved.example_inputs, dict)
    assert resolved.example_inputs["pixel_values"].shape == (1, 1, 32, 32)
    assert run(resolved).shape == (1, 2)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)),
        ({"image_mean": [0.5] * 3, "image_std": [0.1] * 3, "do_normalize": False}, None, None),
        (None, None, None),
    ],
)
def test_hf_normalisation_is_that_of_the_processor_beside_the_config(
    plugins: Plugins, tmp_path: Path, processor: object, mean: object, std: object
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    resolved = resolve_model(f"hf:{tmp_path}", plugins=plugins)
    assert (resolved.mean, resolved.std) == (mean, std)


def test_hf_name_is_corrected_and_nothing_is_downloaded(plugins: Plugins) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ResolveError, match=r"Did you mean 'regnet'\?.*Nothing is downloaded"):
        resolve_model("hf:regnt", plugins=plugins)


def test_python_file_may_return_its_own_inputs(plugins: Plugins, tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\n"
        "def net(width=4):\n"
        "    return torch.nn.Linear(width, 2), (torch.ones(3, width),)\n"
        "def number():\n"
        "    return 1\n"
    )
    resolved = resolve_model(f"python:{source}:net", options={"width": 5}, plugins=plugins)
    assert isinstance(resolved.example_inputs, tuple)
    assert resolved.example_inputs[0].shape == (3, 5)
    with pytest.raises(ResolveError, match=r"has no function 'nett'\. Did you mean 'net'\?"):
        resolve_model(f"python:{source}:nett", plugins=plugins)
    with pytest.raises(ResolveError, match=r"must return a torch\.nn\.Module.*not int"):
        resolve_model(f"python:{source}:number", plugins=plugins)
    with pytest.raises(ResolveError, match=r"unexpected keyword argument 'depth'"):
        resolve_model(f"python:{source}:net", options={"depth": 5}, plugins=plugins)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet18",
            r"'resnet18' names no model\. Write SCHEME:NAME, with SCHEME one of: hf, onnx, python, timm, torchvision",
        ),
        ("tim:resnet18", r"Unknown model scheme 'tim'\. Did you mean 'timm'\?"),
        ("python:no_colon", r"python:module:function or python:path/file\.py:function"),
        ("python:no.such.module:f", r"Cannot import module 'no\.such\.module'"),
        ("python:no/such/file.py:f", r"No such file: no/such/file\.py"),
    ],
)
def test_wrong_name_says_what_to_write(plugins: Plugins, name: str, message: str) -> None:
    with pytest.raises(ResolveError, match=message):
        resolve_model(name, plugins=plugins)


def test_missing_package_names_the_extra(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ResolveError, match=r"timm is not installed\. .*pip install 'nncf-compactprune\[timm\]'"):
        resolve_model("timm:resnet18", plugins=plugins)


def test_sample_size_must_have_the_model_s_rank(plugins: Plugins) -> None:
    with pytest.raises(ResolveError, match=r"expected a sample size like 1x1x16x16 \(batch first\), got \[16, 16\]"):
        resolve_model(DIGITS_NET, sample_size=(16, 16), plugins=plugins)


def test_weights_come_back_as_saved(plugins: Plugins, tmp_path: Path) -> None:
    saved = resolve_model(DIGITS_NET, plugins=plugins)
    state = {k: v for k, v in saved.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    loaded = resolve_model(DIGITS_NET, weights=tmp_path / "w.safetensors", plugins=plugins)
    torch.testing.assert_close(run(loaded), run(saved), rtol=0, atol=0)


def test_tied_weights_are_found_under_either_name(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    source, target = tied(), tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    load_weights(target, tmp_path / "w.safetensors")
    x = torch.rand(2, 3)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


def test_weights_that_do_not_fit_leave_the_model_unchanged(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {
        "0.weight": torch.zeros(5, 3),
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(2, 4),
        "head": torch.ones(1),
    }
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(ResolveError) as caught:
        load_weights(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing: 1.bias;" in message
    assert "unexpected: head;" in message
    assert "of another shape: 0.weight (model [4, 3], file [5, 3])" in message
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_weights_file_must_exist_and_be_safetensors(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ResolveError, match="No such weights file"):
        load_weights(model, tmp_path / "none.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ResolveError, match=r"Pickled weights are not read"):
        load_weights(model, tmp_path / "w.pt")
