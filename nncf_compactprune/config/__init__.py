"""The configuration: NNCF's JSON grammar, typed; reading it; its mistakes in plain words."""

from nncf_compactprune.config.accuracy_aware import AccuracyAwareParams, AccuracyAwareTraining
from nncf_compactprune.config.budget import Budget
from nncf_compactprune.config.inputs import InputInfo
from nncf_compactprune.config.loading import CompressionConfig, load_algorithm, load_config, load_section
from nncf_compactprune.config.nncf2 import Nncf2Entry, Spelling
from nncf_compactprune.config.reading import Document, read_document
from nncf_compactprune.config.registered import Registered
from nncf_compactprune.config.schema import json_schema
from nncf_compactprune.config.sections import AlgorithmConfig, BatchNormAdaptation, Initializer, Section, Whole

__all__ = [
    "AccuracyAwareParams",
    "AccuracyAwareTraining",
    "AlgorithmConfig",
    "BatchNormAdaptation",
    "Budget",
    "CompressionConfig",
    "Document",
    "Initializer",
    "InputInfo",
    "Nncf2Entry",
    "Registered",
    "Section",
    "Spelling",
    "Whole",
    "json_schema",
    "load_algorithm",
    "load_config",
    "load_section",
    "read_document",
]
