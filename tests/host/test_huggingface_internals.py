"""What the package relies on in transformers and accelerate."""

from __future__ import annotations

import pytest
import torch
from support.networks import images, trained

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from nncf_compactprune.host.huggingface import image_classifiers, restore_forward  # noqa: E402
from nncf_compactprune.host.nncf_hooks import hook_parameter, hooks, remove_hooks  # noqa: E402


def test_image_classifiers_are_named_by_type() -> None:
    assert image_classifiers()["resnet"] == "ResNetForImageClassification"


@pytest.mark.parametrize("hooked", [False, True])
def test_accelerates_mixed_precision_comes_off(hooked: bool) -> None:
    model, x = trained("plain", dtype=torch.float32), images(torch.float32)
    expected = model(x)
    if hooked:
        hook_parameter(model, "features.0.0.weight", torch.nn.Identity())
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert not torch.equal(model(x), expected), "mixed precision changes nothing here"
    for hook in hooks(model):
        remove_hooks(model, lambda other, own=hook.module: other is own)
    restore_forward(model)
    assert "forward" not in vars(model)
    assert torch.equal(model(x), expected)
