"""Group-sparsity regularisation: against its formula, and what it does to the channels that go."""

from __future__ import annotations

import pytest
import torch
from support.networks import images, trained

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.algorithms.group_sparsity import GroupSparsity
from nncf_compactprune.channels import trace
from nncf_compactprune.errors import ConfigError


def test_it_is_the_sum_over_coupled_slices() -> None:
    model = trained("plain")
    graph = trace(model, images())
    group = graph.groups[0]
    assert group.name == "features.0.0"
    conv, norm, after = model.features[0][0], model.features[0][1], model.features[2][0]
    with torch.no_grad():
        squares = conv.weight.flatten(1).square().sum(1) + after.weight.square().sum((0, 2, 3))
        squares += norm.weight.square() + norm.bias.square()
        if conv.bias is not None:
            squares += conv.bias.square()
        factors = 2 ** (4 * (squares.max() - squares) / (squares.max() - squares.min()))
    only = GroupSparsity(model, graph, [one is group for one in graph.groups])
    value = only()
    torch.testing.assert_close(value, (factors * squares).sum())
    assert (factors.min(), factors.max()) == (1, 16)
    (gradient,) = torch.autograd.grad(value, after.weight)
    torch.testing.assert_close(gradient, 2 * factors.view(1, -1, 1, 1) * after.weight)


def config(**params):
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "params": {"round_to": 1, **params}}
    return {"input_info": {"sample_size": [2, 3, 12, 12]}, "compression": entry}


def norms_of_channels_that_go(**params):
    """The share of the weights' squares that the cut takes away, after a few steps on the loss of the controller."""
    model = trained("residual", dtype=torch.float32)
    ctrl, model = create_compressed_model(model, config(pruning_steps=3, **params))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    ctrl.scheduler.epoch_step()
    graph = trace(trained("residual", dtype=torch.float32), images(torch.float32))
    for _ in range(20):
        loss = ctrl.loss()
        if not isinstance(loss, torch.Tensor):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = dict(model.named_parameters())[graph.groups[0].members[0].parameter]
    squares = weight.detach().flatten(1).square().sum(1).sort().values
    ctrl.strip()
    assert ctrl.loss() == 0.0
    return float(squares[: len(squares) // 2].sum() / squares.sum())


def test_the_least_channels_shrink_most() -> None:
    assert norms_of_channels_that_go(group_sparsity=0.05) < 0.7 * norms_of_channels_that_go()


def test_it_follows_a_network_that_shrinks() -> None:
    model = trained("residual", dtype=torch.float32)
    settings = config(schedule="polynomial", pruning_steps=3, shrink_every=1, group_sparsity=0.01)
    ctrl, model = create_compressed_model(model, settings)
    ctrl.attach(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    values = []
    for _ in range(4):
        ctrl.scheduler.epoch_step()
        values.append(float(torch.as_tensor(ctrl.loss()).detach()))
    assert values[0] > values[1] > values[2] > values[3] == 0


def test_without_training_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"group_sparsity: acts while the network trains"):
        create_compressed_model(trained("plain"), config(schedule="one_shot", group_sparsity=0.1))
    with pytest.raises(ConfigError, match=r"group_sparsity"):
        prune(trained("plain"), images(), budget={"macs": 0.5}, group_sparsity=0.1)
