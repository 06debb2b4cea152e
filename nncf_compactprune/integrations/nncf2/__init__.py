"""The Python interface of NNCF 2.x: a training script moves over by changing where it imports from.

.. code-block:: python

    from nncf_compactprune.integrations.nncf2 import NNCFConfig, create_compressed_model, register_default_init_args

    config = NNCFConfig.from_json("resnet18_pruning.json")
    config = register_default_init_args(config, train_loader)
    controller, model = create_compressed_model(model, config)
"""

from __future__ import annotations

from typing import TypeVar

from nncf_compactprune.accuracy_aware import (
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
    create_accuracy_aware_training_loop,
)
from nncf_compactprune.algorithms import CompressionStage
from nncf_compactprune.integrations.nncf2.config import NNCFConfig
from nncf_compactprune.integrations.nncf2.controller import CompressionController as CompressionAlgorithmController
from nncf_compactprune.integrations.nncf2.controller import tensorboard_figures as prepare_for_tensorboard
from nncf_compactprune.integrations.nncf2.creation import create_compressed_model
from nncf_compactprune.integrations.nncf2.init_args import (
    BNAdaptationInitArgs,
    ModelEvaluationArgs,
    NNCFExtraConfigStruct,
    PTInitializingDataLoader,
    QuantizationRangeInitArgs,
    register_default_init_args,
)
from nncf_compactprune.integrations.nncf2.loading import load_state

AnyT = TypeVar("AnyT")


def nncf_model_input(tensor: AnyT) -> AnyT:
    """What it is given: inputs need no marking here. For ``dummy_forward_fn`` and ``wrap_inputs_fn`` of old scripts."""
    return tensor


def nncf_model_output(tensor: AnyT) -> AnyT:
    """What it is given, as :func:`nncf_model_input`."""
    return tensor


__all__ = [
    "AdaptiveCompressionTrainingLoop",
    "BNAdaptationInitArgs",
    "CompressionAlgorithmController",
    "CompressionStage",
    "EarlyExitCompressionTrainingLoop",
    "ModelEvaluationArgs",
    "NNCFConfig",
    "NNCFExtraConfigStruct",
    "PTInitializingDataLoader",
    "QuantizationRangeInitArgs",
    "create_accuracy_aware_training_loop",
    "create_compressed_model",
    "load_state",
    "nncf_model_input",
    "nncf_model_output",
    "prepare_for_tensorboard",
    "register_default_init_args",
]
