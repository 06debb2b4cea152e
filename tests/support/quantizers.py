"""What NNCF's quantizers measured."""

from __future__ import annotations

from torch import Tensor, nn


def ranges(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the ranges of all quantizers, by name; there are some."""
    found = {k: v.clone() for k, v in model.state_dict().items() if k.endswith((".scale", ".input_range"))}
    assert found
    return found
