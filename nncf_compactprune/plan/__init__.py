"""What is removed: a frozen plan, reading one from anywhere, whether it fits a model."""

from nncf_compactprune.plan.after import graph_after, kept_channels
from nncf_compactprune.plan.pruning_plan import Cost, GroupChange, PruningPlan, make_plan

__all__ = ["Cost", "GroupChange", "PruningPlan", "graph_after", "kept_channels", "make_plan"]
