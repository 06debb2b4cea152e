"""How far an exported file may be from torch."""

from __future__ import annotations

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1e-1}
"""Largest accepted error by arithmetic, relative to the largest absolute value of the output.

FP32 leaves two orders above what convolutional networks show (1e-7 to 1e-6: other summation orders). FP16 has 11 bits,
and rounding adds up over the depth. A quantized file may round to a neighbouring level where torch did not.
"""

UNROUNDED = 1e-2
"""The same of a quantized file and its network without the rounding of activations. Right ones show 1e-6, and more
where a weight is on the border of two levels; two channels exchanged in ResNet-20 8e-2 and more."""

ROUNDED = 1.0
"""The same of such a file as it is, which then shows that the runtime computes it at all: ResNet-20 in 4 bits is 0.2
from torch, deeper networks more."""
SMALLEST = 1e-6
"""An absolute error that rounding may make in outputs of up to 1, such as probabilities."""
