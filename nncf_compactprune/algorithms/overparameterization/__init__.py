"""Linear over-parameterised fine-tuning (arXiv 2204.11444)."""
