"""A family: one dense network pruned to several budgets, beside unpruned siblings."""
