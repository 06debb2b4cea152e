"""Small Hugging Face models and a Trainer around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LABELS = {"num_labels": 10, "num_channels": 1, "image_size": 16, "id2label": {n: f"digit {n}" for n in range(10)}}


def resnet() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **LABELS))


def mobilenet() -> Any:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, **{**LABELS, "image_size": 32})
    return transformers.MobileNetV2ForImageClassification(config)


def convnext() -> Any:
    config = transformers.ConvNextConfig(patch_size=2, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **LABELS)
    return transformers.ConvNextForImageClassification(config)


def vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.ViTForImageClassification(transformers.ViTConfig(patch_size=4, **sizes, **LABELS))


def vary(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and scales at random: a check on fresh ones would overlook most mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def document(schedule: str = "exponential", **params: Any) -> dict[str, Any]:
    entry = {"algorithm": "fbnet_pruning", "budget": {"macs": 0.5}}
    return {"compression": {**entry, "params": {"schedule": schedule, "round_to": 1, "pruning_steps": 2, **params}}}


def arguments(folder: Path, **options: Any) -> Any:
    common = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-2}
    common |= {"per_device_train_batch_size": 16, "num_train_epochs": 4, "logging_steps": 1, "save_strategy": "no"}
    return transformers.TrainingArguments(str(folder), **(common | options))


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(model: Any, callback: Any, examples: Any, folder: Path, *others: Any, **options: Any) -> Any:
    return transformers.Trainer(
        model,
        arguments(folder, **options),
        train_dataset=examples[:64],
        eval_dataset=examples[64:],
        compute_metrics=accuracy,
        callbacks=[callback, *others],
        compute_loss_func=callback.compute_loss,
    )


class Watch(transformers.TrainerCallback):
    """Sizes at the end of every epoch; ends the process in its way when told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.sizes: list[int] = []
        self.stop_after = stop_after

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sizes.append(sum(p.numel() for n, p in model.named_parameters() if "nncf" not in n))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt
