"""Importance criteria: one callable each, group and parameters to scores, larger kept."""
