"""Importance criteria, one callable each."""
