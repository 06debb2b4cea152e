"""NNCF 3's own tools on models of this package."""

from __future__ import annotations

import nncf
import nncf.torch
import pytest
import torch
from support.networks import images, model32

from nncf_compactprune import create_compressed_model, prune
from nncf_compactprune.errors import TraceError
from nncf_compactprune.host.nncf_quantization import not_compiled

SOFT = {
    "input_info": {"sample_size": [2, 3, 12, 12]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "pruning_steps": 1, "round_to": 1},
    },
}


def inputs() -> torch.Tensor:
    return images(torch.float32)


def test_a_quantized_model_is_refused_with_the_reason() -> None:
    with not_compiled():
        model = nncf.quantize(model32(), nncf.Dataset([inputs()]), subset_size=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TraceError, match=r"quantized by NNCF.*: prune first, then quantize the pruned model"):
        prune(model, inputs(), budget={"macs": 0.5})
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_pruned_model_is_quantized_by_nncf() -> None:
    model = model32()
    result = prune(model, inputs(), budget={"macs": 0.5}, round_to=1)
    with not_compiled():
        quantized = nncf.quantize(model, nncf.Dataset([inputs()]), subset_size=1)
        assert quantized(inputs()).shape == (2, 5)
    assert result.plan.after.params == sum(p.numel() for p in model.parameters())


def test_masks_are_stored_and_rebuilt_by_nncf() -> None:
    ctrl, model = create_compressed_model(model32(), SOFT)
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    masked = model(inputs())
    again = nncf.torch.load_from_config(
        model32(), nncf.torch.get_config(model), allowed_modules=("nncf.*", "nncf_compactprune.*")
    )
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(inputs()), masked)
    small = ctrl.strip()
    assert torch.allclose(small(inputs()), masked, rtol=1e-4, atol=1e-5)
    assert "__nncf_hooks" not in small._modules


def test_pruning_statistic_counts_what_nncf_pruned() -> None:
    model = model32()
    prune(model, inputs(), budget={"macs": 0.5}, round_to=1)
    sparse = nncf.prune(model, mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.5, examples_inputs=inputs())
    assert nncf.pruning_statistic(sparse).pruning_ratio == pytest.approx(0.5, abs=0.05)
