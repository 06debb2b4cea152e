"""``filter_pruning``: the structured pruning of NNCF 2.x, with its keys and their meaning, on this package's engine."""
