"""NNCF's own schedule functions."""

from nncf.torch.function_hook.pruning.scheduler_fns import exponential_ratio_scheduler

__all__ = ["exponential_ratio_scheduler"]
