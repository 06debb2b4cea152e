"""A budget of measured time: candidates on the device, a model of time by widths, the search for widths that hold."""

from __future__ import annotations

from nncf_compactprune.algorithms.latency.target import LatencyResult, LatencyTarget

__all__ = ["LatencyResult", "LatencyTarget"]
