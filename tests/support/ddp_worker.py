"""Run by torchrun in test_distributed.py: the DDP example on a few digits, then what ranks do when they differ."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 - lets torchvision import
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from nncf_compactprune import create_compressed_model, plan_of, prune
from nncf_compactprune.algorithms.batch_norm import pool_over_ranks
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.host.distributed import averaged, require_agreement, summed
from nncf_compactprune.run import datasets
from support.networks import images, trained
from support.places import EXAMPLES

EXAMPLE = EXAMPLES / "torchrun_ddp.py"
CONFIG = {
    "input_info": {"sample_size": [2, 3, 12, 12]},
    "compression": {
        "algorithm": "fbnet_pruning",
        "budget": {"macs": 0.5},
        "params": {"schedule": "exponential", "pruning_steps": 1, "round_to": 1},
    },
}


def run_example(*arguments: str) -> None:
    """The example on 128 digits: two steps an epoch."""
    whole = datasets.resolve_dataset

    def few(name: str) -> Any:
        data = whole(name)
        return dataclasses.replace(data, train=Subset(data.train, range(128)), test=Subset(data.test, range(32)))

    datasets.resolve_dataset = few  # type: ignore[assignment]
    sys.argv = [str(EXAMPLE), "--dense-epochs", "1", "--epochs", "4", *arguments]
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, ended.code  # noqa: PT017
    finally:
        datasets.resolve_dataset = whole  # type: ignore[assignment]


def message(action: Any) -> str:
    try:
        action()
    except CompactPruneError as error:
        return str(error)
    return "no error"


def check_collectives(rank: int) -> None:
    mine = [torch.full((2, 3), float(rank)), torch.tensor([1.0 + 2 * rank], dtype=torch.float64)]
    assert averaged([]) == summed([]) == []
    mean, total = averaged(mine), summed(mine)
    assert torch.equal(mean[0], torch.full((2, 3), 0.5)), mean
    assert mean[0].dtype == torch.float32
    assert total[1].item() == 4.0, total
    require_agreement("the same", "a text")
    said = message(lambda: require_agreement(f"text {rank}", "a text"))
    assert "a text differs between processes: ranks [0] have " in said, said
    assert "; ranks [1] have " in said, said


def check_plans(rank: int) -> None:
    model = trained("residual", dtype=torch.float32)
    if rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
    result = prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1)  # scores are averaged: no error
    require_agreement(result.plan.to_json(), "the plan")

    model = trained("residual", dtype=torch.float32)
    scope = {"ignored_scopes": ["features.1.conv1"]} if rank else {}
    said = message(lambda: prune(model, images(torch.float32), budget={"macs": 0.7}, round_to=1, **scope))
    assert "the plan of 'fbnet_pruning' differs between processes" in said, said
    assert "compactprune_plan" not in model.__dict__


def check_statistics(rank: int) -> None:
    """BatchNorm pooled over the ranks is that of one process that saw everything."""
    seen = torch.randn(2, 32, 5, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    seen[1] += 2
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
    net[0].running_mean, net[0].running_var = seen[rank].mean(0), seen[rank].var(0, correction=0)
    pool_over_ranks(net)
    everything = seen.flatten(0, 1)
    torch.testing.assert_close(net[0].running_mean, everything.mean(0))
    torch.testing.assert_close(net[0].running_var, everything.var(0, correction=0))

    generator = torch.Generator().manual_seed(rank)
    own = [torch.randn(8, 3, 12, 12, generator=generator) + 3 * rank]
    model = trained("plain", dtype=torch.float32)
    prune(model, images(torch.float32), budget={"macs": 0.5}, round_to=1, train_loader=own)
    for buffer in model.state_dict().values():
        assert torch.equal(averaged([buffer])[0], buffer)


def check_masks(rank: int) -> None:
    """All ranks mask the same channels, and the masked network under DDP is the compact one afterwards."""
    net = trained("residual", dtype=torch.float32)
    ctrl, net = create_compressed_model(net, CONFIG)
    model = DistributedDataParallel(net)
    ctrl.scheduler.epoch_step()
    ctrl.scheduler.epoch_step()
    masks = {name: buffer for name, buffer in net.named_buffers() if "mask_" in name}
    assert any((mask == 0).any() for mask in masks.values())
    assert all(torch.equal(averaged([mask])[0], mask) for mask in masks.values())
    model.train()(torch.randn(4, 3, 12, 12)).sum().backward()
    x = images(torch.float32)
    with torch.no_grad():
        masked = model.eval()(x)
        torch.testing.assert_close(ctrl.strip().eval()(x), masked, rtol=1e-5, atol=1e-6)
    model = DistributedDataParallel(net)
    model.train()(torch.randn(4, 3, 12, 12)).sum().backward()


def check_shrinking(rank: int) -> None:
    """Cut on the way and wrapped again after each cut, all ranks end with the same small network."""
    entry = CONFIG["compression"]
    params = {**entry["params"], "pruning_steps": 3, "shrink_every": 1}
    net = trained("residual", dtype=torch.float32)
    ctrl, net = create_compressed_model(net, {**CONFIG, "compression": {**entry, "params": params}})
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    ctrl.attach(optimizer=optimizer)
    model, sizes = DistributedDataParallel(net), []
    for epoch in range(4):
        before = plan_of(net)
        ctrl.scheduler.epoch_step()
        if plan_of(net) is not before:
            model = DistributedDataParallel(net)
        ctrl.scheduler.step()
        inputs = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(10 * epoch + rank))
        model.train()(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(sum(parameter.numel() for parameter in net.parameters()))
    assert len(set(sizes)) == 4, sizes
    assert all(torch.equal(averaged([parameter])[0], parameter) for parameter in net.parameters())


def check_old_wrappers(rank: int) -> None:
    """A wrapper from before a cut, or from before the analysis, is told. Ranks drifted apart where it looked for unused
    parameters; torch's own error, without that, advised to look for them."""
    x = torch.randn(4, 3, 12, 12)
    for unused in (False, True):
        net = trained("residual", dtype=torch.float32)
        early = DistributedDataParallel(net, find_unused_parameters=unused)
        ctrl, net = create_compressed_model(net, CONFIG)
        model = DistributedDataParallel(net, find_unused_parameters=unused)
        ctrl.attach(optimizer=torch.optim.SGD(net.parameters(), lr=1e-3))
        ctrl.scheduler.epoch_step()
        model.train()(x).sum().backward()
        assert "Wrap the network again" in message(lambda wrapper=early: wrapper.train()(x))
        ctrl.scheduler.epoch_step()
        assert plan_of(net) is not None
        assert "Wrap the network again" in message(lambda wrapper=model: wrapper.train()(x))
        with torch.no_grad():
            model.eval()(x)
        model = DistributedDataParallel(net, find_unused_parameters=unused)
        model.train()(x).sum().backward()


