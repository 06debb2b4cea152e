"""Structured pruning of channel groups under a budget: the part that every pruning algorithm shares."""

from nncf_compactprune.algorithms.channel_pruning.algorithm import ChannelPruning
from nncf_compactprune.algorithms.channel_pruning.config import (
    ChannelPruningConfig,
    ChannelPruningParams,
    PruningInitializer,
)

__all__ = ["ChannelPruning", "ChannelPruningConfig", "ChannelPruningParams", "PruningInitializer"]
