"""What the package relies on in transformers and accelerate."""

from __future__ import annotations

import pytest
import torch
from support.networks import images, trained

pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from nncf_compactprune.host.huggingface import image_classifiers, restore_forward, tied  # noqa: E402
from nncf_compactprune.host.nncf_hooks import hook_parameter, hooks, remove_hooks  # noqa: E402


def test_image_classifiers_are_named_by_type() -> None:
    assert image_classifiers()["resnet"] == "ResNetForImageClassification"


def test_weights_are_tied_for_a_while() -> None:
    import transformers
    from transformers.initialization import no_tie_weights

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with no_tie_weights():  # as within from_pretrained
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=9, **sizes))
    tie = type(model).tie_weights

    def ends() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return model.get_input_embeddings().weight, model.get_output_embeddings().weight

    assert ends()[0] is not ends()[1]
    with tied(model, tie):
        assert ends()[0] is ends()[1]
    assert ends()[0] is not ends()[1]


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
