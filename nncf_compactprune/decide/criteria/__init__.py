"""Importance criteria, one callable each, and the context that they look at."""

from nncf_compactprune.decide.criteria.context import CriterionContext, criterion_contexts, mean_gradients

__all__ = ["CriterionContext", "criterion_contexts", "mean_gradients"]
