"""Moments of features per class, streamed: what is needed of any number of samples, in memory that does not grow.

Counts, means and sums of squared deviations are merged batch by batch in float64 (Chan, Golub and LeVeque 1983), so
that a mean far from zero costs no digits, as it would in ``Σx² - n·mean²``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nncf_compactprune.host.distributed import summed


class ClassMoments:
    """Running count, mean and sum of squared deviations of every feature in every class.

    :param classes: number of classes.
    :param features: number of features.
    """

    def __init__(self, classes: int, features: int) -> None:
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.mean = torch.zeros(classes, features, dtype=torch.float64)
        self.deviation = torch.zeros(classes, features, dtype=torch.float64)

    def update(self, values: Tensor, labels: Tensor) -> None:
        """Adds samples.

        :param values: ``[samples, features]``, any floating dtype and device.
        :param labels: class of each sample, ``[samples]``, integers in [0, classes).
        """
        values, labels = values.detach().to("cpu", torch.float64), labels.to("cpu")
        count = torch.zeros_like(self.count).index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        mean = torch.zeros_like(self.mean).index_add_(0, labels, values) / count.clamp_min(1)[:, None]
        deviation = torch.zeros_like(self.mean).index_add_(0, labels, (values - mean[labels]).square())
        total = self.count + count
        share = (count / total.clamp_min(1))[:, None]
        step = mean - self.mean
        self.deviation += deviation + step.square() * self.count[:, None] * share
        self.mean += step * share
        self.count = total

    def all_reduce(self) -> None:
        """Merges the moments of all processes of ``torch.distributed``, if it runs: all hold the same afterwards."""
        own_count, own_mean = self.count, self.mean
        self.count, total = summed([own_count, own_mean * own_count[:, None]])
        self.mean = total / self.count.clamp_min(1)[:, None]
        shift = (own_mean - self.mean).square() * own_count[:, None]
        (self.deviation,) = summed([self.deviation + shift])

    @property
    def within(self) -> Tensor:
        """Scatter inside the classes: ``Σ_i (x_i - mean of its class)²``, ``[features]``."""
        return self.deviation.sum(0)

    @property
    def between(self) -> Tensor:
        """Scatter of the class means: ``Σ_c n_c (mean_c - mean)²``, ``[features]``."""
        overall = (self.mean * self.count[:, None]).sum(0) / self.count.sum().clamp_min(1)
        return ((self.mean - overall).square() * self.count[:, None]).sum(0)
