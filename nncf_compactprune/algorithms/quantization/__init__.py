"""``quantization``: 8-bit quantization through NNCF, after training or while training."""
