"""``const_sparsity``: weights that are zero stay zero while the network is trained (NNCF 2.x)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nncf_compactprune.algorithms.sparsity.base import MaskedWeights
from nncf_compactprune.algorithms.sparsity.config import ConstSparsityConfig
from nncf_compactprune.config import AlgorithmConfig


class ConstSparsity(MaskedWeights):
    """Keeps the zeros of a network that was made sparse before.

    Deviation: the zeros are those in the weights. NNCF 2.x took the masks of a checkpoint that was loaded after.

    :param config: the validated entry of ``"compression"``.
    :param context: the model and what else the algorithm works with.
    """

    name = "const_sparsity"
    summary = "Weights that are zero stay zero while the network is trained, as in NNCF 2.x"
    Config: ClassVar[type[AlgorithmConfig]] = ConstSparsityConfig
    config: ConstSparsityConfig

    def prepare(self, state: Mapping[str, Any] | None = None) -> None:
        super().prepare(state)
        if self._sparsity is not None:
            self._sparsity.set_masks(lambda name, weight: weight != 0)
