"""Files as a user has them."""

from __future__ import annotations

NET_SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    input_size = (1, 16, 16)

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, 2, 1)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))

def build(num_classes=10):
    return Net(num_classes)
"""
