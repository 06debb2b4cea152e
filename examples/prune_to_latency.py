"""Prunes a network until it takes 70 % of its time in OpenVINO, as measured on this machine."""

import torch

from nncf_compactprune import prune
from nncf_compactprune.run.networks.digits_net import digits_net

model = digits_net()  # any torch.nn.Module
images = torch.randn(2, 1, 16, 16)  # what it is called with
result = prune(model, images, budget={"latency": 0.7, "batch": 8, "threads": 1})
print(result.latency)

for one in result.latency.measured:
    share = sum(one.widths) / sum(group.before for group in result.plan.groups)
    print(
        f"{share:.0%} of the channels: {one.ratio:.1%} ± {one.spread:.1%} of the time, {one.seconds:.1f} s to measure"
    )
