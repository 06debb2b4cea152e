"""Training loops that hold an accuracy: until it is reached, or for the smallest network that reaches it."""

from nncf_compactprune.accuracy_aware.loops import (
    AdaptiveCompressionTrainingLoop,
    EarlyExitCompressionTrainingLoop,
    create_accuracy_aware_training_loop,
)
from nncf_compactprune.accuracy_aware.progress import EpochResult, TrainingLoopStatistics

__all__ = [
    "AdaptiveCompressionTrainingLoop",
    "EarlyExitCompressionTrainingLoop",
    "EpochResult",
    "TrainingLoopStatistics",
    "create_accuracy_aware_training_loop",
]
