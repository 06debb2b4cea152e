"""Slow, obvious reference computations that tests compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def merged_weight(first: Tensor, core: Tensor, last: Tensor, *, transposed: bool, kernel: tuple[int, ...]) -> Tensor:
    """F3 · F2_t · F1, one group and one tap after the other, in torch's layout of the weight."""
    groups = []
    for f1, f2, f3 in zip(first, core, last, strict=True):
        taps = [f3 @ f2[:, tap] @ f1 for tap in range(f2.shape[1])]
        weight = torch.stack(taps, 2)  # [out, in, taps]
        groups.append(weight.transpose(0, 1) if transposed else weight)
    joined = torch.cat(groups, 0)
    return joined.reshape(*joined.shape[:2], *kernel)


def chain(module: nn.Module, first: Tensor, core: Tensor, last: Tensor, x: Tensor) -> Tensor:
    """The expanded layer as three layers in a row: 1x1, the layer's own kind, 1x1 with the bias.

    Padding is done to the input, before the first of them.
    """
    if isinstance(module, nn.Linear):
        hidden = F.linear(F.linear(x, first[0]), core[0, :, 0])
        return F.linear(hidden, last[0], module.bias)
    dims = len(module.kernel_size)
    one = [1] * dims
    pointwise = getattr(F, f"conv{dims}d")
    if not module.transposed:
        x = _padded(module, x)
    hidden = pointwise(x, first.reshape(-1, first.shape[2], *one), groups=module.groups)
    if module.transposed:
        # [groups, out, taps, in] -> [groups * in, out, *kernel]
        weight = core.permute(0, 3, 1, 2).reshape(-1, core.shape[1], *module.kernel_size)
        hidden = getattr(F, f"conv_transpose{dims}d")(
            hidden, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
        )
    else:
        weight = core.transpose(2, 3).reshape(-1, core.shape[3], *module.kernel_size)
        hidden = getattr(F, f"conv{dims}d")(hidden, weight, None, module.stride, 0, module.dilation, module.groups)
    return pointwise(hidden, last.reshape(-1, last.shape[2], *one), module.bias, groups=module.groups)


def _padded(module: Any, x: Tensor) -> Tensor:
    """What the convolution sees after its padding, whatever its mode."""
    if module.padding == "same":
        sides = []
        for size, dilation in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
    elif module.padding == "valid":
        return x
    else:
        sides = [side for width in reversed(module.padding) for side in (width, width)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode=mode)


def similarity_loss(students: list[Tensor], teachers: list[Tensor]) -> float:
    """Mean over layers of the squared distance of row-normalised Gram matrices over b², by loops over examples."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        b = len(student)
        rows = []
        for features in (student, teacher):
            gram = [[float((features[i] * features[j]).sum()) for j in range(b)] for i in range(b)]
            rows.append([[value / sum(v**2 for v in row) ** 0.5 for value in row] for row in gram])
        total += sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(b) for j in range(b)) / b**2
    return total / len(students)
