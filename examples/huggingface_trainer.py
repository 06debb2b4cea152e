"""Hugging Face's Trainer on scikit-learn's digits: a ResNet shrinks while it trains, is saved, and comes back.

    python examples/huggingface_trainer.py [--epochs 8] [--output runs/huggingface]

A run that was killed goes on from its last whole checkpoint when it is started again. The lines that are not in every
Trainer script are those that say compression.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from nncf_compactprune import export_model
from nncf_compactprune.integrations.huggingface import CompressionCallback, last_checkpoint
from nncf_compactprune.integrations.pretrained import load_pruned_hf
from nncf_compactprune.run.datasets import ResolvedDataset, resolve_dataset

COMPRESSION = {
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "num_init_steps": 3, "pruning_steps": 2},
    }
}


class Images(Dataset[dict[str, torch.Tensor]]):
    """Digits as Hugging Face models take them."""

    def __init__(self, images: Dataset[Any], data: ResolvedDataset) -> None:
        self.images, self.mean, self.std = images, data.mean[0], data.std[0]

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.images[index]
        return {"pixel_values": (image - self.mean) / self.std, "labels": label}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main(epochs: int = 8, output: Path = Path("runs/huggingface")) -> None:
    data = resolve_dataset("digits")
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            image_size=16,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[2, 2],
            layer_type="basic",
            num_labels=10,
        )
    )
    args = TrainingArguments(
        str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=200,
        learning_rate=2e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    last = last_checkpoint(args.output_dir)
    compression = CompressionCallback(model, COMPRESSION, resume_from_checkpoint=last)
    trainer = Trainer(
        model,
        args,
        train_dataset=Images(data.train, data),
        eval_dataset=Images(data.test, data),
        compute_metrics=accuracy,
        callbacks=[compression],
        compute_loss_func=compression.compute_loss,
    )
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()

    print(compression.controller.statistics().to_str())
    again = load_pruned_hf(args.output_dir)  # dense network from the config, cut to the plan, filled
    trainer.model.eval()
    images = torch.stack([trainer.eval_dataset[n]["pixel_values"] for n in range(8)])
    assert torch.equal(trainer.model(images).logits, again(images).logits)
    file = export_model(again, {"pixel_values": images}, output / "model.onnx")[0]
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.1%}, {file.path}: {file.bytes:,} bytes")


if __name__ == "__main__":
    typer.run(main)
