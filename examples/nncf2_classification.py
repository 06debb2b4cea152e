"""A classification script as NNCF 2.x's users have them, on scikit-learn's digits. On NNCF 2.19 it runs as it is but
for the import: config file, training loop or accuracy-aware training, checkpoint, resuming, export.

    python examples/nncf2_classification.py --config configs/nncf2_digits_filter_pruning.json --log-dir runs/nncf2
    python examples/nncf2_classification.py --config configs/nncf2_digits_filter_pruning.json --log-dir runs/nncf2 \
        --resume runs/nncf2/last.pth
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from nncf_compactprune.integrations.nncf2 import (
    NNCFConfig,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    load_state,
    register_default_init_args,
)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(Block(16, 32, 1), Block(32, 48, 2), Block(48, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


def create_loaders(batch_size=64):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    data = TensorDataset(images / 8 - 1, torch.tensor(digits.target))
    train, val = (TensorDataset(*data[slice(*part)]) for part in ((0, 1200), (1200, None)))
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(val, batch_size)


def configure_optimizers(model, epochs, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return optimizer, CosineAnnealingLR(optimizer, epochs)


def train_epoch(compression_ctrl, model, epoch, optimizer, lr_scheduler, train_loader, criterion):
    model.train()
    total = 0.0
    for images, target in train_loader:
        compression_ctrl.scheduler.step()
        loss = criterion(model(images), target) + compression_ctrl.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(train_loader)


@torch.no_grad()
def validate(model, val_loader, epoch=None):
    model.eval()
    correct = sum(int((model(images).argmax(1) == target).sum()) for images, target in val_loader)
    return 100.0 * correct / len(val_loader.dataset)


def pretrain(model, train_loader, criterion, epochs):
    optimizer, lr_scheduler = configure_optimizers(model, epochs)
    for _ in range(epochs):
        model.train()
        for images, target in train_loader:
            optimizer.zero_grad()
            criterion(model(images), target).backward()
            optimizer.step()
        lr_scheduler.step()


def train(args, config, model, compression_ctrl, resuming_checkpoint, train_loader, val_loader, criterion):
    optimizer, lr_scheduler = configure_optimizers(model, config["epochs"])
    start_epoch, best_accuracy, best_stage = 0, 0.0, compression_ctrl.compression_stage()
    if resuming_checkpoint is not None:
        start_epoch, best_accuracy = resuming_checkpoint["epoch"], resuming_checkpoint["best_accuracy"]
        optimizer.load_state_dict(resuming_checkpoint["optimizer"])
        lr_scheduler.load_state_dict(resuming_checkpoint["lr_scheduler"])
    for epoch in range(start_epoch, config["epochs"]):
        compression_ctrl.scheduler.epoch_step()
        loss = train_epoch(compression_ctrl, model, epoch, optimizer, lr_scheduler, train_loader, criterion)
        lr_scheduler.step()
        accuracy, stage = validate(model, val_loader), compression_ctrl.compression_stage()
        rate = compression_ctrl.compression_rate
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.2f}, rate {rate:.3f}, {stage.name.lower()}")
        is_best = stage > best_stage or (stage == best_stage and accuracy > best_accuracy)
        best_accuracy = accuracy if is_best else best_accuracy
        best_stage = max(stage, best_stage)
        checkpoint = {
            "epoch": epoch + 1,
            "state_dict": model.state_dict(),
            "compression_state": compression_ctrl.get_compression_state(),
            "best_accuracy": best_accuracy,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
        }
        torch.save(checkpoint, args.log_dir / "last.pth")
        if is_best:
            torch.save(checkpoint, args.log_dir / "best.pth")
    print(compression_ctrl.statistics().to_str())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/nncf2"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int)
    args = parser.parse_args()
    args.log_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    config = NNCFConfig.from_json(str(args.config))
    config.update({"log_dir": str(args.log_dir)})
    if args.epochs is not None:
        config["epochs"] = args.epochs
    train_loader, val_loader = create_loaders()
    criterion = nn.CrossEntropyLoss()
    model = SmallResNet()

    resuming_checkpoint = None
    if args.resume is not None:
        resuming_checkpoint = torch.load(args.resume, weights_only=False)
    else:
        pretrain(model, train_loader, criterion, args.pretrain_epochs)
    uncompressed_accuracy = validate(model, val_loader)
    print(f"uncompressed: accuracy {uncompressed_accuracy:.2f}")

    config = register_default_init_args(config, train_loader, criterion=criterion, device="cpu")
    compression_state = None if resuming_checkpoint is None else resuming_checkpoint["compression_state"]
    compression_ctrl, model = create_compressed_model(model, config, compression_state, dump_graphs=False)
    if resuming_checkpoint is not None:
        load_state(model, resuming_checkpoint["state_dict"], is_resume=True)

    if config.get("accuracy_aware_training") is None:
        train(args, config, model, compression_ctrl, resuming_checkpoint, train_loader, val_loader, criterion)
    else:
        loop = create_accuracy_aware_training_loop(config, compression_ctrl, uncompressed_accuracy, verbose=False)
        model = loop.run(
            model,
            train_epoch_fn=partial(train_epoch, train_loader=train_loader, criterion=criterion),
            validate_fn=partial(validate, val_loader=val_loader),
            configure_optimizers_fn=partial(configure_optimizers, model, 5),
            log_dir=str(args.log_dir),
        )
        print(loop.statistics.to_str())

    print(f"compressed: accuracy {validate(model, val_loader):.2f}")
    compression_ctrl.export_model(str(args.log_dir / "model.onnx"))
    print(f"exported: {(args.log_dir / 'model.onnx').stat().st_size} bytes")


if __name__ == "__main__":
    main()
