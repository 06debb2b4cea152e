"""The schedules of NNCF 2.x's sparsity: the share of zeros at each point of the training."""

from __future__ import annotations

from nncf_compactprune.algorithms.sparsity.config import SparsityParams
from nncf_compactprune.host.nncf_sparsity import multi_step_ratio_scheduler

#: of ``"adaptive"``, as in NNCF 2.x
_STEP, _TOLERANCE = 0.05, 0.03


def level(params: SparsityParams, initial: float, epoch: float) -> float:
    """The level at a point of the training.

    >>> params = SparsityParams(sparsity_target=0.6, sparsity_target_epoch=2, power=1.0)
    >>> [round(level(params, 0.2, epoch), 3) for epoch in range(4)]
    [0.2, 0.4, 0.6, 0.6]

    :param params: say which schedule. ``"adaptive"`` depends on what was reached: see :class:`Adaptive`.
    :param initial: level in epoch 0.
    :param epoch: from 0; within an epoch, a fraction more.
    """
    target, last = params.target, params.sparsity_target_epoch
    if params.schedule == "multistep":
        steps, levels = sorted(params.multistep_steps), params.multistep_sparsity_levels
        return float(multi_step_ratio_scheduler(int(epoch), steps=dict(zip([0, *steps], levels, strict=True))))
    if last == 0:
        return target
    progress = min(epoch / last, 1.0)
    if params.schedule == "exponential":
        return min(float(1 - (1 - initial) * ((1 - target) / (1 - initial)) ** progress), target)
    if params.concave:
        return float(target - (target - initial) * (1 - progress) ** params.power)
    return float(initial + (target - initial) * progress**params.power)


class Adaptive:
    """The schedule ``"adaptive"``: a level waits until it is nearly reached, then rises by a step.

    :param params: target and patience.
    :param initial: level at the start.
    """

    def __init__(self, params: SparsityParams, initial: float) -> None:
        self._params = params
        self.current = initial
        self.waited = 0

    def __call__(self, reached: float) -> float:
        """The level of the next epoch.

        :param reached: level that the masks have now.
        """
        if reached >= self.current - _TOLERANCE:
            self.waited += 1
        if self.waited >= self._params.patience:
            self.waited = 0
            self.current = min(self.current + _STEP, self._params.target)
        return self.current
