"""``knowledge_distillation``: NNCF 2.x's two losses, from the dense network as it came."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, labelled_batches, plain
from torch import nn

from nncf_compactprune import create_compressed_model
from nncf_compactprune.errors import ConfigError, DistillationError
from nncf_compactprune.integrations import nncf2

X = images(torch.float32)


def compressed(model=None, state=None, teacher=None, **keys):
    config = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": {"algorithm": "knowledge_distillation", **keys},
    }
    return create_compressed_model(model or plain(), config, None, state, example_inputs=X, teacher=teacher)


def moved(model):
    with torch.no_grad():
        model.head.weight.add_(torch.randn(model.head.weight.shape))
    return model.train()


def test_softmax_is_the_soft_cross_entropy_times_the_square_of_the_temperature():
    ctrl, model = compressed(type="softmax", scale=3, temperature=4)
    teacher = copy.deepcopy(model).eval()
    student = moved(model)(X)
    soft = F.softmax(teacher(X) / 4, dim=1)
    expected = -(soft * F.log_softmax(student / 4, dim=1)).sum(1).mean() * 16 * 3
    torch.testing.assert_close(ctrl.loss(), expected)


def test_a_network_is_exported_right_after_a_training_step(tmp_path):
    """The outputs of that step are autograd's, which has no copies."""
    pytest.importorskip("onnx")
    config = {
        "input_info": {"sample_size": [2, 3, 12, 12]},
        "compression": [
            {"algorithm": "filter_pruning", "params": {"pruning_target": 0.5, "all_weights": True}},
            {"algorithm": "knowledge_distillation", "type": "softmax"},
        ],
    }
    ctrl, model = nncf2.create_compressed_model(plain(), config, dump_graphs=False)
    ctrl.scheduler.epoch_step()
    model.train()(X)
    before = ctrl.loss()
    small = ctrl.strip()
    ctrl.export_model(tmp_path / "small.onnx")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not small._forward_pre_hooks
    assert torch.equal(ctrl.loss(), before)  # training goes on


def test_mse_compares_every_output_that_training_moves():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()
            self.head = self.net.head

        def forward(self, x):
            y = self.net(x)
            return {"a": y, "b": [y.unsqueeze(-1) * 2, y.detach(), y.sum(1)]}

    ctrl, model = compressed(TwoHeads(), type="mse", scale=0.5)
    teacher = copy.deepcopy(model).eval()
    student, taught = moved(model)(X), teacher(X)
    expected = F.mse_loss(student["a"], taught["a"]) + F.mse_loss(student["b"][0], taught["b"][0])
    torch.testing.assert_close(ctrl.loss(), 0.5 * expected)


def test_it_trains_towards_the_teacher():
    ctrl, model = compressed(type="mse")
    moved(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        for inputs, _ in labelled_batches():
            model(inputs)
            loss = ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_no_loss_in_eval_mode_and_no_hooks_after_strip():
    ctrl, model = compressed(type="mse")
    model.eval()(X)
    assert ctrl.loss() == 0
    ctrl.strip()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_output_of_another_shape_is_told_once(caplog):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    ctrl, model = compressed(Maps(), type="softmax")
    for _ in range(2):
        model.train()(X)
        assert ctrl.loss() == 0
    assert caplog.text.count('no output has the shape that "softmax" compares, got [2, 4, 10, 10]') == 1


def test_a_teacher_can_be_given_and_is_remembered():
    teacher = plain()
    ctrl, _ = compressed(teacher=teacher, type="mse")
    state = json.loads(json.dumps(ctrl.get_compression_state()))
    compressed(state=state, teacher=copy.deepcopy(teacher), type="mse")
    torch.manual_seed(5)
    with pytest.raises(DistillationError, match="the teacher differs"):
        compressed(state=state, teacher=plain(), type="mse")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, 'type: missing. Expected one of "softmax", "mse"'),
        ({"type": "kl"}, 'type: expected one of "softmax", "mse", got "kl"'),
        ({"type": "mse", "temperature": 2}, "'temperature' belongs to"),
        ({"type": "mse", "ignored_scopes": ["head"]}, "it compares the outputs of the whole network"),
        ({"type": "mse", "is_softmax": True}, 'is_softmax: given twice, here and as "type"'),
    ],
)
def test_mistakes(keys, message):
    with pytest.raises(ConfigError) as caught:
        compressed(**keys)
    assert message in str(caught.value)
