"""Criteria that look at samples: against the definition, computed sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.networks import STRUCTURES, images, trained

from nncf_compactprune import prune
from nncf_compactprune.channels import trace
from nncf_compactprune.decide.criteria import criterion_contexts
from nncf_compactprune.decide.criteria.by_samples import activation_norm, fisher
from nncf_compactprune.errors import DataError


def batches(dtype: torch.dtype = torch.float64, size: int = 4):
    x = torch.randn(9, 3, 12, 12, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return list(zip(x.split(size), (torch.arange(9) % 5).split(size), strict=True))


def scored(criterion, model, name, data=batches):
    graph = trace(model, images())
    return criterion(next(c for c in criterion_contexts(model, graph, data) if c.group.name == name))


def masked_changes(model, modules):
    """``∂L/∂m`` of one mask behind all these modules, ``[samples, channels]``, each sample alone."""
    found = []
    for x, y in batches(size=1):
        mask = torch.ones(modules[0].num_features, dtype=x.dtype, requires_grad=True)
        handles = [m.register_forward_hook(lambda _, args, out, mask=mask: out * mask.view(-1, 1, 1)) for m in modules]
        (change,) = torch.autograd.grad(F.cross_entropy(model(x), y), mask)
        found.append(change)
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def test_fisher_is_the_squared_gradient_of_one_mask_for_coupled_layers() -> None:
    model = trained("residual").eval()
    coupled = [model.features[0][1], model.features[1].bn2]
    expected = masked_changes(model, coupled).square().mean(0)
    torch.testing.assert_close(scored(fisher, model, "features.0.0"), expected.float())
    apart = sum(masked_changes(model, [one]).square().mean(0) for one in coupled)
    assert not torch.allclose(expected, apart)


def test_activation_norm_is_that_of_what_the_next_layer_reads() -> None:
    model = trained("plain").eval()
    seen = []
    handle = model.features[2][0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x, _ in batches():
            model(x)
    handle.remove()
    name = next(g.name for g in trace(model, images()).groups)
    expected = torch.cat(seen).flatten(2).norm(dim=2).mean(0)
    torch.testing.assert_close(scored(activation_norm, model, name, lambda: [(x, None) for x, _ in batches()]),
                               expected.float())  # fmt: skip


def test_channels_of_several_positions_add_up() -> None:
    model = trained("flatten").eval()
    name = trace(model, images()).groups[0].name
    graph = trace(model, images())
    (reader,) = graph.groups[0].with_role("consumer")
    assert reader.indices.shape[1] > 1
    seen = []
    module = model.get_submodule(reader.parameter.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for x, _ in batches():
        model(x)
    handle.remove()
    expected = torch.cat(seen)[:, torch.as_tensor(reader.indices)].norm(dim=2).mean(0)
    torch.testing.assert_close(scored(activation_norm, model, name), expected.float())


@pytest.mark.parametrize("criterion", [fisher, activation_norm])
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "transposed"])  # gives images, not classes
def test_every_structure_is_scored_and_left_alone(criterion, name) -> None:
    model = trained(name, dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = trace(model, images(torch.float32))
    scores = [criterion(c) for c in criterion_contexts(model, graph, lambda: batches(torch.float32))]
    assert [len(one) for one in scores] == [group.size for group in graph.groups]
    assert all(one.isfinite().all() and (one >= 0).all() for one in scores)
    assert any(one.max() > 0 for one in scores)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("importance", ["fisher", "activation_norm"])
def test_they_prune_and_ask_for_data(importance) -> None:
    kind = {"budget": {"macs": 0.5}, "importance": importance, "round_to": 1}
    x = images(torch.float32)
    result = prune(trained("residual", dtype=torch.float32), x, train_loader=batches(torch.float32), **kind)
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    with pytest.raises(DataError, match=r"samples, but there are none\. Give a train_loader"):
        prune(trained("residual", dtype=torch.float32), x, **kind)
