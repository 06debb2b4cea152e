"""The Taylor criterion: against the definition, with real labels only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.networks import images, trained
from torch import nn

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.criteria import context as context_module
from nncf_compactprune.decide.criteria import criterion_contexts, mean_gradients
from nncf_compactprune.decide.criteria.taylor import taylor
from nncf_compactprune.errors import DataError
from nncf_compactprune.host.tensors import model_tensors


def batches(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 3, 12, 12, generator=generator, dtype=dtype)
    return list(zip(x.split(4), (torch.arange(9) % 5).split(4), strict=True))


def test_it_is_the_squared_change_through_the_gates() -> None:
    model = trained("plain")
    graph = trace(model, images())
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    norm = model.features[2][1]
    loss = F.cross_entropy(model(x), y)
    weight, bias = torch.autograd.grad(loss, [norm.weight, norm.bias])
    expected = (norm.weight * weight + norm.bias * bias).square()
    (context,) = (c for c in criterion_contexts(model, graph, batches) if c.group.name == "features.2.0")
    got = taylor(context)
    torch.testing.assert_close(got, expected.float())


def test_without_a_norm_it_is_that_of_the_filters() -> None:
    model = trained("flatten")
    graph = trace(model, images())
    (context,) = (c for c in criterion_contexts(model, graph, batches) if c.group.name == "hidden")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    weight, bias = torch.autograd.grad(F.cross_entropy(model(x), y), [model.hidden.weight, model.hidden.bias])
    expected = (model.hidden.weight * weight).sum(1).square() + (model.hidden.bias * bias).square()
    torch.testing.assert_close(taylor(context), expected.float())


def test_the_model_is_left_alone() -> None:
    model = trained("residual").train()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    gradients = mean_gradients(model, batches())
    assert gradients["head.weight"].abs().sum() > 0
    assert not model.head.weight.requires_grad
    assert model.head.bias.grad.eq(1).all()
    assert all(p.grad is None for n, p in model_tensors(model).parameters.items() if n != "head.bias")
    assert model.training


def test_it_prunes_and_asks_for_labels() -> None:
    model, x = trained("residual", dtype=torch.float32), images(torch.float32)
    kind = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}, "importance": "taylor", "round_to": 1}
    result = prune(model, x, train_loader=batches(torch.float32), **kind)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    with pytest.raises(DataError, match=r"needs gradients of labelled samples.*Give a train_loader"):
        prune(trained("residual", dtype=torch.float32), x, **kind)
    with pytest.raises(DataError, match="hold no labels"):
        prune(trained("residual", dtype=torch.float32), x, train_loader=[b for b, _ in batches(torch.float32)], **kind)


def test_gradients_are_computed_once_for_all_groups_and_only_on_request() -> None:
    model = trained("residual")
    graph, calls = trace(model, images()), []

    def counted():
        calls.append(1)
        return batches()

    contexts = list(criterion_contexts(model, graph, counted))
    assert not calls
    first, *_, last = [context.gradients() for context in contexts]
    assert first is last
    assert len(calls) == 1
    assert len(list(contexts[0].batches())) == 3


def test_gradients_are_the_mean_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("residual")
    own = mean_gradients(model, batches()[:2])
    other = mean_gradients(model, batches()[2:])
    monkeypatch.setattr(  # the other process has the last sample
        context_module,
        "summed",
        lambda values: [values[0] + 1, *(v + other[n] for n, v in zip(own, values[1:], strict=True))],
    )
    together = mean_gradients(model, batches()[:2])
    monkeypatch.undo()
    for name, gradient in mean_gradients(model, batches()).items():
        torch.testing.assert_close(together[name], gradient)


class Doubles(nn.Module):
    """Writes into a buffer that its gradients are computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 5)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.mul_(2)
        return self.head(self.layer(x) * self.scale)


def test_gradients_belong_to_what_the_forward_pass_wrote() -> None:
    torch.manual_seed(0)
    model, x, y = Doubles(), torch.randn(6, 3), torch.arange(6) % 5
    gradients = mean_gradients(model, [(x, y)])
    assert model.scale.eq(1).all()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.layer.weight])
    torch.testing.assert_close(gradients["layer.weight"], expected)
