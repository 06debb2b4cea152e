"""Prunes a network until it takes 70 % of its time in OpenVINO, as measured on this machine."""

import torch
from rich.console import Console
from rich.table import Table

from nncf_compactprune import prune
from nncf_compactprune.run.networks.digits_net import digits_net

model = digits_net()  # any torch.nn.Module
images = torch.randn(2, 1, 16, 16)  # what it is called with
result = prune(model, images, budget={"latency": 0.7, "batch": 8, "threads": 1})
print(result.latency)

table = Table("Channels kept", "Time of the dense", "±", "Seconds of measuring")
for one in result.latency.measured:
    share = sum(one.widths) / sum(group.before for group in result.plan.groups)
    table.add_row(f"{share:.0%}", f"{one.ratio:.1%}", f"{one.spread:.1%}", f"{one.seconds:.1f}")
Console().print(table)