def check_trainer(rank: int) -> None:
    """The Trainer masks while it trains and cuts at the end, on every rank alike."""
    from nncf_compactprune.integrations.huggingface import CompressionCallback, image_inputs
    from nncf_compactprune.integrations.pretrained import load_pruned_hf
    from support import hugging_face

    data = datasets.resolve_dataset("digits")
    few = [{"pixel_values": image, "labels": label} for image, label in (data.train[n] for n in range(96))]
    torch.manual_seed(0)
    model = hugging_face.resnet()
    dense = sum(parameter.numel() for parameter in model.parameters())
    callback, watch = CompressionCallback(model, hugging_face.document()), hugging_face.Watch()
    options = {"use_cpu": True, "ddp_backend": "gloo", "eval_strategy": "epoch", "save_strategy": "epoch"}
    folder = Path(sys.argv[1]).parent / "trainer"
    run = hugging_face.trainer(model, callback, few, folder, watch, load_best_model_at_end=True, **options)
    run.train()
    run.save_model()
    assert watch.sizes == [dense] * 4
    assert sum(parameter.numel() for parameter in model.parameters()) < dense
    assert all(torch.equal(averaged([tensor])[0], tensor) for tensor in model.state_dict().values())
    dist.barrier()
    inputs = image_inputs(model)
    again = load_pruned_hf(folder)
    assert torch.equal(hugging_face.logits(again, inputs), hugging_face.logits(model, inputs))


def main() -> None:
    torch.set_num_threads(1)
    output = sys.argv[1]
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    run_example("--output", output)
    sys.argv = [sys.argv[0], output]
    checks = [check_collectives, check_plans, check_statistics, check_masks, check_shrinking, check_old_wrappers]
    if all(importlib.util.find_spec(package) for package in ("transformers", "accelerate")):
        checks.append(check_trainer)
    for check in checks:
        check(dist.get_rank())
        dist.barrier()
    destroy()
    # gloo's threads may outlive the group; one that drops a Python object at the end aborts the process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
