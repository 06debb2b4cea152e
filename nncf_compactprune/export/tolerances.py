"""How far an exported file may be from torch."""

from __future__ import annotations

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1e-1}
"""Largest accepted error by arithmetic, relative to the largest absolute value of the output.

FP32 leaves two orders above what convolutional networks show (1e-7 to 1e-6: other summation orders). FP16 has 11 bits,
and rounding adds up over the depth. A quantized file may round to a neighbouring level where torch did not.
"""
