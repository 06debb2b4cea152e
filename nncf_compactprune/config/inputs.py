"""``"input_info"``: what a model is called with."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from nncf_compactprune.config.sections import Section

_MAX_ELEMENTS = 2**31


class InputInfo(Section):
    """One model input, in NNCF's grammar.

    :param sample_size: the shape, batch first.
    :param type: ``"float"``, or ``"long"`` for indices such as tokens.
    :param filler: ``"ones"``, ``"zeros"`` or ``"random"``: floats from [0, 1), integers from {0, 1}.
    :param keyword: the argument of ``forward`` it goes to; positional where None.
    """

    sample_size: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    type: Literal["float", "long"] = "float"
    filler: Literal["ones", "zeros", "random"] = "ones"
    keyword: str | None = None

    @field_validator("sample_size")
    @classmethod
    def _fits_memory(cls, value: list[int]) -> list[int]:
        if math.prod(value) > _MAX_ELEMENTS:
            msg = f"expected at most {_MAX_ELEMENTS} elements, got {math.prod(value)}."
            raise ValueError(msg)
        return value

    def tensor(self, generator: torch.Generator) -> torch.Tensor:
        """
        :param generator: a CPU generator, for ``"random"``.
        :return: a tensor on the CPU, ``[*sample_size]``.
        """
        dtype = torch.float32 if self.type == "float" else torch.long
        if self.filler != "random":
            return torch.full(self.sample_size, float(self.filler == "ones"), dtype=dtype)
        if dtype.is_floating_point:
            return torch.rand(self.sample_size, generator=generator, dtype=dtype)
        return torch.randint(0, 2, self.sample_size, generator=generator, dtype=dtype)
