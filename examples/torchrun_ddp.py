"""DistributedDataParallel: several processes prune one network, in the same way, and get what one process would get.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py [--dense-epochs 4] [--epochs 6] [--output runs/ddp]
    python examples/torchrun_ddp.py                      # one process, the same batches

While pruning, BatchNorm keeps the statistics of the dense network: those of a batch would depend on how many processes
share it.
What the package adds says ctrl; the one line that DDP needs on top wraps the network again once it was cut.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

from nncf_compactprune import create_compressed_model, save_pruned
from nncf_compactprune.cut.surgery import plan_of
from nncf_compactprune.run.datasets import resolve_dataset
from nncf_compactprune.run.networks.digits_net import digits_net
from nncf_compactprune.run.training import evaluate, fit

GLOBAL_BATCH = 64
CONFIG = {
    "input_info": {"sample_size": [1, 1, 16, 16]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "num_init_steps": 1, "pruning_steps": 2},
    },
}


def freeze_batch_norm(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def main(dense_epochs: int = 4, epochs: int = 6, output: Path = Path("runs/ddp")) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    def wrapped(net: nn.Module) -> nn.Module:
        return DistributedDataParallel(net, device_ids=[device.index] if cuda else None) if world > 1 else net

    data = resolve_dataset("digits")
    sampler = DistributedSampler(data.train, world, rank, seed=0, drop_last=True)
    loader = data.train_loader(GLOBAL_BATCH // world, augment=False, sampler=sampler)
    torch.manual_seed(0)
    net = digits_net().to(device)
    if rank == 0:
        sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        fit(net, data.train_loader(GLOBAL_BATCH), sgd, epochs=dense_epochs)
    if world > 1:
        for tensor in net.state_dict().values():
            dist.broadcast(tensor, 0)  # all must start from the same weights

    ctrl, net = create_compressed_model(net, CONFIG)
    model = wrapped(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        before = plan_of(net)
        ctrl.scheduler.epoch_step()
        if plan_of(net) is not before:
            model = wrapped(net)  # the old wrapper's buckets have the old shapes
        model.train()
        freeze_batch_norm(net)
        for images, labels in loader:
            ctrl.scheduler.step()
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device)) + ctrl.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: {ctrl.compression_rate:.0%} of the MACs removed, loss {loss:.4f}")

    ctrl.strip()
    if rank == 0:
        save_pruned(net, output)
        files = ctrl.export_model(output / "model.onnx")
        print(f"accuracy {evaluate(net, data.test_loader(64)):.1%}, {files[0].path}: {files[0].bytes:,} bytes")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
