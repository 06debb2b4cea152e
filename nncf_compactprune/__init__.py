"""Structured pruning for NNCF: trained ConvNets become physically smaller, provably the same, and deployable."""

from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.channels import ChannelGraph, ChannelGroup, trace
from nncf_compactprune.config import CompressionConfig, load_config
from nncf_compactprune.controller import (
    CompressionController,
    PruningResult,
    create_compressed_model,
    prune,
)
from nncf_compactprune.cut.diagnosis import analyse
from nncf_compactprune.cut.surgery import apply_plan
from nncf_compactprune.errors import CompactPruneError
from nncf_compactprune.export import export_model
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins.hookspecs import hookimpl, hookspec
from nncf_compactprune.storage.checkpoint import load_pruned, save_pruned
from nncf_compactprune.version import __version__

__all__ = [
    "ChannelGraph",
    "ChannelGroup",
    "CompactPruneError",
    "CompressionConfig",
    "CompressionController",
    "CompressionStage",
    "PruningPlan",
    "PruningResult",
    "__version__",
    "analyse",
    "apply_plan",
    "create_compressed_model",
    "export_model",
    "hookimpl",
    "hookspec",
    "load_config",
    "load_pruned",
    "prune",
    "save_pruned",
    "trace",
]
