"""Structured pruning for NNCF: trained ConvNets become physically smaller, provably the same, and deployable."""

from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.algorithms.catro.subtask import ClassSubset
from nncf_compactprune.algorithms.rotation.rotate import Rotation, rotate
from nncf_compactprune.channels import ChannelGraph, ChannelGroup
from nncf_compactprune.config import CompressionConfig, load_config
from nncf_compactprune.controller import (
    CompressionController,
    PruningResult,
    create_compressed_model,
    prune,
)
from nncf_compactprune.cut.diagnosis import analyse
from nncf_compactprune.cut.surgery import apply_plan, plan_of
from nncf_compactprune.errors import (
    BudgetError,
    CompactPruneError,
    ConfigError,
    DataError,
    DataFreeError,
    DistillationError,
    ExportError,
    FixedAttributeError,
    NothingPrunableError,
    PlanError,
    PluginError,
    QuantizationError,
    ResolveError,
    RestoreError,
    ScopeError,
    SelfCheckError,
    StorageError,
    TraceError,
    UntrainedError,
)
from nncf_compactprune.export import ExportedFile, export_model
from nncf_compactprune.host.nncf_versions import IS_NNCF_2
from nncf_compactprune.plan import PruningPlan
from nncf_compactprune.plugins import Plugins
from nncf_compactprune.plugins.hookspecs import hookimpl
from nncf_compactprune.storage.checkpoint import load_pruned, save_pruned
from nncf_compactprune.version import __version__

__all__ = [
    "BudgetError",
    "ChannelGraph",
    "ChannelGroup",
    "ClassSubset",
    "CompactPruneError",
    "CompressionConfig",
    "CompressionController",
    "CompressionStage",
    "ConfigError",
    "DataError",
    "DataFreeError",
    "DistillationError",
    "ExportError",
    "ExportedFile",
    "FixedAttributeError",
    "NothingPrunableError",
    "PlanError",
    "PluginError",
    "Plugins",
    "PruningPlan",
    "PruningResult",
    "QuantizationError",
    "ResolveError",
    "RestoreError",
    "Rotation",
    "ScopeError",
    "SelfCheckError",
    "StorageError",
    "TraceError",
    "UntrainedError",
    "__version__",
    "analyse",
    "apply_plan",
    "create_compressed_model",
    "export_model",
    "hookimpl",
    "load_config",
    "load_pruned",
    "plan_of",
    "prune",
    "rotate",
    "save_pruned",
]

if IS_NNCF_2:  # NNCF 2.19's own config and create_compressed_model then take the algorithms of this package
    from nncf_compactprune.integrations import nncf219  # noqa: F401
