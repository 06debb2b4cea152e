"""Compression of a trained network with no data: generated layer inputs, and layers re-fitted on them."""

from nncf_compactprune.algorithms.data_free.generation import Inversion
from nncf_compactprune.algorithms.data_free.network import SingleInput
from nncf_compactprune.algorithms.data_free.reconstruction import (
    Reconstruction,
    Refit,
    Refits,
    as_they_are,
    least_squares,
)
from nncf_compactprune.algorithms.data_free.sources import Generation, LayerInputs, layer_inputs

__all__ = [
    "Generation",
    "Inversion",
    "LayerInputs",
    "Reconstruction",
    "Refit",
    "Refits",
    "SingleInput",
    "as_they_are",
    "layer_inputs",
    "least_squares",
]
