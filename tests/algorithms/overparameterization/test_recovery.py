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

INPUT = {"sample_size": [2, 3, 12, 12]}
PRUNING = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"schedule": "one_shot"}}


def config(*entries):
    return {"input_info": INPUT, "compression": list(entries)}


def test_behind_a_pruning_entry_it_teaches_advises_and_leaves_nothing(monkeypatch) -> None:
    model, said = model32(), []
    monkeypatch.setattr(nncf_logger, "info", said.append)
    ctrl, _ = create_compressed_model(model, config(PRUNING, {"algorithm": "recovery"}))
    assert "a learning rate of 0.03 for batches of 128" in said[-1]
    plain = copy.deepcopy(model)
    keys = list(plain.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    ctrl.attach(optimizer=optimizer)
    ctrl.scheduler.epoch_step()
    model.train()
    for x, y in labelled_batches():
        optimizer.zero_grad()
        task = F.cross_entropy(model(x), y)
        lesson = ctrl.loss()
        assert lesson.item() > 0
        (task + lesson).backward()
        optimizer.step()
    figures = ctrl.statistics().algorithms["recovery"]
    assert figures["layers expanded"].startswith("0 of")
    assert "similarity loss" in figures
    compact = ctrl.strip()
    assert list(compact.state_dict()) == keys
    assert float(ctrl.loss()) == 0


def test_the_weight_of_similarities_follows_the_batch_size() -> None:
    """The mean of squared differences falls as 1 / b where batches hold the same kinds of pairs: here, copies."""
    model = model32()
    ctrl, _ = create_compressed_model(
        model, config(PRUNING, {"algorithm": "recovery", "distillation": {"layers_per_step": None}})
    )
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


def test_all_layers_have_their_turn_and_the_mean_over_turns_is_the_whole() -> None:
    x, _ = labelled_batches()[0]

    def losses(layers_per_step, steps):
        model = model32()
        entry = {"algorithm": "recovery", "distillation": {"layers_per_step": layers_per_step}}
        ctrl, _ = create_compressed_model(model, config(PRUNING, entry))
        model.train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
        found = []
        for _ in range(steps):
            model(x)
            found.append(ctrl.loss().item())
        return found

    (whole,) = losses(None, 1)
    layers = sum(isinstance(module, nn.Conv2d) for module in model32().modules())
    single = losses(1, 2 * layers)
    assert sum(single[:layers]) / layers == pytest.approx(whole, rel=1e-4)
    assert single[:layers] == pytest.approx(single[layers:])
    assert len(set(single)) > 1


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
    entry = {"algorithm": "recovery", "distillation": {"similarity_weight": 0.0, "logits_weight": 1.0}}
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
