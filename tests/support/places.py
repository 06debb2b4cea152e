"""Where tests find what is not beside them."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
CONFIGS = ROOT / "configs"
