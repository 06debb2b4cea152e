"""Orthogonal steps: over-parameterisation whose outer factors are chosen anew at every step.

A weight that trains as F3 · F2 · F1 with outer factors held fixed moves by F3 F3ᵀ G F1ᵀ F1 for a gradient G: linear
over-parameterisation *is* a preconditioner on both sides of the gradient. Factors drawn at random keep G's singular
values as uneven as they are, and with them the few directions that are strong already. The outer factors which give all
directions the same say are F3 F3ᵀ = (G Gᵀ)^(-1/4) and F1ᵀ F1 = (Gᵀ G)^(-1/4), and their step is U Vᵀ for G = U S Vᵀ.
It is computed without any factor, by Newton-Schulz iterations in matrix products alone (Jordan et al. 2024, "Muon").

Ours: the optimizer stays the user's own SGD, whose gradients are exchanged just before it steps (Muon is an optimizer,
and takes its momentum first); steps are a share of the weight's norm, so that they mean the same in every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from nncf_compactprune.algorithms.overparameterization.factors import Geometry

ITERATIONS = 5
#: of the odd polynomial a x + b x³ + c x⁵ whose iterates move every singular value into about [0.7, 1.2] (Jordan 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor) -> Tensor:
    """U Vᵀ of U S Vᵀ, roughly: singular values between about 0.7 and 1.2, those near 0 less.

    :param matrices: ``[batch, rows, columns]``.
    :return: the same shape and dtype; zeros stay zeros.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrices else x.mT).to(matrices.dtype)


class OrthogonalSteps:
    """Gradients of some weights become orthogonal just before an optimizer steps.

    Gradients are summed over micro-batches, averaged over processes, unscaled and clipped by then.

    :param optimizer: SGD, which holds the weights.
    :param weights: each with its :class:`~.factors.Geometry`.
    :param step_size: norm of the new gradient relative to the weight's.
    """

    def __init__(self, optimizer: Optimizer, weights: Mapping[nn.Parameter, Geometry], step_size: float) -> None:
        self.optimizer = optimizer
        self._weights = dict(weights)
        self._step_size = step_size
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def layers(self) -> int:
        """How many weights it turns the gradients of."""
        return len(self._weights)

    @staticmethod
    def fit(optimizer: Optimizer) -> bool:
        """Whether an optimizer steps along its gradients. Adam and its like divide by their size, entry by entry."""
        return isinstance(optimizer, SGD)

    def remove(self) -> None:
        """Leaves the optimizer as it was."""
        self._handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """A step with a closure computes its gradients in there (Lightning's do): then they turn behind it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._turn(optimizer)
            return None

        def turned() -> Any:
            loss = closure()
            self._turn(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": turned}
        return (args[0], turned, *args[2:]), kwargs

    @torch.no_grad()
    def _turn(self, optimizer: Optimizer) -> None:
        """Weights of one shape go together: a few large products instead of many small ones."""
        alike: dict[Any, list[tuple[nn.Parameter, Geometry]]] = defaultdict(list)
        for weight, geometry in self._weights.items():
            if weight.grad is not None:
                alike[geometry, weight.device, weight.dtype].append((weight, geometry))
        scale = getattr(optimizer, "grad_scale", None)  # fused SGD unscales in its step
        for members in alike.values():
            geometry = members[0][1]
            gradients = [geometry.matrices(weight.grad) for weight, _ in members]  # type: ignore[arg-type]
            whole = torch.stack(gradients)
            count, groups, outs, taps, ins = whole.shape
            turned = orthogonalised(whole.reshape(count * groups, outs, taps * ins)).reshape(whole.shape)
            for (weight, _), one in zip(members, turned, strict=True):
                size = self._step_size * weight.norm() / one.norm().clamp_min(torch.finfo(one.dtype).tiny)
                gradient = geometry.weight(one) * (size if scale is None else size * scale)
                weight.grad.copy_(gradient)  # type: ignore[union-attr]
