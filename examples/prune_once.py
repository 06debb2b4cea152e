"""Prunes a network at once, without a config or a training loop, and brings it back from disk.

The weights here are random. With a trained network, fine-tune before saving: ``train_loader=...`` only re-estimates
BatchNorm statistics.
"""

import torch

from nncf_compactprune import load_pruned, prune, save_pruned
from nncf_compactprune.run.networks.digits_net import digits_net

model = digits_net()  # any torch.nn.Module
images = torch.randn(2, 1, 16, 16)  # what it is called with
result = prune(model, images, budget={"macs": 0.5})  # in place, proven against the masked model
print(f"{result.plan.before.macs:,} -> {result.plan.after.macs:,} MACs, error {result.self_check.error:.0e}")

save_pruned(model, "runs/prune_once")  # model.safetensors and plan.json
again = load_pruned(digits_net(), "runs/prune_once")  # a fresh dense network, cut and filled
assert torch.equal(model.eval()(images), again(images))

for group in result.plan.groups:
    print(f"{group.name}: {group.after} of {group.before} channels")
