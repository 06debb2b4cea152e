"""``knowledge_distillation``: the dense network teaches by its outputs, as in NNCF 2.x."""
