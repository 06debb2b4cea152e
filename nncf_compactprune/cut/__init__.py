"""Cuts a model to a plan, whole or not at all, and proves the result; masks it softly before."""
