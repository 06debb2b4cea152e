"""NNCF 2.x's sparsity: single weights are set to zero, by magnitude, by regularisation, or as they are."""
