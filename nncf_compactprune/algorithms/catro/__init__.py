"""Class-Aware Trace Ratio Optimization (arXiv 2110.10921)."""
