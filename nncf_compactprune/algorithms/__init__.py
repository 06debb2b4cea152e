"""The algorithms: one file each, entering through the same plugin door as a third party's."""

from nncf_compactprune.algorithms.base import Begins, CompressionAlgorithm, CompressionStage, Context
from nncf_compactprune.algorithms.channel_pruning import ChannelPruning, ChannelPruningConfig, ChannelPruningParams

__all__ = [
    "Begins",
    "ChannelPruning",
    "ChannelPruningConfig",
    "ChannelPruningParams",
    "CompressionAlgorithm",
    "CompressionStage",
    "Context",
]
