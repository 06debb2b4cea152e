"""``recovery``: the entry that needs no tuning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nncf.common.logging import nncf_logger
from support.networks import images, labelled_batches, model32
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.algorithms.overparameterization.expandable import last_of_each_resolution
from nncf_compactprune.host.nncf_hooks import hooks
from nncf_compactprune.host.nncf_quantization import is_quantizer, not_compiled
from nncf_compactprune.host.nncf_sparsity import is_mask
from nncf_compactprune.run.networks.cifar_resnet import resnet20
from nncf_compactprune.run.networks.mobilenet_v1 import mobilenet_v1

INPUT = {"sample_size": [2, 3, 12, 12]}
PRUNING = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"schedule": "one_shot"}}


def config(*entries):
    return {"input_info": INPUT, "compression": list(entries)}


def test_behind_a_pruning_entry_it_teaches_advises_and_leaves_nothing(monkeypatch) -> None:
    model, said = model32(), []
    monkeypatch.setattr(nncf_logger, "info", said.append)
    ctrl, _ = create_compressed_model(model, config(PRUNING, {"algorithm": "recovery"}))
    assert "a learning rate of 0.015 for batches of 128" in said[-1]
    plain = copy.deepcopy(model)
    keys = list(plain.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    ctrl.attach(optimizer=optimizer)
    train(model, ctrl, optimizer, labelled_batches())
    figures = ctrl.statistics().algorithms["recovery"]
    assert "layers expanded" not in figures
    assert "similarity loss" in figures
    compact = ctrl.strip()
    assert list(compact.state_dict()) == keys
    assert float(ctrl.loss()) == 0


@pytest.mark.parametrize("form", ["none", "orthogonal"])
def test_quantizers_train_under_the_teacher(form: str) -> None:
    entries = PRUNING, {"algorithm": "recovery", "params": {"form": form}}, {"algorithm": "quantization"}
    loader = labelled_batches()
    model, dense = model32(), model32()
    with not_compiled():  # compiling NNCF's extension takes longer than all of these tests
        _taught_while_quantized(model, dense, entries, loader)


def _taught_while_quantized(model, dense, entries, loader) -> None:
    ctrl, _ = create_compressed_model(model, config(*entries), loader)
    assert sum(is_quantizer(hook.module) for hook in hooks(model)) > 10
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    ctrl.attach(optimizer=optimizer)
    ranges = {name: p.clone() for name, p in model.named_parameters() if "scale" in name or "range" in name}
    assert ranges
    train(model, ctrl, optimizer, loader)
    assert any(not torch.equal(p, ranges[name]) for name, p in model.named_parameters() if name in ranges)
    state, weights = ctrl.get_compression_state(), copy.deepcopy(model.state_dict())
    again, resumed = create_compressed_model(dense, config(*entries), loader, compression_state=state)
    resumed.load_state_dict(weights)
    x = loader[0][0]
    assert torch.equal(resumed.eval()(x), model.eval()(x))
    expected = model(x)
    compact = ctrl.strip()
    assert (compact(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert not any(is_quantizer(hook.module) for hook in hooks(compact))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in compact.modules())
    again.strip()


def test_masks_train_under_the_teacher() -> None:
    model, sparsity = model32(), {"algorithm": "magnitude_sparsity", "params": {"schedule": "multistep"}}
    ctrl, _ = create_compressed_model(model, config(PRUNING, {"algorithm": "recovery"}, sparsity))
    assert any(is_mask(hook.module) for hook in hooks(model))
    ctrl.strip()


def test_what_changes_shapes_waits_for_the_end_of_recovery() -> None:
    model = model32()
    width = sum(p.numel() for p in model.parameters())
    ctrl, _ = create_compressed_model(model, config({"algorithm": "recovery"}, PRUNING))
    assert sum(p.numel() for p in model.parameters()) == width
    assert sum(p.numel() for p in ctrl.strip().parameters()) < width


def train(model, ctrl, optimizer, batches) -> None:
    """An epoch; the teacher has something to say at every step."""
    ctrl.scheduler.epoch_step()
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        task = F.cross_entropy(model(x), y)
        lesson = ctrl.loss()
        assert lesson.item() > 0
        (task + lesson).backward()
        optimizer.step()


def test_the_weight_of_similarities_follows_the_batch_size() -> None:
    """The mean of squared differences falls as 1 / b where batches hold the same kinds of pairs: here, copies."""
    model = model32()
    ctrl, _ = create_compressed_model(model, config(PRUNING, {"algorithm": "recovery"}))
    x, _ = labelled_batches()[0]
    model.train()
    losses = []
    for batch in (x, torch.cat([x, x])):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        model(batch)
        losses.append(ctrl.loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_weight_of_similarities_is_that_of_each_layer() -> None:
    x, _ = labelled_batches()[0]
    found = {}
    for name, weight in (("recovery", 1600.0), ("linear_overparameterization", 1600.0 * len(x) / 128)):
        model = model32()
        distillation = {"layers": "all", "similarity_weight": weight, "teacher_precision": "same"}
        entry = {"algorithm": name, "params": {"form": "none"}, "distillation": distillation}
        ctrl, _ = create_compressed_model(model, config(PRUNING, entry))
        model.train()
        model(x)
        found[name] = ctrl.loss().item()
    layers = sum(isinstance(module, nn.Conv2d) for module in model32().modules())
    assert found["recovery"] == pytest.approx(layers * found["linear_overparameterization"], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "size", "ends"),
    [
        (resnet20, 32, ["layer1.2.conv2", "layer2.2.conv2", "layer3.2.conv2"]),
        (mobilenet_v1, 64, ["conv_pw_1", "conv_pw_3", "conv_pw_5", "conv_pw_11", "conv_pw_13"]),
    ],
)
def test_stages_end_where_the_resolution_changes(model, size, ends) -> None:
    network = model()
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    names = [name for name in names if name != "conv_preds"]
    assert last_of_each_resolution(network, torch.zeros(1, 3, size, size), names) == ends


def test_class_scores_of_a_part_of_the_classes_are_compared_with_the_teachers_of_the_same_classes() -> None:
    model, x = model32(), images(torch.float32)
    dense = copy.deepcopy(model).eval()
    classes = dense(x).shape[1]
    kept = [0, classes - 1]
    loader = [(torch.cat([x, x, x]), torch.arange(3 * len(x)) % classes)]
    catro = {
        "algorithm": "catro", "budget": {"macs": 0.9},
        "params": {"schedule": "one_shot", "classes": kept, "round_to": 1},
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
    }  # fmt: skip
    distillation = {"similarity_weight": 0.0, "logits_weight": 1.0, "teacher_precision": "same"}
    entry = {"algorithm": "recovery", "distillation": distillation}
    ctrl, _ = create_compressed_model(model, config(catro, entry), loader)
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    scores = model(x)
    expected = F.kl_div(
        F.log_softmax(scores / 4, 1), F.log_softmax(dense(x)[:, kept] / 4, 1), reduction="batchmean", log_target=True
    )
    assert ctrl.loss().item() == pytest.approx(16 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("algorithm", ["recovery", "linear_overparameterization"])
def test_layers_in_front_of_activations_in_place_teach_like_any_other(algorithm: str) -> None:
    """As in VGG, AlexNet and SqueezeNet: convolutions without a normalisation behind them."""
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace)]
        layers += [nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace), nn.Flatten(), nn.Linear(288, 4)]
        model = nn.Sequential(nn.Sequential(*layers))
        entry = {"algorithm": algorithm, "distillation": {"layers": "all"}}
        ctrl, _ = create_compressed_model(model, config(PRUNING, entry))
        model(labelled_batches()[0][0])
        ctrl.loss().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
